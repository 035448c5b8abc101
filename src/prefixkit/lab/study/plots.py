"""The pictures of a study as inline SVG: a measure against the axis or arm by arm, and the rates that were tried."""

from collections.abc import Sequence

import yaml
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from prefixkit.lab.pages.comparison import Better, Measure, Unit, format_value
from prefixkit.lab.pages.plots import FAINT, INSTRUCTION, PREFIX, STYLE, to_svg
from prefixkit.lab.study.results import ArmResult, StudyResult
from prefixkit.lab.study.statistics import mean_beside_others

_LAYERS = "prefix.layers"
_BASELINES = {"base.": "base model", "instruction.": "instruction"}


def measure_plot(result: StudyResult, measure: Measure, *, name: str, width: float = 9.6) -> str | None:
    """Draw a measure of every arm: its mean over the seeds, the interval, and each seed as a faint dot.

    Args:
        result: the study's.
        measure: which.
        name: put before every id in the SVG.
        width: inches.

    Returns:
        An ``<svg>`` element, or None where no arm has the measure.
    """
    arms = [arm for arm in result.arms if arm.values(measure.key)]
    if not arms:
        return None
    placed = [arm for arm in arms if arm.x is not None]
    with rc_context(STYLE):
        has_axis = bool(result.study.axis) and len(placed) > 1
        height = 3.8 if has_axis else 1.0 + 0.42 * len(arms)
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        if has_axis:
            _along(axes, placed, measure, result)
            across = {arm.name: mean for arm in arms if arm.x is None for mean in [_mean(arm, measure)]}
            _lines(axes, across | _baselines(result, measure))
            _scale(axes.yaxis, measure)
            axes.set(xlabel=result.study.axis, ylabel=measure.label.lower())
        else:
            _beside(axes, arms, measure)
            _scale(axes.xaxis, measure)
            axes.set(xlabel=measure.label.lower())
        return to_svg(figure, name, f"{measure.label} of every arm")


def layers_plot(result: StudyResult, measure: Measure, *, name: str, width: float = 9.6) -> str | None:
    """Draw what which layers' prefixes are worth: a row per arm, its layers filled, the darker the better its mean.

    As `measure_plot`; None where arms do not differ in their layers.
    """
    layers = {arm.name: _layers(arm) for arm in result.arms if _LAYERS in arm.settings and arm.values(measure.key)}
    known = [layer for each in layers.values() if each is not None for layer in each]
    if not known:
        return None
    count, means = max(known) + 1, {name: _mean(result.arm(name), measure) for name in layers}
    least, most = min(means.values()), max(means.values())
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 1.0 + 0.32 * len(layers)), layout="constrained")
        axes = figure.add_subplot()
        for row, (arm, filled) in enumerate(layers.items()):
            share = (means[arm] - least) / (most - least) if most > least else 1.0
            share = 1 - share if measure.better is Better.LOWER else share
            spans = [(layer - 0.45, 0.9) for layer in (range(count) if filled is None else filled)]
            axes.broken_barh(spans, (row - 0.4, 0.8), color=PREFIX, alpha=0.15 + 0.85 * share, linewidth=0)
            axes.annotate(format_value(means[arm], measure.unit), (count - 0.5, row), xytext=(6, 0), va="center",
                          textcoords="offset points", color=FAINT, fontsize=9, annotation_clip=False)  # fmt: skip
        axes.set_yticks(range(len(layers)), list(layers))
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.set_xlim(-0.5, count - 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
        axes.set(xlabel="layer")
        axes.grid(visible=False)
        return to_svg(figure, name, f"{measure.label} by the layers that have a prefix")


def rates_plot(result: StudyResult, *, name: str, width: float = 9.6) -> str | None:
    """Draw the validation loss against the factor on the default rate, a line per arm; None where none was tried."""
    arms = [arm for arm in result.arms if sum(each.validation_loss is not None for each in arm.tried) > 1]
    if not arms:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for arm in arms:
            known = [(each.factor, each.validation_loss) for each in arm.tried if each.validation_loss is not None]
            axes.plot(*zip(*known, strict=True), color=PREFIX, alpha=0.35, linewidth=1.2)
            best = min(known, key=lambda point: point[1])
            axes.plot(*best, "o", color=INSTRUCTION if arm.at_edge else PREFIX, markersize=6)
            axes.annotate(arm.name, known[-1], xytext=(5, 0), textcoords="offset points", va="center", color=FAINT,
                          fontsize=8, annotation_clip=False)  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        factors = sorted({each.factor for arm in arms for each in arm.tried})
        axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
        axes.set(xlabel="times the arm's own default rate", ylabel="validation loss")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        return to_svg(figure, name, "Validation loss against the learning rate of every arm")


def _layers(arm: ArmResult) -> list[int] | None:
    """Return the layers an arm gives a prefix; None for all."""
    said = arm.settings[_LAYERS]
    found: list[int] | None = yaml.safe_load(said) if isinstance(said, str) else said  # as on the command line
    return found


def _along(axes: Axes, arms: Sequence[ArmResult], measure: Measure, result: StudyResult) -> None:
    """Arms on an axis of numbers."""
    ordered = sorted(arms, key=lambda arm: arm.x or 0.0)
    places = [arm.x or 0.0 for arm in ordered]
    axes.plot(places, [_mean(arm, measure) for arm in ordered], color=PREFIX, linewidth=1.8)
    for place, arm in zip(places, ordered, strict=True):
        values = arm.values(measure.key)
        axes.plot([place] * len(values), values, "o", color=PREFIX, alpha=0.35, markersize=4)
        found = mean_beside_others(arm, measure.key)
        if found is not None and found.interval is not None:
            axes.plot([place, place], [found.interval.low, found.interval.high], color=PREFIX, linewidth=1.2)
        axes.plot(place, _mean(arm, measure), "o", color=PREFIX, markersize=7)
    if result.study.is_log and min(places) > 0:
        axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(places, [f"{place:g}" for place in places])


def _beside(axes: Axes, arms: Sequence[ArmResult], measure: Measure) -> None:
    """Arms without an axis: one line each, the first on top."""
    for row, arm in enumerate(arms):
        values = arm.values(measure.key)
        axes.plot(values, [row] * len(values), "o", color=PREFIX, alpha=0.35, markersize=4)
        found = mean_beside_others(arm, measure.key)
        if found is not None and found.interval is not None:
            axes.plot([found.interval.low, found.interval.high], [row, row], color=PREFIX, linewidth=1.4)
        axes.plot(_mean(arm, measure), row, "o", color=PREFIX, markersize=7)
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")


def _lines(axes: Axes, values: dict[str, float]) -> None:
    """Draw what has no place on the axis as lines across."""
    for number, (name, value) in enumerate(values.items()):
        axes.axhline(value, color=INSTRUCTION, linewidth=1.1, linestyle=(0, (3, 2 + number)))
        axes.annotate(name, (1, value), xycoords=("axes fraction", "data"), xytext=(5, 0), va="center",
                      textcoords="offset points", color=INSTRUCTION, fontsize=9, annotation_clip=False)  # fmt: skip


def _baselines(result: StudyResult, measure: Measure) -> dict[str, float]:
    if len(result.recipes) > 1:
        return {}
    scores = result.baselines(*result.recipes)
    found = {name: scores.get(prefix + measure.key) for prefix, name in _BASELINES.items()}
    return {name: value for name, value in found.items() if value is not None}


def _mean(arm: ArmResult, measure: Measure) -> float:
    values = arm.values(measure.key)
    return sum(values) / len(values)


def _scale(axis: Axis, measure: Measure) -> None:
    axis.set_major_locator(MaxNLocator(nbins=5))
    match measure.unit:
        case Unit.SHARE:
            axis.set_major_formatter(PercentFormatter(1))
        case Unit.BYTES:
            axis.set_major_formatter(lambda value, _: f"{value / 1e9:.3g} GB")
        case Unit.SECONDS:
            axis.set_major_formatter(lambda value, _: f"{value:g} s")
        case _:
            pass
