"""The page of a diagnosis: what `prefixkit diagnose` leaves for people."""

from markupsafe import Markup

from prefixkit.lab.diagnosis import Diagnosis
from prefixkit.lab.diagnosis_plots import dilution_plot, heat_map, token_plot
from prefixkit.lab.facts import Fact, flat_facts
from prefixkit.lab.findings import IGNORES, findings, ignoring_heads, num_heads, percent
from prefixkit.lab.pages import render_page
from prefixkit.lab.report import Headline

_DRAWINGS = {"heat": heat_map, "dilution": dilution_plot, "tokens": token_plot}
_NARROW_INCHES = 4.4


def render_diagnosis(found: Diagnosis) -> str:
    """Return the page; it needs no network and no scripts."""
    # Markup: these SVGs are made here from numbers alone; nothing in them was typed by anyone.
    wide = {key: Markup(draw(found, name=key)) for key, draw in _DRAWINGS.items()}
    narrow = {
        key: Markup(draw(found, name=f"{key}-narrow", width=_NARROW_INCHES)) for key, draw in _DRAWINGS.items()
    }  # fmt: skip
    machine = found.machine
    return render_page(
        "diagnosis.html",
        found=found,
        sentences=findings(found),
        headlines=_headlines(found),
        wide=wide,
        narrow=narrow,
        has_gate=any(layer.gate for layer in found.layers),
        measured=_measured(found),
        machine=flat_facts({"cpu": machine.cpu, "cores": machine.cores, "accelerator": machine.accelerator}),
        versions=flat_facts(machine.versions),
    )


def _headlines(found: Diagnosis) -> list[Headline]:
    first, last = found.points[0], found.points[-1]
    return [
        Headline(
            "Attention on the prefix",
            percent(found.share),
            [Fact("if spread evenly", percent(found.uniform))],
            f"of what a token of text gives away, over the first {found.within} tokens of a text",
        ),
        Headline(
            f"At token {last.last}",
            percent(found.by_length[-1]),
            [
                Fact(f"at token {first.last}", percent(found.by_length[0])),
                Fact(f"evenly, at {last.last}", percent(found.uniform_by_length[-1])),
            ],
            "the longer the text, the more there is to look at beside the prefix",
        ),
        Headline(
            "Heads that ignore it",
            f"{ignoring_heads(found):,}",
            [Fact("of all heads", f"{num_heads(found):,}")],
            f"a head ignores the prefix if it gives it less than {IGNORES:.0%} of its attention",
        ),
    ]


def _measured(found: Diagnosis) -> list[Fact]:
    return [
        Fact("base model", found.base),
        Fact("prefix hash", found.prefix_hash),
        Fact("held-out texts", f"{found.texts:,} of {found.source}"),
        Fact("longest point", f"{found.points[-1].last:,} tokens, {found.points[-1].texts:,} texts"),
        Fact("number format", found.dtype),
        Fact("attention", found.attention),
    ]
