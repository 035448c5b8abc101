"""Curves of a run as inline SVG: text stays text, and colours follow the page's light or dark theme."""

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prefixkit.lab.pages.comparison import is_number

# matplotlib can only write fixed colours. These stand for CSS variables and are swapped in the finished SVG.
INK, FAINT, GRID, PREFIX, INSTRUCTION = "#010203", "#010204", "#010205", "#010206", "#010207"
_VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    GRID: "var(--rule)",
    PREFIX: "var(--prefix)",
    INSTRUCTION: "var(--instruction)",
}
STYLE: dict[Any, Any] = {  # matplotlib types its keys as literals
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}

Metrics = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl, one mapping per step."""


def loss_plot(
    metrics: Metrics, *, name: str, best_step: int | None = None, width: float = 9.6, unit: str = "nats per token"
) -> str | None:
    """Draw the training loss, faint, and the held-out losses with the best one marked.

    Args:
        metrics: lines of metrics.jsonl.
        name: put before every id in the SVG, so that several can share a page.
        best_step: the step whose prefix was kept; marked if it has a held-out loss.
        width: inches.
        unit: what the losses are counted in.

    Returns:
        An ``<svg>`` element, or None without a loss to draw.
    """
    trained, heldout = _series(metrics, "loss"), _series(metrics, "heldout_loss")
    if not trained[0] and not heldout[0]:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 3.6), layout="constrained")
        axes = figure.add_subplot()
        if trained[0]:
            axes.plot(*trained, color=PREFIX, alpha=0.3, linewidth=1, label="training batch")
        if heldout[0]:
            axes.plot(*heldout, color=PREFIX, linewidth=1.8, marker="o", markersize=5, label="held-out")
        if best_step is not None and best_step in heldout[0]:
            _mark_best(axes, best_step, heldout[1][heldout[0].index(best_step)])
        _limit_loss(axes, trained[1], heldout[1])
        axes.set(xlabel="step", ylabel=f"loss, {unit}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.legend(loc="upper right", ncols=2, borderaxespad=0)
        return to_svg(figure, name, "Loss against training steps")


def small_plot(metrics: Metrics, key: str, title: str, *, name: str) -> str | None:
    """Draw one quantity per step, such as the gradient norm; None where no line has it."""
    steps, values = _series(metrics, key)
    if not steps:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(4.1, 1.9), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(steps, values, color=INSTRUCTION, linewidth=1.2)
        axes.set(title=title, xlabel="step")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        return to_svg(figure, name, f"{title} against training steps")


def _series(metrics: Metrics, key: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[key]) for line in metrics if is_number(line.get(key))]
    return [step for step, _ in points], [float(value) for _, value in points]


def _mark_best(axes: Axes, step: int, loss: float) -> None:
    axes.plot(
        [step], [loss], "o", markersize=13, markerfacecolor="none", markeredgewidth=1.8,
        markeredgecolor=INSTRUCTION, label="_best",
    )  # fmt: skip
    axes.annotate(
        f"best {loss:.3f}", (step, loss), xytext=(0, -13), textcoords="offset points", ha="center", va="top",
        color=INSTRUCTION, fontweight="bold", annotation_clip=False,
    )  # fmt: skip


def _limit_loss(axes: Axes, trained: Sequence[float], heldout: Sequence[float]) -> None:
    """Leave room below for the label of the best step, and above for the legend."""
    values = [*trained, *heldout]
    room = (max(values) - min(values)) or 1.0
    axes.set_ylim(min(values) - 0.12 * room, max(values) + 0.15 * room)


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Return the figure as an ``<svg>`` element for inlining: own ids, no prolog, themed colours."""
    file = StringIO()
    with rc_context({"svg.hashsalt": name}):  # the same run gives the same bytes
        FigureCanvasSVG(figure)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)  # inside HTML the parser knows the namespaces
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).strip()


#: What the pages' variables are on light paper, for pictures that stand alone.
_ON_PAPER = {
    "var(--ink)": "#1d2228",
    "var(--faint)": "#5d6670",
    "var(--rule)": "#dedbd3",
    "var(--prefix)": "#0072b2",
    "var(--instruction)": "#c25400",
}


def on_paper(value: Any) -> Any:
    """Return a setting of `STYLE` for pictures that stand alone: its colour on light paper, if it is one."""
    return _ON_PAPER[_VARIABLES[value]] if value in _VARIABLES else value


def standalone(svg: str) -> str:
    """Return an ``<svg>`` element made for a page as a file of its own, on light paper."""
    for variable, colour in _ON_PAPER.items():
        svg = svg.replace(variable, colour)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    head, body = svg.split(">", 1)
    paper = '<rect width="100%" height="100%" fill="#fcfbf8"/>'
    return head.replace("<svg ", f"<svg {spaces} ", 1) + f">{paper}{body}\n"
