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
    monitor.check(8, 9.0, 1.0)
    monitor.check(9, 7.0, 1.0)
    with pytest.raises(
        DivergedError, match=r"step 10: loss 6\.1, the third in a row, is more than 3 times the running"
    ):
        monitor.check(10, 6.1, 1.0)


def test_a_hard_batch_now_and_then_is_no_explosion() -> None:
    """As small talk has them, cut after its first words: 11.8 nats per token where others have 4."""
    monitor = Monitor(3.0, 10.0, 1.0)
    for step in range(1, 100):
        monitor.check(step, 11.8 if step % 9 in (0, 1) else 3.9, 1.0)


def test_a_restored_monitor_remembers() -> None:
    first = Monitor(3.0, 10.0, 1.0)
    for step in range(6):
        first.check(step, 1.0, 1.0)
    for step in (6, 7):
        first.check(step, 3.5, 1.0)
    second = Monitor(3.0, 10.0, 1.0)
    second.restore(*first.state())
    with pytest.raises(DivergedError):
        second.check(8, 3.5, 1.0)


def test_a_small_loss_may_triple() -> None:
    """Losses near 0 do: a batch of easy targets, then one with a single hard one."""
    monitor = Monitor(3.0, 10.0, 1.0)
    for step in range(10):
        monitor.check(step, 0.1, 1.0)
    for step in (10, 11, 12):
        monitor.check(step, 1.9, 1.0)
    for step in (13, 14):
        monitor.check(step, 2.2, 1.0)
    with pytest.raises(
        DivergedError, match=r"step 15: loss 2\.2, the third in a row, is more than 3 times the running"
    ):
        monitor.check(15, 2.2, 1.0)


def test_an_exploding_gradient_is_refused_where_it_would_be_clipped() -> None:
    monitor = Monitor(3.0, 10.0, 1.0)
    for step in range(10):
        monitor.check(step, 2.0, 0.05)
    monitor.check(10, 2.0, 0.9)
    with pytest.raises(DivergedError, match=r"step 11: gradient norm 1\.2 is more than 10 times the running median"):
        monitor.check(11, 2.0, 1.2)
