"""A measurement of attention mass summed up: layers, points of the curves, virtual tokens, rounded for a file."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prefixkit.compat import implementation_of
from prefixkit.config import Placement
from prefixkit.evaluation.attention_mass import AttentionMass
from prefixkit.evaluation.attention_meter import PlacementMass, SiteMass
from prefixkit.lab.diagnosis.record import Diagnosis, LayerDiagnosis, Lengths, PlacementDiagnosis, VirtualToken
from prefixkit.models import Base
from prefixkit.models.hardware import describe_machine
from prefixkit.prefix import Prefix

#: Every length up to this has a point of its own on a decoder's curves; above, there are so many points per doubling.
_SINGLE, _PER_DOUBLING = 16, 8


def diagnose(base: Base, prefix: Prefix, mass: AttentionMass, *, name: str, source: str, texts: int) -> Diagnosis:
    """Sum a measurement up.

    Args:
        base: the model that was measured.
        prefix: what it read.
        mass: the measurement.
        name: of the run.
        source: where the texts come from.
        texts: how many were read.
    """
    measured = tuple(found.placement for found in mass.placements)
    return Diagnosis(
        name=name,
        base=base.id,
        prefix_hash=prefix.card.content_hash,
        source=source,
        texts=texts,
        placements=tuple(_placement(prefix, found) for found in mass.placements),
        without=tuple(placement for placement in mass.geometry.placements if placement not in measured),
        dtype=str(base.dtype).removeprefix("torch."),
        attention=implementation_of(base.model),
        machine=describe_machine(),
    )


def _placement(prefix: Prefix, found: PlacementMass) -> PlacementDiagnosis:
    points = _points(found)
    own = [(site, states) for site, states in zip(prefix.states.geometry.sites, prefix.states.sites, strict=True)
           if site.placement is found.placement]  # fmt: skip
    layers = tuple(
        LayerDiagnosis(
            layer=site.layer,
            num_virtual_tokens=states.length,
            share=_round(mass.mean),
            uniform=_round(mass.uniform),
            heads=_rounded(mass.heads),
            by_length=_curve(mass.by_length, found, points),
            gate=() if states.gate is None else _rounded(states.gate),
        )
        for (site, states), mass in zip(own, found.sites, strict=True)
    )
    active = [mass for mass in found.sites if len(mass.tokens)]
    return PlacementDiagnosis(
        placement=found.placement,
        within=found.within,
        share=_round(_mean([mass.mean for mass in active])),
        uniform=_round(_mean([mass.uniform for mass in active])),
        points=points,
        by_length=_curve(torch.stack([mass.by_length for mass in active]).mean(0), found, points),
        uniform_by_length=_curve(torch.stack([mass.uniform_by_length for mass in active]).mean(0), found, points),
        layers=layers,
        virtual_tokens=_virtual_tokens(active),
    )


def _points(found: PlacementMass) -> tuple[Lengths, ...]:
    """Cut the lengths into points.

    Where every length was measured, neighbours share a point, and lengths that fewer than half of the texts reach are
    left out; where texts were cut to a few lengths, each is a point.
    """
    texts = found.texts.tolist()
    if found.placement is not Placement.DECODER_SELF:
        return tuple(Lengths(length, length, count) for length, count in zip(found.lengths, texts, strict=True))
    most = sum(2 * count >= texts[0] for count in texts)
    ends: list[int] = [n for n in range(1, most + 1) if n <= _SINGLE]
    while ends[-1] < most:
        end = min(most, max(ends[-1] + 1, round(ends[-1] * 2 ** (1 / _PER_DOUBLING))))
        ends.append(found.within if ends[-1] < found.within < end else end)  # no point mixes trained lengths and others
    starts = [1, *(end + 1 for end in ends[:-1])]
    return tuple(Lengths(first, last, texts[last - 1]) for first, last in zip(starts, ends, strict=True))


def _curve(values: Float[Tensor, "s"], found: PlacementMass, points: Sequence[Lengths]) -> tuple[float, ...]:
    """Return the mean at each point, every token of every text counting the same."""
    spans = [slice(found.lengths.index(point.first), found.lengths.index(point.last) + 1) for point in points]
    return tuple(
        _round(float((values[span] * found.texts[span]).sum() / found.texts[span].sum())) for span in spans
    )  # fmt: skip


def _virtual_tokens(active: Sequence[SiteMass]) -> tuple[VirtualToken, ...]:
    tokens = []
    for index in range(max(len(found.tokens) for found in active)):
        having = [found for found in active if len(found.tokens) > index]
        tokens.append(
            VirtualToken(
                index=index,
                share=_round(sum(float(found.tokens[index]) for found in having) / len(active)),
                key_norm=_round(_mean([float(found.key_norms[index]) for found in having])),
                value_norm=_round(_mean([float(found.value_norms[index]) for found in having])),
            )
        )
    return tuple(tokens)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(_round(float(value)) for value in values)


def _round(value: float) -> float:
    """Five digits: more than texts chosen by chance justify, and short in a file."""
    return float(f"{value:.5g}")
