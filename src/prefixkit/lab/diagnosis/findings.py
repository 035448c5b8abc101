"""A diagnosis in plain words: one sentence per finding, placement by placement, for the terminal and the page."""

from dataclasses import dataclass

from prefixkit.config import Placement
from prefixkit.lab.diagnosis.record import Diagnosis, Lengths, PlacementDiagnosis
from prefixkit.lab.inspection import STACK_NAMES

#: A head that gives the prefix less than this of its attention is said to ignore it.
IGNORES = 0.01
#: A value is said to be short below this many times the text's.
SHORT = 2 / 3


@dataclass(frozen=True)
class Findings:
    """What was found in one placement, the most important first."""

    title: str
    """Names the placement; empty where the model has no other."""
    sentences: tuple[str, ...]


def findings(found: Diagnosis) -> tuple[Findings, ...]:
    """Return what was found, placement by placement; those without virtual tokens come last."""
    measured = [Findings(title(found, place.placement), tuple(_sentences(place))) for place in found.placements]
    without = [Findings(title(found, placement), ("It has no virtual tokens.",)) for placement in found.without]
    return (*measured, *without)


def lines(found: Diagnosis) -> list[str]:
    """Return what was found line by line, sentences behind the name of their placement."""
    told = []
    for group in findings(found):
        told += [f"{group.title}:"] if group.title else []
        told += [f"  {sentence}" if group.title else sentence for sentence in group.sentences]
    return told


def title(found: Diagnosis, placement: Placement) -> str:
    """Return the name of a placement; nothing where the model has no other to tell it from."""
    name = STACK_NAMES[placement]
    return name[0].upper() + name[1:] if len(found.placements) + len(found.without) > 1 else ""


def percent(share: float) -> str:
    """Write a share the way it is read: 41%, 3.2%, 0.05%."""
    size = abs(100 * share)
    return f"{100 * share:.{0 if size >= 9.95 or size == 0 else 1 if size >= 0.1 else 2}f}%"


def ignoring_heads(found: PlacementDiagnosis) -> int:
    """Return how many heads of layers with virtual tokens give the prefix less than 1% of their attention."""
    return sum(abs(share) < IGNORES for layer in found.active for share in layer.heads)


def num_heads(found: PlacementDiagnosis) -> int:
    """Return how many heads those layers have."""
    return sum(len(layer.heads) for layer in found.active)


def at(placement: Placement, point: Lengths) -> str:
    """Say where on a curve a point is."""
    if placement is Placement.DECODER_SELF:
        return f"at token {point.last}"
    where = "beside sources of" if placement is Placement.CROSS else "in texts of"
    return f"{where} {point.last} token{'' if point.last == 1 else 's'}"


def _sentences(found: PlacementDiagnosis) -> list[str]:
    return [
        *_overall(found),
        *_layers(found),
        *_heads(found),
        *_dilution(found),
        *_virtual_tokens(found),
        *_gates(found),
    ]


def _overall(found: PlacementDiagnosis) -> list[str]:
    share, evenly = percent(found.share), percent(found.uniform)
    beside = f"{'more' if found.share > found.uniform else 'less'} than the {evenly}"
    if share == evenly:
        beside = "as much as"
    who, what = "A token of text", "its attention"
    if found.placement is Placement.CROSS:
        who, what = "A token that is written", "its attention to the source"
    return [
        f"{who} gives the prefix {share} of {what}, {beside} it would give if it spread it evenly over everything in "
        "sight."
    ]


def _layers(found: PlacementDiagnosis) -> list[str]:
    sentences = []
    if len(found.active) > 1:
        most = max(found.active, key=lambda layer: layer.share)
        least = min(found.active, key=lambda layer: layer.share)
        sentences.append(
            f"Layer {most.layer} gives the prefix most, {percent(most.share)} of its attention; "
            f"layer {least.layer} least, {percent(least.share)}."
        )
    without = len(found.layers) - len(found.active)
    if without:
        sentences.append(f"{without} of {len(found.layers)} layers have no virtual tokens.")
    return sentences


def _heads(found: PlacementDiagnosis) -> list[str]:
    shares = [share for layer in found.active for share in layer.heads]
    devoted = sum(share > 0.5 for share in shares)
    return [
        f"Of {len(shares)} heads, {ignoring_heads(found) or 'none'} ignore it (under {IGNORES:.0%}), and "
        f"{devoted or 'none'} give it more than half of their attention."
    ]


def _dilution(found: PlacementDiagnosis) -> list[str]:
    points = [found.points.index(point) for point in found.points if point.last <= found.within]
    trained, end = max(points, default=0), len(found.points) - 1
    if end == 0:
        return []
    first = "for the first token of a text"
    if found.placement is not Placement.DECODER_SELF:
        first = at(found.placement, found.points[0])
    steps = [f"{percent(found.by_length[0])} {first}"]
    if 0 < trained < end:
        where = at(found.placement, found.points[trained])
        steps.append(f"{percent(found.by_length[trained])} {where}, as far as training went")
    last = f"{percent(found.by_length[end])} {at(found.placement, found.points[end])}"
    steps.append(f"{last} (evenly spread: {percent(found.uniform_by_length[end])})")
    verb = "falls" if found.by_length[end] < found.by_length[0] else "does not fall"
    grows = "source" if found.placement is Placement.CROSS else "text"
    return [f"Its share {verb} as the {grows} grows: {', '.join(steps)}."]


def _virtual_tokens(found: PlacementDiagnosis) -> list[str]:
    tokens = sorted(found.virtual_tokens, key=lambda token: -token.share)
    whole = sum(token.share for token in tokens)
    if len(tokens) < 2 or tokens[-1].share < 0 or not whole:
        return []
    first, half, total = tokens[0], 0, 0.0
    while total < whole / 2:
        total += tokens[half].share
        half += 1
    alone = f"{percent(first.share / whole)} of what the prefix gets"
    sentences = [
        f"Virtual token {first.index} alone takes {alone}; the other {len(tokens) - 1} get "
        f"{percent(whole - first.share)} of the attention together."
        if half == 1
        else f"{half} of its {len(tokens)} virtual tokens take half of what the prefix gets; number {first.index} "
        f"most, {percent(first.share / whole)} of it."
    ]
    if half == 1 and first.value_norm < SHORT:
        sentences.append(
            f"Its value is only {first.value_norm:.2f} times as long as the text's: much of this is probably attention "
            "that has nothing to look for and is put where little comes of it."
        )
    keys, values = ([getattr(token, part) for token in tokens] for part in ("key_norm", "value_norm"))
    sentences.append(
        f"The virtual tokens' keys are {_range(keys)} times as long as the text's, their values {_range(values)} times."
    )
    return sentences


def _gates(found: PlacementDiagnosis) -> list[str]:
    gates = [gate for layer in found.active for gate in layer.gate]
    if not gates:
        return []
    span = f"{percent(min(gates))} to {percent(max(gates))}"
    beyond = sum(not 0 <= gate <= 1 for gate in gates)
    sentences = [f"The gates let {span} of the prefixed attention through; the shares contain that."]
    if beyond:
        sentences.append(
            f"{beyond} of {len(gates)} gates lie outside 0 to 1, where a share can be negative or more than everything."
        )
    return sentences


def _range(values: list[float]) -> str:
    low, high = (f"{value:.2f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
