"""The page of a diagnosis: what `prefixkit diagnose` leaves for people."""

from dataclasses import dataclass

from markupsafe import Markup

from prefixkit.config import Placement
from prefixkit.lab.diagnosis.findings import IGNORES, at, findings, ignoring_heads, num_heads, percent, title
from prefixkit.lab.diagnosis.plots import dilution_plot, heat_map, token_plot
from prefixkit.lab.diagnosis.record import Diagnosis, PlacementDiagnosis
from prefixkit.lab.pages.facts import Fact, flat_facts
from prefixkit.lab.pages.render import render_page
from prefixkit.lab.run.report import Headline

_DRAWINGS = {"heat": heat_map, "dilution": dilution_plot, "tokens": token_plot}
_NARROW_INCHES = 4.4


@dataclass(frozen=True)
class _View:
    """One placement on the page."""

    title: str
    counted: str
    """What heads and virtual tokens are means over."""
    wide: dict[str, Markup]
    narrow: dict[str, Markup]


def render_diagnosis(found: Diagnosis) -> str:
    """Return the page; it needs no network and no scripts."""
    machine = found.machine
    placements = {place.placement for place in found.placements}
    return render_page(
        "diagnosis.html",
        found=found,
        groups=findings(found),
        headlines=_headlines(found),
        views=[_view(found, place) for place in found.placements],
        is_cut=bool(placements - {Placement.DECODER_SELF}),
        is_causal=Placement.DECODER_SELF in placements,
        has_gate=any(layer.gate for place in found.placements for layer in place.active),
        has_empty=any(len(place.active) < len(place.layers) for place in found.placements),
        ends_early=any(place.points[-1].texts < found.texts for place in found.placements),
        measured=_measured(found),
        machine=flat_facts({"cpu": machine.cpu, "cores": machine.cores, "accelerator": machine.accelerator}),
        versions=flat_facts(machine.versions),
    )


def _view(found: Diagnosis, place: PlacementDiagnosis) -> _View:
    # Markup: these SVGs are made here from numbers alone; nothing in them was typed by anyone.
    name = place.placement.replace("_", "-")
    return _View(
        title=title(found, place.placement),
        counted=_counted(place),
        wide={key: Markup(draw(found, place, name=f"{name}-{key}")) for key, draw in _DRAWINGS.items()},
        narrow={
            key: Markup(draw(found, place, name=f"{name}-{key}-narrow", width=_NARROW_INCHES))
            for key, draw in _DRAWINGS.items()
        },
    )


def _counted(place: PlacementDiagnosis) -> str:
    if place.placement is Placement.DECODER_SELF:
        return f"the first {place.within} tokens of each text"
    if place.placement is Placement.ENCODER_SELF:
        return f"texts cut at {place.within} tokens"
    return f"what is written beside sources cut at {place.within} tokens"


def _headlines(found: Diagnosis) -> list[Headline]:
    if len(found.placements) == 1:
        return _single(found.placements[0])
    return [_one_of_several(found, place) for place in found.placements]


def _single(place: PlacementDiagnosis) -> list[Headline]:
    first, last = place.points[0], place.points[-1]
    where, beginning = at(place.placement, last), at(place.placement, first)
    written = "a token that is written" if place.placement is Placement.CROSS else "a token of text"
    return [
        Headline(
            "Attention on the prefix",
            percent(place.share),
            [Fact("if spread evenly", percent(place.uniform))],
            f"of what {written} gives away, over {_counted(place)}",
        ),
        Headline(
            where[0].upper() + where[1:],
            percent(place.by_length[-1]),
            [
                Fact(beginning, percent(place.by_length[0])),
                Fact(f"evenly, at {last.last}", percent(place.uniform_by_length[-1])),
            ],
            "the longer the text, the more there is to look at beside the prefix",
        ),
        Headline(
            "Heads that ignore it",
            f"{ignoring_heads(place):,}",
            [Fact("of all heads", f"{num_heads(place):,}")],
            f"a head ignores the prefix if it gives it less than {IGNORES:.0%} of its attention",
        ),
    ]


def _one_of_several(found: Diagnosis, place: PlacementDiagnosis) -> Headline:
    first, last = place.points[0], place.points[-1]
    return Headline(
        title(found, place.placement),
        percent(place.share),
        [
            Fact("if spread evenly", percent(place.uniform)),
            Fact(at(place.placement, first), percent(place.by_length[0])),
            Fact(at(place.placement, last), percent(place.by_length[-1])),
            Fact(f"heads under {IGNORES:.0%}", f"{ignoring_heads(place):,} of {num_heads(place):,}"),
        ],
        f"of its attention on the prefix, over {_counted(place)}",
    )


def _measured(found: Diagnosis) -> list[Fact]:
    longest = max(found.placements, key=lambda place: place.points[-1].last).points[-1]
    return [
        Fact("base model", found.base),
        Fact("prefix hash", found.prefix_hash),
        Fact("held-out texts", f"{found.texts:,} of {found.source}"),
        Fact("longest point", f"{longest.last:,} tokens, {longest.texts:,} texts"),
        Fact("number format", found.dtype),
        Fact("attention", found.attention),
    ]
