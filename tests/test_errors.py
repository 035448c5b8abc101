"""The error tree is one tree, and a near miss gets a suggestion."""

import inspect

import pytest

from prefixkit import errors


def test_every_error_is_a_prefixkit_error_and_stands_in_the_drawing() -> None:
    drawn = errors.__doc__ or ""
    classes = [each for _, each in inspect.getmembers(errors, inspect.isclass) if each.__module__ == errors.__name__]
    assert len(classes) >= 11
    for each in classes:
        assert issubclass(each, errors.PrefixkitError)
        assert each.__name__ in drawn


def test_narrow_errors_are_caught_as_their_wider_kind() -> None:
    assert issubclass(errors.UnsupportedModelError, errors.ModelError)
    assert issubclass(errors.BaseMismatchError, errors.ArtefactError)
    assert issubclass(errors.DivergedError, errors.TrainingError)


@pytest.mark.parametrize(
    ("word", "known", "hint"),
    [
        ("lenght", ["length", "depth"], '; did you mean "length"?'),
        ("zzz", ["length", "depth"], ""),
        ("length", [], ""),
    ],
)
def test_a_near_miss_gets_a_suggestion_and_a_far_one_none(word: str, known: list[str], hint: str) -> None:
    assert errors.did_you_mean(word, known) == hint
