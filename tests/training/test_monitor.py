"""The monitor stops a run before the step that would spoil it."""

import math

import pytest

from prefixkit.errors import DivergedError
from prefixkit.training.monitor import Monitor


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_or_gradient_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(DivergedError, match=rf"step 3: loss is {bad}; lower train.learning_rate"):
        Monitor(3.0, 10.0, 1.0).check(3, bad, 1.0)
    with pytest.raises(DivergedError, match=rf"step 3: gradient norm is {bad}"):
        Monitor(3.0, 10.0, 1.0).check(3, 1.0, bad)


def test_an_exploding_loss_is_refused_once_there_is_a_median() -> None:
    monitor = Monitor(3.0, 10.0, 1.0)
    monitor.check(1, 100.0, 1.0)
    for step in range(2, 8):
        monitor.check(step, 2.0, 1.0)
    with pytest.raises(DivergedError, match=r"step 8: loss 6\.1 is more than 3 times the running median 2"):
        monitor.check(8, 6.1, 1.0)


def test_a_restored_monitor_remembers() -> None:
    first = Monitor(3.0, 10.0, 1.0)
    for step in range(6):
        first.check(step, 1.0, 1.0)
    second = Monitor(3.0, 10.0, 1.0)
    second.restore(*first.state())
    with pytest.raises(DivergedError):
        second.check(7, 3.5, 1.0)


def test_a_small_loss_may_triple() -> None:
    """Losses near 0 do: a batch of easy targets, then one with a single hard one."""
    monitor = Monitor(3.0, 10.0, 1.0)
    for step in range(10):
        monitor.check(step, 0.1, 1.0)
    monitor.check(10, 1.9, 1.0)
    with pytest.raises(DivergedError, match=r"step 11: loss 2\.2 is more than 3 times the running median 0\.1"):
        monitor.check(11, 2.2, 1.0)


def test_an_exploding_gradient_is_refused_where_it_would_be_clipped() -> None:
    monitor = Monitor(3.0, 10.0, 1.0)
    for step in range(10):
        monitor.check(step, 2.0, 0.05)
    monitor.check(10, 2.0, 0.9)
    with pytest.raises(DivergedError, match=r"step 11: gradient norm 1\.2 is more than 10 times the running median"):
        monitor.check(11, 2.0, 1.2)
