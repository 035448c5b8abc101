"""The doctor says what is in the cache, and what only some need is no failure."""

import pytest

from prefixkit.lab import doctor
from prefixkit.lab.doctor import examine


@pytest.fixture
def checks(tmp_path, monkeypatch):
    """Examine a machine by name of the check; the cache is an empty folder."""
    monkeypatch.setenv("PREFIXKIT_CACHE", str(tmp_path / "cache"))
    return lambda: {check.name: check for check in examine()}


def test_what_the_demo_needs_is_missed_until_it_is_fetched(checks):
    found = checks()
    for name in ("smollm2-135m", "movie-reviews"):
        assert (found[name].found, found[name].is_fine) == ("not fetched yet", False)
        assert found[name].fix.startswith("run `make demo` once")


@pytest.mark.parametrize(("name", "use"), [("bbc-news", "for headlines"), ("small-talk", "for dialogue")])
def test_data_that_only_some_recipes_need_may_be_absent(checks, monkeypatch, name, use):
    found = checks()[name]
    assert (found.found, found.is_fine) == (f"not fetched yet ({use})", True)
    monkeypatch.setattr(doctor, "is_cached", lambda file: True)
    assert checks()[name].found == f"in the cache ({use})"


def test_the_encoder_is_for_classification_and_its_absence_is_fine(checks, monkeypatch):
    found = checks()["all-minilm-l6-v2"]
    assert (found.found, found.is_fine) == ("not fetched yet (for classification)", True)
    monkeypatch.setattr(doctor, "is_fetched", lambda packaged: True)
    found = checks()["all-minilm-l6-v2"]
    assert (found.found, found.is_fine) == ("in the cache (for classification)", True)
