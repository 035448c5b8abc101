"""What is measured side by side: prefixkit, and its rivals by PEFT, each on a freshly loaded base model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn

from prefixkit.config import Recipe
from prefixkit.data import NO_LOSS, Collator, LengthGroupedSampler, PreparedData
from prefixkit.errors import TrainingError
from prefixkit.models import Base, load_base_model
from prefixkit.models.fingerprint import fingerprint
from prefixkit.models.hardware import describe_machine
from prefixkit.prefix import BaseCard, Prefix
from prefixkit.training import build_encoder
from prefixkit.training.loss import summed_loss
from prefixkit.training.start import build_model

LORA, PEFT_PREFIX, PEFT_PROJECTED, PREFIXKIT, FULL = "lora", "peft-prefix", "peft-projected", "prefixkit", "full"
LORA_TARGETS = ["q_proj", "v_proj"]

#: Summed cross-entropy of a batch, in nats.
Loss = Callable[[dict[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Contestant:
    """A model in training: its trainable parameters are those that require a gradient."""

    model: nn.Module
    loss: Loss
    details: dict[str, Any]


def logits_loss(model: nn.Module) -> Loss:
    """Score a model through its public forward; a plain call, as PEFT's prefix needs its cache."""

    def loss(batch: dict[str, Tensor], labels: Tensor) -> Tensor:
        expected = labels[:, 1:]  # [b, t - 1]
        scored = expected != NO_LOSS
        logits = model(**batch).logits[:, :-1][scored].float()  # [k, v]
        return nn.functional.cross_entropy(logits, expected[scored], reduction="sum")

    return loss


def build_prefixkit(base: Base, recipe: Recipe, data: PreparedData) -> Contestant:
    model = build_model(base, data.train, recipe, ())

    def loss(batch: dict[str, Tensor], labels: Tensor) -> Tensor:
        return summed_loss(model.base, batch, labels, plain_head=model.plain_head)

    return Contestant(model, loss, {"prefix": recipe.prefix.model_dump(mode="json")})


def build_peft_prefix(base: Base, recipe: Recipe, data: PreparedData) -> Contestant:
    tokens = recipe.prefix.num_virtual_tokens
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=tokens)
    model = get_peft_model(base.model, config)
    return Contestant(model, logits_loss(model), {"num_virtual_tokens": tokens, "init": "PEFT's default"})


def build_peft_projected(base: Base, recipe: Recipe, data: PreparedData) -> Contestant:
    """PEFT's prefix behind its MLP, of the model's own width as its examples have it."""
    tokens, width = recipe.prefix.num_virtual_tokens, base.model.config.hidden_size
    options = {"num_virtual_tokens": tokens, "prefix_projection": True, "encoder_hidden_size": width}
    model = get_peft_model(base.model, PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, **options))
    return Contestant(model, logits_loss(model), options)


def build_full(base: Base, recipe: Recipe, data: PreparedData) -> Contestant:
    """Full fine-tuning, through the model's own forward."""
    model = base.model.requires_grad_(True)
    return Contestant(model, logits_loss(model), {})


def build_lora(base: Base, recipe: Recipe, data: PreparedData) -> Contestant:
    """LoRA of the rank that has exactly as many parameters as the prefix."""
    encoder = build_encoder(base, recipe.prefix, seed=recipe.train.seed, texts=[data.train[0].text])
    wanted = encoder.num_parameters()
    targets = [m for n, m in base.model.named_modules() if n.rpartition(".")[2] in LORA_TARGETS]
    per_rank = sum(module.in_features + module.out_features for module in targets)
    rank, rest = divmod(wanted, per_rank)
    if rest or rank == 0:
        raise TrainingError(
            f"no LoRA rank on {', '.join(LORA_TARGETS)} has {wanted} parameters ({per_rank} per rank); "
            "choose another prefix length"
        )
    # Scaling 2: alpha of twice the rank; the sweep of rates covers other choices of scale.
    options = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": LORA_TARGETS}
    model = get_peft_model(base.model, LoraConfig(task_type=TaskType.CAUSAL_LM, **options))
    return Contestant(model, logits_loss(model), options)


def conditions(base: Base) -> dict[str, Any]:
    """Return what a result says of the machine and the way it was measured."""
    return {
        "machine": asdict(describe_machine()),
        "dtype": str(base.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def untrained_prefix(base: Base, recipe: Recipe, *, seed: int = 0, texts: Sequence[str] = ()) -> Prefix:
    """Return a recipe's prefix as it starts, to be saved or attached."""
    encoder = build_encoder(base, recipe.prefix, seed=seed, texts=texts)
    return Prefix.from_states(encoder.materialise(), base=BaseCard(id=base.id, fingerprint=fingerprint(base.model)))


BUILDERS = {
    PREFIXKIT: build_prefixkit,
    LORA: build_lora,
    PEFT_PREFIX: build_peft_prefix,
    PEFT_PROJECTED: build_peft_projected,
    FULL: build_full,
}


def batches(data: PreparedData, recipe: Recipe, collate: Collator) -> Iterator[dict[str, Tensor]]:
    """Yield training batches for ever, in the order a run of the recipe sees them."""
    train = recipe.train
    sampler = LengthGroupedSampler(
        [len(example.input_ids) for example in data.train],
        train.batch_size,
        seed=train.seed,
        group_by_length=train.group_by_length,
    )
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, len(order), train.batch_size):
            yield collate([data.train[row] for row in order[start : start + train.batch_size]])
        epoch += 1


def load(recipe: Recipe) -> Base:
    model = recipe.model
    return load_base_model(model.base, revision=model.revision, dtype=model.dtype, attention=model.attention)
