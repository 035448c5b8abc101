"""A study whose trials run on a real Ray: `make test-ray`."""

from pathlib import Path

import pytest

from prefixkit.config import Size, StudyConfig
from prefixkit.lab.study.plan import plan_study
from prefixkit.lab.study.run import run_study
from prefixkit.lab.sweep.on_ray import on_ray
from prefixkit.lab.sweep.trial import Runner


@pytest.mark.usefixtures("ray_here")
def test_a_study_finds_on_ray_what_it_finds_here(
    small_study: StudyConfig, overrides: list[str], runner: Runner, tmp_path: Path
) -> None:
    here, there = (
        run_study(
            plan_study(small_study, tmp_path / place, size=Size.TINY, overrides=overrides), run, report=lambda *_: None
        )
        for place, run in (("here", runner), ("there", on_ray(cores=1)))
    )
    assert [arm.rates for arm in there.arms] == [arm.rates for arm in here.arms]
    assert [arm.values("heldout_nll") for arm in there.arms] == [arm.values("heldout_nll") for arm in here.arms]
    assert not any(arm.lost("heldout_nll") for arm in there.arms)
