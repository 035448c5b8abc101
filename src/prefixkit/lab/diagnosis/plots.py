"""The pictures of a diagnosis as inline SVG: attention by layer and head, by text length, and by virtual token.

Each shows one placement; those of several have the same colours and scales, so that they can be compared.
The heat map's colours (cividis) differ in lightness throughout, so that they are told apart by everyone, and in print.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from prefixkit.config import Placement
from prefixkit.lab.diagnosis.findings import percent, title
from prefixkit.lab.diagnosis.record import Diagnosis, LayerDiagnosis, PlacementDiagnosis
from prefixkit.lab.pages.plots import FAINT, INSTRUCTION, PREFIX, STYLE, to_svg

_LIMIT_HEADS_HEIGHT = 4.5
_LENGTH = {
    Placement.DECODER_SELF: "tokens of text read",
    Placement.ENCODER_SELF: "length of the text, tokens",
    Placement.CROSS: "length of the source, tokens",
}


def heat_map(found: Diagnosis, place: PlacementDiagnosis, *, name: str, width: float = 9.6) -> str:
    """Draw each head's share by layer, and above it the mean of each layer; layers without virtual tokens stay empty.

    Args:
        found: the diagnosis.
        place: the placement drawn.
        name: put before every id in the SVG.
        width: inches.
    """
    heads = max(len(layer.heads) for layer in place.layers)
    shares = np.full((heads, len(place.layers)), np.nan)
    for column, layer in enumerate(place.layers):
        if layer.num_virtual_tokens:
            shares[: len(layer.heads), column] = layer.heads
    every = [share for layer in _all_layers(found) for share in layer.heads]
    with rc_context(STYLE):
        height = min(_LIMIT_HEADS_HEIGHT, 0.16 * heads + 0.4)
        figure = Figure(figsize=(width, height + 1.7), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.1, height))
        means = [layer.share for layer in place.layers]
        top.bar(range(len(means)), means, color=PREFIX, width=0.8)
        top.plot([layer.uniform if layer.num_virtual_tokens else np.nan for layer in place.layers],
                 color=FAINT, linestyle=(0, (2, 2)), linewidth=1.2)  # fmt: skip
        top.set(title="mean of each layer; dashed: if spread evenly")
        _share_scale(top, found, [max(layer.share, layer.uniform) for layer in _all_layers(found)])
        top.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        top.yaxis.set_major_locator(MaxNLocator(nbins=3))
        image = bottom.imshow(
            shares, cmap="cividis", aspect="auto", interpolation="none",
            vmin=min(0.0, *every), vmax=max(0.01, *every),
        )  # fmt: skip
        bottom.grid(visible=False)
        bottom.set(xlabel="layer", ylabel="head")
        for spine in bottom.spines.values():
            spine.set_visible(False)
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16 if width > 6 else 8))
        bottom.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        bar = figure.colorbar(image, ax=bottom, pad=0.015, aspect=14, format=PercentFormatter(1, decimals=0))
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
        return to_svg(figure, name, _label("Share of attention on the prefix, by layer and head", found, place))


def dilution_plot(found: Diagnosis, place: PlacementDiagnosis, *, name: str, width: float = 9.6) -> str:
    """Draw the share against text length: the mean over layers, every layer faintly, and the even spread."""
    lengths = [point.middle for point in place.points]
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for layer in place.active:
            axes.plot(lengths, layer.by_length, color=PREFIX, alpha=0.22, linewidth=0.9)
        axes.plot(lengths, place.by_length, color=PREFIX, linewidth=2.4)
        if place.placement is not Placement.DECODER_SELF:  # the lengths texts were cut to
            axes.plot(lengths, place.by_length, "o", color=PREFIX, markersize=5.5, clip_on=False)
        axes.plot(lengths, place.uniform_by_length, color=FAINT, linestyle=(0, (2, 2)), linewidth=1.4)
        if len(lengths) > 1:
            axes.set_xscale("log")
            axes.set_xlim(lengths[0], place.points[-1].last)
        ticks = [2**power for power in range(place.points[-1].last.bit_length())]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set(xlabel=_LENGTH[place.placement], ylabel="share of attention on the prefix")
        axes.set_ylim(bottom=min(0.0, *(min(layer.by_length) for layer in place.active)))
        evenly = [share for each in found.placements for share in each.uniform_by_length]
        _share_scale(axes, found, [*evenly, *(share for layer in _all_layers(found) for share in layer.by_length)])
        if place.within < place.points[-1].last:
            _mark_trained(axes, place.within)
        _name_lines(axes, place)
        return to_svg(figure, name, _label("Share of attention on the prefix against text length", found, place))


def token_plot(found: Diagnosis, place: PlacementDiagnosis, *, name: str, width: float = 9.6) -> str:
    """Draw what each virtual token gets, and how long its key and value are beside the text's."""
    numbers = [token.index for token in place.virtual_tokens]
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 3.9), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.2, 1))
        top.bar(numbers, [token.share for token in place.virtual_tokens], color=PREFIX, width=0.7)
        top.set(title="share of attention")
        top.yaxis.set_major_formatter(lambda value, _: percent(value))
        top.yaxis.set_major_locator(MaxNLocator(nbins=4))
        keys, values = ([getattr(t, part) for t in place.virtual_tokens] for part in ("key_norm", "value_norm"))
        bottom.axhline(1, color=FAINT, linewidth=0.9, linestyle=(0, (2, 2)))
        bottom.plot(numbers, keys, "o", color=PREFIX, markersize=6, label="key")
        bottom.plot(numbers, values, "D", color=INSTRUCTION, markersize=5, label="value")
        bottom.set(title="length beside the text's, which is 1", xlabel="virtual token")
        bottom.set_ylim(0, 1.15 * max(1.0, *keys, *values))
        bottom.yaxis.set_major_locator(MaxNLocator(nbins=4))
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20 if width > 6 else 8))
        bottom.legend(loc="upper right", ncols=2, borderaxespad=0, bbox_to_anchor=(1, 1.28))
        return to_svg(
            figure, name, _label("Attention on each virtual token, and the lengths of its key and value", found, place)
        )


def _label(words: str, found: Diagnosis, place: PlacementDiagnosis) -> str:
    """Name the placement too where there is another."""
    return ": ".join(filter(None, (title(found, place.placement), words)))


def _all_layers(found: Diagnosis) -> list[LayerDiagnosis]:
    """Return the layers that have virtual tokens, of all placements."""
    return [layer for place in found.placements for layer in place.active]


def _share_scale(axes: Axes, found: Diagnosis, shares: Sequence[float]) -> None:
    """Give the pictures of several placements one scale, on which all shares have room."""
    if len(found.placements) > 1:
        axes.set_ylim(min(0.0, *shares), 1.05 * max(0.01, *shares))


def _mark_trained(axes: Axes, within: int) -> None:
    axes.axvline(within, color=INSTRUCTION, linewidth=1)
    axes.annotate(
        "training went this far", (within, 1), xycoords=("data", "axes fraction"), xytext=(5, -3),
        textcoords="offset points", va="top", color=INSTRUCTION,
    )  # fmt: skip


def _name_lines(axes: Axes, place: PlacementDiagnosis) -> None:
    """Say at their right ends which line is which; no legend to look up."""
    bottom, top = axes.get_ylim()
    mean, even = ((value - bottom) / (top - bottom) for value in (place.by_length[-1], place.uniform_by_length[-1]))
    lower = max(0.08, min(mean, even))
    upper = max(lower + 0.2, mean, even)  # the names do not run into each other
    for value, words, colour, height in (
        (place.by_length[-1], "mean of\nlayers", PREFIX, upper if mean >= even else lower),
        (place.uniform_by_length[-1], "if spread\nevenly", FAINT, lower if mean >= even else upper),
    ):
        axes.annotate(
            f"{words}\n{percent(value)}", (1, height), xycoords="axes fraction", xytext=(6, 0),
            textcoords="offset points", va="center", color=colour, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
