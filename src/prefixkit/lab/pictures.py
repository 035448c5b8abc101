"""Pictures for notebooks: those of the reports, shown as they are, and matplotlib in the same style."""

import re
from dataclasses import dataclass

from matplotlib import rcParams

from prefixkit.errors import EvaluationError
from prefixkit.lab.diagnosis.plots import dilution_plot, heat_map, token_plot
from prefixkit.lab.diagnosis.record import Diagnosis, PlacementDiagnosis
from prefixkit.lab.pages.plots import FAINT, GRID, INK, STYLE, loss_plot, on_paper, standalone
from prefixkit.lab.run.folder import METRICS, RUN, read_record
from prefixkit.lab.run.run import Run
from prefixkit.training import read_metrics

#: A colour for each system and method, the same in all pictures.
COLOURS = {
    "base": "#6f6a76", "instruction": "#c25400", "prefix": "#0072b2", "people": "#00795a", "other": "#8a5fb0",
    "faint": on_paper(FAINT), "rule": on_paper(GRID), "ink": on_paper(INK),
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A picture that a notebook shows when a cell ends with it.

    Attributes:
        svg: a whole SVG file.
    """

    svg: str

    def _repr_svg_(self) -> str:
        return self.svg


def losses(run: Run) -> Picture:
    """Draw a run's training loss and its held-out losses, the one that was kept marked.

    Raises:
        EvaluationError: the run folder holds no losses.
    """
    best = read_record(run.folder / RUN).get("best_step")
    svg = loss_plot(read_metrics(run.folder / METRICS), name="losses", best_step=best, width=8.0)
    if svg is None:
        raise EvaluationError(f"{run.folder}: holds no losses to draw")
    return _picture(svg)


def heads(found: Diagnosis) -> Picture:
    """Draw the share of its attention that each head of each layer gives the prefix."""
    return _picture(heat_map(found, _only(found), name="heads", width=8.0))


def dilution(found: Diagnosis) -> Picture:
    """Draw that share against the length of the text read so far."""
    return _picture(dilution_plot(found, _only(found), name="dilution", width=8.0))


def virtual_tokens(found: Diagnosis) -> Picture:
    """Draw what each virtual token gets, and how long its keys and values are beside the text's."""
    return _picture(token_plot(found, _only(found), name="virtual-tokens", width=8.0))


def use_style() -> None:
    """Have a notebook draw matplotlib's figures as SVG in the style of the reports, the same bytes each time."""
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    rcParams.update({name: on_paper(value) for name, value in STYLE.items()})
    rcParams.update({"svg.hashsalt": "notebook", "figure.facecolor": "#fcfbf8", "axes.facecolor": "#fcfbf8",
                     "figure.figsize": (7.6, 3.2), "figure.constrained_layout.use": True})  # fmt: skip
    set_matplotlib_formats("svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")


def _only(found: Diagnosis) -> PlacementDiagnosis:
    """Return the first placement; the notebooks' model has no other."""
    return found.placements[0]


def _picture(svg: str) -> Picture:
    """Give the picture a size of its own: a notebook shows it beside text, not in a page's column."""
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert box is not None
    return Picture(standalone(svg).replace("<svg ", f'<svg width="{box[1]}" height="{box[2]}" ', 1))
