"""A diagnosis in plain words: one sentence per finding, for the terminal and the page."""

from prefixkit.lab.diagnosis import Diagnosis

#: A head that gives the prefix less than this of its attention is said to ignore it.
IGNORES = 0.01
#: A value is said to be short below this many times the text's.
SHORT = 2 / 3


def findings(found: Diagnosis) -> list[str]:
    """Return what was found, the most important first."""
    return [
        *_overall(found),
        *_layers(found),
        *_heads(found),
        *_dilution(found),
        *_virtual_tokens(found),
        *_gates(found),
    ]


def percent(share: float) -> str:
    """Write a share the way it is read: 41%, 3.2%, 0.05%."""
    size = abs(100 * share)
    return f"{100 * share:.{0 if size >= 9.95 or size == 0 else 1 if size >= 0.1 else 2}f}%"


def ignoring_heads(found: Diagnosis) -> int:
    """Return how many heads of layers with virtual tokens give the prefix less than 1% of their attention."""
    return sum(abs(share) < IGNORES for layer in found.active for share in layer.heads)


def num_heads(found: Diagnosis) -> int:
    """Return how many heads those layers have."""
    return sum(len(layer.heads) for layer in found.active)


def _overall(found: Diagnosis) -> list[str]:
    beside = "more" if found.share > found.uniform else "less"
    return [
        f"A token of text gives the prefix {percent(found.share)} of its attention, {beside} than the "
        f"{percent(found.uniform)} it would give if it spread it evenly over everything in sight."
    ]


def _layers(found: Diagnosis) -> list[str]:
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


def _heads(found: Diagnosis) -> list[str]:
    shares = [share for layer in found.active for share in layer.heads]
    devoted = sum(share > 0.5 for share in shares)
    return [
        f"Of {len(shares)} heads, {ignoring_heads(found) or 'none'} ignore it (under {IGNORES:.0%}), and "
        f"{devoted or 'none'} give it more than half of their attention."
    ]


def _dilution(found: Diagnosis) -> list[str]:
    points = [found.points.index(point) for point in found.points if point.last <= found.within]
    trained, end = max(points, default=0), len(found.points) - 1
    if end == 0:
        return []
    steps = [f"{percent(found.by_length[0])} for the first token of a text"]
    if 0 < trained < end:
        steps.append(
            f"{percent(found.by_length[trained])} at token {found.points[trained].last}, as far as training went"
        )
    last = f"{percent(found.by_length[end])} at token {found.points[end].last}"
    steps.append(f"{last} (evenly spread: {percent(found.uniform_by_length[end])})")
    verb = "falls as the text grows" if found.by_length[end] < found.by_length[0] else "does not fall as the text grows"
    return [f"Its share {verb}: {', '.join(steps)}."]


def _virtual_tokens(found: Diagnosis) -> list[str]:
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


def _gates(found: Diagnosis) -> list[str]:
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
