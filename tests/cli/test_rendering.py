"""Progress where nobody watches a bar."""

from prefixkit.cli.rendering import ProgressLines


def test_what_takes_long_says_so_every_half_minute_and_at_its_end() -> None:
    now, lines = [100.0], []
    report = ProgressLines(lines.append, lambda: now[0])
    for step in range(1, 101):
        now[0] += 1
        report("training", 500 + step, 600, f"loss {4 - step / 100:.2f}" if step > 40 else "")
    assert lines == [
        "training: 531 of 600, 30 in 30 s",
        "training: 561 of 600, 60 in 60 s, loss 3.39",
        "training: 591 of 600, 90 in 90 s, loss 3.09",
        "training: 600 of 600, 99 in 99 s, loss 3.00",
    ]


def test_what_is_quick_says_nothing() -> None:
    now, lines = [0.0], []
    report = ProgressLines(lines.append, lambda: now[0])
    for stage in ("training", "generating"):
        for step in range(20):
            now[0] += 1
            report(stage, step + 1, 20, "")
    assert lines == []
