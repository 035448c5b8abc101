"""Diagnosing a trained prefix: how much attention it gets, where, from how far, and what its virtual tokens are like.

See docs/diagnose.md for what the numbers mean.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from prefixkit.compat import implementation_of
from prefixkit.config import DataConfig, Placement
from prefixkit.data import Example, heldout_texts
from prefixkit.errors import ArtefactError, EvaluationError
from prefixkit.evaluation.attention_mass import AttentionMass, SiteMass, measure_mass, require_decoder
from prefixkit.files import write_json, write_text
from prefixkit.lab.folder import DIAGNOSIS, DIAGNOSIS_PAGE, RECIPE
from prefixkit.lab.run import Report, load_run_base
from prefixkit.models import Base
from prefixkit.models.hardware import Machine, describe_machine
from prefixkit.prefix import Prefix

#: Tokens of text to look at where nothing else is asked for: well beyond what is usually trained on.
_TOKENS = 512
#: Every length up to this has a point of its own on the curves; above, there are so many points per doubling.
_SINGLE, _PER_DOUBLING = 16, 8


@dataclass(frozen=True)
class Lengths:
    """A point of the curves: text lengths from `first` to `last`, and how many texts are at least that long."""

    first: int
    last: int
    texts: int

    @property
    def middle(self) -> float:
        """Where the point stands on an axis."""
        return (self.first + self.last) / 2


@dataclass(frozen=True)
class LayerDiagnosis:
    """One attention layer; shares are of a text token's attention, between 0 and 1."""

    placement: Placement
    layer: int
    num_virtual_tokens: int
    share: float
    """What the prefix gets, mean over heads and the text tokens counted."""
    uniform: float
    """What it would get if all keys got the same."""
    heads: tuple[float, ...]
    """What it gets per query head."""
    by_length: tuple[float, ...]
    """What it gets at each point of the curves."""
    gate: tuple[float, ...]
    """Per query head; empty without a gate."""


@dataclass(frozen=True)
class VirtualToken:
    """One virtual token, over the layers that have it."""

    index: int
    share: float
    """Its part of `Diagnosis.share`; these add up to it."""
    key_norm: float
    """Length of its key, in units of the mean text key's."""
    value_norm: float
    """Length of its value, in units of the mean text value's."""


@dataclass(frozen=True)
class Diagnosis:
    """What was found out about a prefix."""

    name: str
    base: str
    prefix_hash: str
    source: str
    """Where the held-out texts come from."""
    texts: int
    within: int
    """Layers, heads and virtual tokens are means over the first so many tokens of each text: the length trained on."""
    share: float
    """What the prefix gets, mean over the layers that have virtual tokens."""
    uniform: float
    points: tuple[Lengths, ...]
    by_length: tuple[float, ...]
    """`share` at each point."""
    uniform_by_length: tuple[float, ...]
    layers: tuple[LayerDiagnosis, ...]
    virtual_tokens: tuple[VirtualToken, ...]
    dtype: str
    attention: str
    machine: Machine

    @property
    def active(self) -> tuple[LayerDiagnosis, ...]:
        """The layers that have virtual tokens."""
        return tuple(layer for layer in self.layers if layer.num_virtual_tokens)


@dataclass(frozen=True)
class DiagnosedRun:
    """A diagnosis and the files it was written to."""

    diagnosis: Diagnosis
    record: Path
    page: Path


def diagnose_run(
    folder: Path, *, rows: int = 16, tokens: int | None = None, out: Path | None = None, report: Report
) -> DiagnosedRun:
    """Diagnose a trained prefix on held-out texts of its own recipe; write ``diagnosis.json`` and ``.html``.

    Args:
        folder: a run folder, or an artefact a run left.
        rows: most texts to read.
        tokens: length of text to look at; left out, 512 or the length trained on, where texts and context allow.
        out: folder to write into; the run's own if left out.
        report: told about progress.

    Raises:
        ArtefactError: the folder is no artefact that knows its recipe, or belongs to another base model.
        EvaluationError: no text is as long as `tokens`, or the context is too short for it; or the base model is no
            decoder-only one; or `out` is a file.
        DataError: the recipe's data cannot be read.
    """
    from prefixkit.lab.diagnosis_page import render_diagnosis

    if not (folder / RECIPE).is_file() and Prefix.load(folder).card.training is None:
        raise ArtefactError(
            f"{folder}: holds no recipe, so there are no held-out texts to read; diagnose a run or what it left"
        )
    if out is not None and out.exists() and not out.is_dir():
        raise EvaluationError(f"--out: {out} is a file; give a folder")
    base, prefix, recipe = load_run_base(folder)
    require_decoder(base)
    examples = choose_texts(base, prefix, recipe.data, rows=rows, tokens=tokens)
    mass = measure_mass(
        base,
        prefix,
        examples,
        within=recipe.data.max_tokens,
        on_progress=lambda done, total: report("diagnosing", done, total, "texts read"),
    )
    found = diagnose(base, prefix, mass, name=recipe.name, source=recipe.data.source, texts=len(examples))
    record, page = (out or folder) / DIAGNOSIS, (out or folder) / DIAGNOSIS_PAGE
    write_json(record, asdict(found))
    write_text(page, render_diagnosis(found))
    return DiagnosedRun(found, record, page)


def read_diagnosis(path: Path) -> Diagnosis:
    """Read a ``diagnosis.json``.

    Raises:
        EvaluationError: there is none, or it is damaged or of another version.
    """
    try:
        return TypeAdapter(Diagnosis).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise EvaluationError(f"{path}: no diagnosis of this version; run `prefixkit diagnose`") from None


def choose_texts(
    base: Base, prefix: Prefix, config: DataConfig, *, rows: int, tokens: int | None
) -> tuple[Example, ...]:
    """Return held-out texts to read, all of them `tokens` long if that was asked for.

    Raises:
        EvaluationError: `tokens` are more than the context holds, or than any held-out text has.
    """
    limit = base.context_tokens
    room = None if limit is None else limit - prefix.position_offset
    wanted = max(_TOKENS, config.max_tokens) if tokens is None else tokens
    if room is not None and wanted > room:
        if tokens is not None:
            raise EvaluationError(
                f"--tokens: prefix {prefix.position_offset} + text {tokens} exceed the model's context of {limit}; "
                f"give at most {room}"
            )
        wanted = room
    found = heldout_texts(config, base.tokenizer, max_tokens=wanted, count=rows)
    if tokens is None:
        return found
    whole = tuple(example for example in found if len(example.input_ids) == tokens)
    if not whole:
        longest = len(found[0].input_ids)
        raise EvaluationError(
            f"--tokens: no held-out text of {config.source} has {tokens} tokens, the longest has {longest}; "
            f"give at most {longest}"
        )
    return whole


def diagnose(base: Base, prefix: Prefix, mass: AttentionMass, *, name: str, source: str, texts: int) -> Diagnosis:
    """Sum a measurement up: layers, points of the curves, virtual tokens."""
    points = _points(mass)
    layers = tuple(
        LayerDiagnosis(
            placement=site.placement,
            layer=site.layer,
            num_virtual_tokens=states.length,
            share=_round(found.mean),
            uniform=_round(found.uniform),
            heads=_rounded(found.heads),
            by_length=_curve(found.by_length, mass, points),
            gate=() if states.gate is None else _rounded(states.gate),
        )
        for site, states, found in zip(mass.geometry.sites, prefix.states.sites, mass.sites, strict=True)
    )
    active = [found for found in mass.sites if len(found.tokens)]
    return Diagnosis(
        name=name,
        base=base.id,
        prefix_hash=prefix.card.content_hash,
        source=source,
        texts=texts,
        within=mass.within,
        share=_round(_mean([found.mean for found in active])),
        uniform=_round(_mean([found.uniform for found in active])),
        points=points,
        by_length=_curve(torch.stack([found.by_length for found in active]).mean(0), mass, points),
        uniform_by_length=_curve(torch.stack([found.uniform_by_length for found in active]).mean(0), mass, points),
        layers=layers,
        virtual_tokens=_virtual_tokens(active),
        dtype=str(base.dtype).removeprefix("torch."),
        attention=implementation_of(base.model),
        machine=describe_machine(),
    )


def _points(mass: AttentionMass) -> tuple[Lengths, ...]:
    """Cut the lengths into points; lengths that fewer than half of the texts reach are left out."""
    texts = mass.texts.tolist()
    most = sum(2 * count >= texts[0] for count in texts)
    ends: list[int] = [n for n in range(1, most + 1) if n <= _SINGLE]
    while ends[-1] < most:
        end = min(most, max(ends[-1] + 1, round(ends[-1] * 2 ** (1 / _PER_DOUBLING))))
        ends.append(mass.within if ends[-1] < mass.within < end else end)  # no point mixes trained lengths and others
    starts = [1, *(end + 1 for end in ends[:-1])]
    return tuple(Lengths(first, last, texts[last - 1]) for first, last in zip(starts, ends, strict=True))


def _curve(values: Float[Tensor, "s"], mass: AttentionMass, points: Sequence[Lengths]) -> tuple[float, ...]:
    """Return the mean at each point, every token of every text counting the same."""
    spans = [slice(point.first - 1, point.last) for point in points]
    return tuple(
        _round(float((values[span] * mass.texts[span]).sum() / mass.texts[span].sum())) for span in spans
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
