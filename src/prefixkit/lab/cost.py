"""What training a recipe costs, told before it begins: multiplications, time and memory, from a few of its own steps.

A step's FLOPs are counted as it runs. With a frozen base model they are about two thirds of full fine-tuning's: for
every weight a product forwards and one backwards, and none for its own gradient. What the machine can do is measured on
matrix products of the model's own shapes; a step reaches a share of it, as elementwise work, attention and memory take
their time too. On other hardware a step takes its FLOPs divided by what that hardware does, by the same share at best.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prefixkit.compat import cpu_attention_flops
from prefixkit.config import Recipe
from prefixkit.data import Collator, Example, LengthGroupedSampler, longest_first
from prefixkit.lab.run.loading import load_for
from prefixkit.lab.run.memory import measure_footprint, mixed_precision
from prefixkit.models import Base
from prefixkit.models.hardware import finish_computing, prepare_processor
from prefixkit.models.weights import input_device, is_plain
from prefixkit.training.model import PrefixModel
from prefixkit.training.start import build_model

#: Steps that are timed, after one whose FLOPs are counted.
_STEPS = 3
#: Seconds the matrix products are tried for at least.
_TRIED = 1.0


@dataclass(frozen=True)
class Cost:
    """What a recipe's training costs; `data.likeliest`, held-out losses and the evaluation afterwards are not in it.

    Attributes:
        steps: optimiser steps.
        texts: read in a step.
        tokens: likewise, on average over the data; padding not counted.
        flops: of a step.
        seconds: a step takes on this machine.
        rate: FLOP/s of matrix products of the model's shapes on this machine.
        peak: bytes in memory at most.
        peak_checkpointed: likewise with gradient checkpointing.
        trained: numbers.
    """

    steps: int
    texts: int
    tokens: float
    flops: float
    seconds: float
    rate: float
    peak: int
    peak_checkpointed: int
    trained: int

    @property
    def reached(self) -> float:
        """The share of the matrix products' rate that a step reaches."""
        return self.flops / self.seconds / self.rate

    @property
    def training_seconds(self) -> float:
        """What all steps take here."""
        return self.steps * self.seconds

    def seconds_at(self, rate: float) -> float:
        """Return what all steps take on hardware of so many FLOP/s, if the same share of it is reached."""
        return self.steps * self.flops / (rate * self.reached)


def estimate_run(recipe: Recipe) -> tuple[Base, Cost]:
    """Tell what training a recipe costs on this machine, from a few of its steps.

    Raises:
        PrefixkitError: the base model or the data cannot be loaded.
    """
    prepare_processor(recipe.train.threads)
    base, data = load_for(recipe)
    longest = longest_first(data, recipe.data.max_tokens)
    return base, measure_cost(base, data.train, recipe, data.classes, longest=longest)


def measure_cost(
    base: Base,
    examples: Sequence[Example],
    recipe: Recipe,
    classes: Sequence[str],
    *,
    longest: Sequence[Example] | None = None,
) -> Cost:
    """Take a few steps of a recipe and tell what all of them cost. Nothing of them is kept.

    Args:
        base: the frozen base model, with nothing attached.
        examples: what is to be learned from.
        recipe: how.
        classes: names of the labels, where labels are learned.
        longest: examples as long as may come, the longest first; those to be learned from if left out.
    """
    train = recipe.train
    footprint = measure_footprint(base, longest or examples, recipe, classes)
    written = min(recipe.generation.batch_size, recipe.evaluation.samples)  # at a time, after training
    model = build_model(base, examples, recipe, classes)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lengths = [example.num_tokens for example in examples]
    sampler = LengthGroupedSampler(lengths, train.batch_size, seed=train.seed, group_by_length=train.group_by_length)
    collate, order = Collator(base.tokenizer.pad_token_id), cycle(sampler)
    try:
        if train.gradient_checkpointing:
            model.activation_checkpointing_enable()
        optimiser, mixed = torch.optim.AdamW(trained, lr=0.0), mixed_precision(base, train)
        flops, seconds, tokens = 0.0, 0.0, 0
        for number in range(_STEPS + 1):
            rows = list(islice(order, train.batch_size))
            tensors = collate([examples[row] for row in rows])
            batch = {name: tensor.to(input_device(base.model)) for name, tensor in tensors.items()}
            read = sum(lengths[row] for row in rows)
            if number == 0:  # slower, as it counts
                flops = _flops(model.train(), optimiser, batch, mixed) / read
                continue
            seconds += _seconds(model, optimiser, batch, mixed)
            tokens += read
    finally:
        model.close()
    texts = train.batch_size * train.accumulation
    mean = texts * sum(lengths) / len(lengths)
    return Cost(
        steps=train.steps,
        texts=texts,
        tokens=mean,
        flops=flops * mean,
        seconds=seconds / tokens * mean,
        rate=matmul_rate(base, tokens=max(1, round(mean / train.accumulation))),
        peak=footprint.peak(train.batch_size, recomputed=footprint.recomputed(train), texts=written),
        peak_checkpointed=footprint.peak(train.batch_size, recomputed=footprint.layers, texts=written),
        trained=sum(parameter.numel() for parameter in trained),
    )


def _step(
    model: PrefixModel, optimiser: torch.optim.Optimizer, batch: dict[str, Tensor], mixed: torch.autocast
) -> None:
    with mixed:
        loss = model(**batch)["loss"]
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()


def _flops(
    model: PrefixModel, optimiser: torch.optim.Optimizer, batch: dict[str, Tensor], mixed: torch.autocast
) -> int:
    with FlopCounterMode(display=False, custom_mapping=cpu_attention_flops()) as counter:
        _step(model, optimiser, batch, mixed)
    return int(counter.get_total_flops())


def _seconds(
    model: PrefixModel, optimiser: torch.optim.Optimizer, batch: dict[str, Tensor], mixed: torch.autocast
) -> float:
    device = batch["input_ids"].device
    finish_computing(device)
    started = time.perf_counter()
    _step(model, optimiser, batch, mixed)
    finish_computing(device)
    return time.perf_counter() - started


def linear_products(base: Base, *, most: int) -> Callable[[int], int]:
    """Return what no training of a prefix can do without: the products of all linear layers, and nothing else.

    Args:
        base: the base model; its own weights are multiplied with.
        most: tokens at most.

    Returns:
        A function that multiplies for so many tokens, forwards and backwards for the input, and returns the FLOPs.
    """
    device = input_device(base.model)
    linear = [module for module in base.model.modules() if isinstance(module, nn.Linear)]
    shapes = [(layer.out_features, layer.in_features) for layer in linear]
    weights = [
        layer.weight.detach() if is_plain(layer.weight) else torch.empty(shape, dtype=base.dtype, device=device)
        for layer, shape in zip(linear, shapes, strict=True)
    ]
    sizes = {size for weight in weights for size in weight.shape}
    numbers = {size: torch.randn(most, size, dtype=base.dtype, device=device) for size in sizes}

    @torch.no_grad()
    def multiply(tokens: int) -> int:
        for weight in weights:
            torch.mm(numbers[weight.shape[1]][:tokens], weight.T)
            torch.mm(numbers[weight.shape[0]][:tokens], weight)
        return 4 * tokens * sum(weight.numel() for weight in weights)

    return multiply


def matmul_rate(base: Base, *, tokens: int) -> float:
    """Return the FLOP/s of `linear_products` with so many tokens on this machine."""
    multiply, somewhere = linear_products(base, most=tokens), next(base.model.parameters())
    done, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < _TRIED or not done:
        done += multiply(tokens)
        finish_computing(somewhere.device)
    return done / spent
