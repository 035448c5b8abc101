"""Settings of the training run."""

from enum import StrEnum

from pydantic import Field, model_validator

from prefixkit.config.section import Section


class Schedule(StrEnum):
    """Shape of the learning rate after warm-up."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


class OnDivergence(StrEnum):
    """What to do when loss or gradients leave the rails."""

    STOP = "stop"
    ROLLBACK = "rollback"


class DivergenceConfig(Section):
    """When a run counts as diverged, and what happens then."""

    action: OnDivergence = Field(OnDivergence.ROLLBACK, strict=False)
    """stop: end with an error, the last checkpoint kept; rollback: return to it, and the next time to
    the one before it, with half the learning rate each time."""
    loss_ratio: float = Field(3.0, gt=1)
    """A loss above this many times the running median, and 2 nats above it, three steps in a row counts as exploded: a
    single batch of few learned tokens may be as hard, and mean nothing."""
    norm_ratio: float = Field(100.0, gt=1)
    """A gradient norm above this many times the running median, and above max_grad_norm, counts as exploded."""
    max_rollbacks: int = Field(2, ge=0)
    """After this many rollbacks the run stops."""


class TrainConfig(Section):
    """How the prefix is trained."""

    seed: int = Field(0, ge=0)
    """The run's one seed: initialisation, order of the data and dropout derive from it; what is
    generated and measured has evaluation.seed."""
    steps: int = Field(250, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(8, ge=1)
    """Examples per forward pass."""
    accumulation: int = Field(1, ge=1)
    """Forward passes per optimiser step."""
    learning_rate: float = Field(1.5e-2, ge=0)
    """Peak rate of AdamW. Keys and values that are trained themselves want rates ten to a hundred times those of full
    fine-tuning; through an MLP, about those (the study reparameterisation)."""
    schedule: Schedule = Field(Schedule.LINEAR, strict=False)
    """Decay after warm-up."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay, of a prefix and of matrices; biases, norms and IA3's factors have none."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    autocast: bool = False
    """Mixed precision for a float32 base model: compute in bfloat16 where that is safe."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    recomputed_layers: int | None = Field(None, ge=1)
    """Under gradient checkpointing, so many layers, the first ones, are recomputed, and the others' activations kept;
    left out, all are recomputed."""
    group_by_length: bool = True
    """Put examples of similar length in one batch, so that little is padded."""
    evaluate_every: int = Field(50, ge=1)
    """Steps between held-out losses."""
    validation_rows: int = Field(64, ge=1)
    """Held-out rows early stopping looks at."""
    patience: int | None = Field(5, ge=1)
    """Stop after this many held-out losses without a new best; left out, never."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints to keep."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; left out, as many as the machine (or its container) gives. How busy those are is not looked at: runs
    side by side want a share of the cores each, as `prefixkit sweep --workers` gives them."""
    report_to: list[str] = Field(default_factory=list)
    """Trackers of transformers' Trainer, such as tensorboard, wandb or mlflow."""
    divergence: DivergenceConfig = DivergenceConfig()
    """What counts as divergence, and what happens then."""

    @model_validator(mode="after")
    def _recomputing_is_on(self) -> "TrainConfig":
        if self.recomputed_layers is not None and not self.gradient_checkpointing:
            raise ValueError("recomputed_layers needs gradient_checkpointing, which recomputes them")
        return self
