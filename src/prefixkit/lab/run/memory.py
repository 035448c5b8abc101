"""What a run holds in memory, told before it begins, and settings that fit a budget.

A training step of b rows holds, beside what is in memory already (the frozen weights above all), what the backward pass
needs of every row, and what the backward pass of one layer computes and lets go; or for a moment a chunk of logits and
their gradient:

    peak(b) = held now + b * (kept per row + passing per row) + logits

`kept` is measured on one forward pass of the longest row, layer by layer, by counting what autograd saves, parameters
left out; layers below the lowest prefix keep nothing. Of a layer under gradient checkpointing it is the layer's input;
such layers are the first ones, so that when they run again, what the others kept is gone, and never more than one of
them is there whole. `passing` came out as about four times what a layer keeps. Held-out losses hold a batch of logits,
on top of that: what a training step let go has not gone back to the system. Between training and measuring it is given
back (`give_back_memory`); generating then holds keys and values of every text. A peak of loading is never undone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prefixkit.config import Recipe, TrainConfig
from prefixkit.data import Collator, Example
from prefixkit.errors import ConfigError
from prefixkit.evaluation.loss import MOST_LOGITS
from prefixkit.lab.run.folder import SIZES
from prefixkit.models import Base
from prefixkit.models.fingerprint import weights_hash
from prefixkit.models.hardware import give_back_memory, held_memory_bytes, peak_memory_bytes
from prefixkit.models.inspect import inspect_model, recomputable_layers
from prefixkit.models.weights import input_device
from prefixkit.training.loss import CHUNK
from prefixkit.training.start import build_model

_SLACK = 1.25
"""What allocators hold beyond what was asked for."""
_PASSING = 4
"""What the backward pass of a layer computes and lets go, in terms of what the layer keeps."""
_FEW = 2
"""Rows below which recomputing activations beats still smaller batches."""
_OPTIMISING = 6
"""Copies of what is trained that training holds: a gradient, Adam's moments, the start, the best, those measured."""
_DRAWING = 6
"""Arrays of a row's logits that sampling holds at once: sorted, summed up, their places."""


@dataclass(frozen=True)
class Footprint:
    """What a run holds, in bytes.

    Attributes:
        held: already in memory, the frozen weights included.
        loading: the most that was in memory so far.
        kept: of the longest row in a training step, by each layer that can recompute its activations; none where the
            model cannot.
        elsewhere: of it by everything else.
        inputs: what each of those layers reads of it, 0 where it keeps nothing.
        passing: what a row takes for a moment in the backward pass.
        logits: of a chunk, what the loss makes of them, and their gradient.
        measuring: the most that held-out losses hold for a moment.
        text: what generating holds per text.
    """

    held: int
    loading: int
    kept: tuple[int, ...]
    elsewhere: int
    inputs: tuple[int, ...]
    passing: int
    logits: int
    measuring: int
    text: int

    @property
    def layers(self) -> int:
        """How many layers can recompute their activations."""
        return len(self.kept)

    def row(self, recomputed: int) -> int:
        """Return what a row takes where so many layers' activations, the first ones', are recomputed."""
        again = max(self.kept[:recomputed], default=0)
        whole = max(sum(self.kept[recomputed:]), again)
        return whole + sum(self.inputs[:recomputed]) + self.elsewhere + self.passing

    def peak(self, rows: int, *, recomputed: int, texts: int = 1) -> int:
        """Return the peak of a run that trains on so many rows and generates so many texts at a time.

        Args:
            rows: per forward pass.
            recomputed: layers under gradient checkpointing.
            texts: generated at a time.
        """
        used = max(rows * self.row(recomputed) + self.logits, texts * self.text) + self.measuring
        return max(self.loading, int(self.held + _SLACK * used))

    def recomputed(self, config: TrainConfig) -> int:
        """Return of how many layers a recipe recomputes activations."""
        if not config.gradient_checkpointing:
            return 0
        return self.layers if config.recomputed_layers is None else config.recomputed_layers

    def texts(self, budget: int) -> int:
        """Return how many texts can be generated at a time; one, if even that is too much."""
        room = (budget - self.held) / _SLACK - self.measuring
        return max(1, int(room / self.text)) if self.text else 1


@dataclass(frozen=True)
class Fit:
    """Settings that fit, and the peak they are expected to have, in bytes.

    Attributes:
        batch_size: rows per forward pass.
        accumulation: forward passes per optimiser step.
        recomputed_layers: layers under gradient checkpointing.
        layers: how many could be.
        generation_batch_size: texts generated at a time.
        peak: of memory, in each process.
        processes: that share a batch.
    """

    batch_size: int
    accumulation: int
    recomputed_layers: int
    layers: int
    generation_batch_size: int
    peak: int
    processes: int = 1

    def apply(self, recipe: Recipe) -> Recipe:
        """Return the recipe with these settings."""
        some = self.recomputed_layers if 0 < self.recomputed_layers < self.layers else None
        train = {"batch_size": self.batch_size, "accumulation": self.accumulation,
                 "gradient_checkpointing": self.recomputed_layers > 0, "recomputed_layers": some}  # fmt: skip
        return _with_sizes(recipe, train, {"batch_size": self.generation_batch_size})

    def __str__(self) -> str:
        """Say what was chosen."""
        recomputed = "no gradient checkpointing"
        if self.recomputed_layers:
            recomputed = f"gradient checkpointing of {self.recomputed_layers} of {self.layers} layers"
        each = f" in each of {self.processes} processes" if self.processes > 1 else ""
        return (
            f"memory budget: batches of {self.batch_size} x {self.accumulation}, {recomputed}, "
            f"{self.generation_batch_size} texts generated at a time; expected peak "
            f"{_gigabytes(self.peak, up=True)}{each}"
        )


def measure_footprint(base: Base, examples: Sequence[Example], recipe: Recipe, classes: Sequence[str]) -> Footprint:
    """Measure what the longest row costs.

    Args:
        base: the frozen base model, with nothing attached.
        examples: what is to be learned from.
        recipe: how.
        classes: names of the labels, where labels are learned.
    """
    weights_hash(base.model)  # reads every byte, as training will: weights that are mapped count once they were read
    give_back_memory()  # that loading let go, or it would count as held
    longest = max(examples, key=lambda example: example.num_tokens)
    model, collate = build_model(base, examples, recipe, classes), Collator(base.tokenizer.pad_token_id)
    recomputable = recomputable_layers(base.model)

    def run(rows: int) -> _Saved:
        batch = {name: tensor.to(input_device(base.model)) for name, tensor in collate([longest] * rows).items()}
        with _saved(model.train(), recomputable) as saved, mixed_precision(base, recipe.train):
            model(**batch)
        return saved

    try:
        saved = run(1)
        if recipe.train.autocast or (model.delta is not None and base.dtype.itemsize < 4):
            saved = saved.of_a_row(run(2))
    finally:
        model.close()
    vocabulary, size = base.model.config.get_text_config().vocab_size, base.dtype.itemsize
    tokens = len(longest.input_ids)
    passing = _PASSING * max(saved.kept, default=saved.elsewhere)
    logits = 3 * 4 * vocabulary * CHUNK if model.plain_head else 0  # a chunk, its exponentials and its gradient
    if not classes and not model.plain_head:
        passing += 3 * 4 * vocabulary * tokens  # all of them
    numbers = inspect_model(base.model).geometry.numbers_per_token
    virtual = max(recipe.prefix.layer_lengths or [recipe.prefix.num_virtual_tokens])
    text = virtual + 2 * recipe.data.max_tokens + recipe.generation.max_new_tokens
    trained = sum(number.nbytes for own in model.parts().values() for number in own)
    return Footprint(
        # What this pass leaves behind included: training finds it there.
        held=held_memory_bytes() + _OPTIMISING * trained + saved.fixed,
        loading=peak_memory_bytes(),
        kept=tuple(saved.kept),
        elsewhere=saved.elsewhere,
        inputs=tuple(read if kept else 0 for read, kept in zip(saved.inputs, saved.kept, strict=True)),
        passing=passing,
        logits=logits,
        measuring=0 if classes else size * max(MOST_LOGITS, vocabulary * tokens) + 2 * 4 * vocabulary * tokens,
        text=0 if classes else size * text * numbers + _DRAWING * 4 * vocabulary,
    )


def fit_to_budget(footprint: Footprint, recipe: Recipe, budget: int, *, processes: int = 1) -> Fit:
    """Choose rows per forward pass, in how many layers activations are recomputed, and texts generated at a time.

    Rows per optimiser step stay what the recipe says. Of what fits, the most rows are taken without recomputing; only
    where fewer than two would fit are activations recomputed, in all layers at the cost of about a third more time, and
    then in no more layers than it takes.

    Args:
        footprint: of the recipe's longest row.
        recipe: says how many rows an optimiser step reads.
        budget: of each process, in bytes.
        processes: that share every batch, at least one row for each.

    Raises:
        ConfigError: not even one row, recomputed, fits; the message says what would.
    """
    train, whole = recipe.train, recipe.train.batch_size * recipe.train.accumulation
    sizes = [rows for rows in range(train.batch_size, processes - 1, -1) if whole % rows == 0]
    least, most = footprint.recomputed(train), footprint.layers
    fewest = min(_FEW * processes, train.batch_size) if most else processes
    plain = [] if least else [(rows, 0) for rows in sizes if rows >= fewest]
    recomputing = [(rows, layers) for rows in sizes for layers in range(max(1, least), most + 1)]
    for rows, layers in [*plain, *recomputing]:
        own = -(-rows // processes)
        if footprint.peak(own, recomputed=layers) <= budget:
            texts = min(recipe.generation.batch_size, footprint.texts(budget))
            peak = footprint.peak(own, recomputed=layers, texts=texts)
            return Fit(rows, whole // rows, layers, most, texts, peak, processes)
    if footprint.loading > budget:
        raise ConfigError(
            f"--memory-budget: {_gigabytes(budget)} cannot be met: loading the base model and the data took "
            f"{_gigabytes(footprint.loading, up=True)} already; allow more than that"
        )
    needed, recomputed = footprint.peak(1, recomputed=most), " with gradient checkpointing" if most else ""
    raise ConfigError(
        f"--memory-budget: {_gigabytes(budget)} cannot be met: one row at a time{recomputed} takes "
        f"{_gigabytes(needed, up=True)}, of which {_gigabytes(footprint.held)} are held before training; allow that, "
        "or lower data.max_tokens"
    )


def sized_like(recipe: Recipe, other: Recipe) -> Recipe:
    """Return a recipe with another's sizes, where both read as many rows per optimiser step."""
    if other.train.batch_size * other.train.accumulation != recipe.train.batch_size * recipe.train.accumulation:
        return recipe
    train = {name: getattr(other.train, name) for name in SIZES}
    return _with_sizes(recipe, train, {"batch_size": other.generation.batch_size})


def _with_sizes(recipe: Recipe, train: dict[str, Any], generation: dict[str, Any]) -> Recipe:
    made = recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})
    return made.model_copy(update={"generation": recipe.generation.model_copy(update=generation)})


def parse_bytes(text: str) -> int:
    """Return the bytes that a size such as ``1.5GB`` or ``800MB`` says.

    Raises:
        ConfigError: it is no such size.
    """
    for unit, factor in {"KB": 10**3, "MB": 10**6, "GB": 10**9}.items():
        number = text.strip().upper().removesuffix(unit)
        if number != text.strip().upper():
            try:
                size = int(float(number) * factor)
            except (ValueError, OverflowError):
                break
            if size > 0:
                return size
    raise ConfigError(f"--memory-budget: expected a size such as 1.5GB or 800MB, got {text!r}")


def _gigabytes(size: int, *, up: bool = False) -> str:
    hundredths = -(-size // 10**7) if up else size // 10**7
    return f"{hundredths / 100:.2f} GB"


@dataclass
class _Saved:
    """What autograd saves of a forward pass, by layer, and what each layer is given to read; in bytes.

    Attributes:
        kept: by each layer.
        inputs: what each reads.
        elsewhere: by everything else.
        fixed: of all that, however many rows there are: weights in another number format.
    """

    kept: list[int]
    inputs: list[int]
    elsewhere: int = 0
    fixed: int = 0

    def of_a_row(self, of_two: "_Saved") -> "_Saved":
        """Tell what a row takes from what is fixed, by what two rows take; this is what one row took."""
        kept = [two - one for one, two in zip(self.kept, of_two.kept, strict=True)]
        elsewhere = of_two.elsewhere - self.elsewhere
        fixed = sum(self.kept) + self.elsewhere - sum(kept) - elsewhere
        return _Saved(kept, self.inputs, elsewhere, max(0, fixed))


def mixed_precision(base: Base, config: TrainConfig) -> torch.autocast:
    """Compute as training does: in bfloat16 where that is safe, if a recipe asks for it."""
    return torch.autocast(input_device(base.model).type, torch.bfloat16, enabled=config.autocast)


@contextmanager
def _saved(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[_Saved]:
    """Yield what autograd saves while the model runs, parameters left out, by the layer that first saves it."""
    found = _Saved([0] * len(layers), [0] * len(layers))
    running: list[int] = []
    alive: dict[int, Tensor] = {}  # by place, and so that no place is used twice
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and storage.data_ptr() not in alive:
            alive[storage.data_ptr()] = tensor
            if running:
                found.kept[running[-1]] += storage.nbytes()
            else:
                found.elsewhere += storage.nbytes()
        return tensor

    def enter(place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(place)
        found.inputs[place] = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).nbytes

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running.pop()

    handles = [layer.register_forward_hook(leave) for layer in layers]
    handles += [
        layer.register_forward_pre_hook(partial(enter, place), with_kwargs=True) for place, layer in enumerate(layers)
    ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, _as_it_is):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
