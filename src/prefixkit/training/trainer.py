"""transformers' Trainer, taught three things: what to save, in which order to read, and when to stop."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from prefixkit import processes
from prefixkit.data import NO_LOSS, DistributedBatchSampler, EpochDataLoader
from prefixkit.data.stream import StreamSampler
from prefixkit.errors import TrainingError
from prefixkit.training.callbacks import HeldOut, Metrics, StopAfterStep
from prefixkit.training.checkpoint import Progress, publish, read_own, staging, write_own
from prefixkit.training.model import Part, PrefixModel
from prefixkit.training.monitor import Monitor

#: A disk with less room than this counts as full.
_FULL_BYTES = 1_000_000


class PrefixTrainer(Trainer):
    """Trains a `PrefixModel`.

    Args:
        model: the model in training.
        batch_sampler: which examples this process reads; depends on seed and epoch alone, so that resuming is exact.
        heldout: held-out loss and early stopping.
        metrics: counts tokens.
        monitor: looks at every step before it is taken.
        stop: takes Ctrl-C.
        rates: peak rate of each part that is trained, rollbacks included.
        options: what transformers' Trainer takes.
    """

    def __init__(
        self,
        model: PrefixModel,
        *,
        batch_sampler: DistributedBatchSampler | StreamSampler,
        heldout: HeldOut,
        metrics: Metrics,
        monitor: Monitor,
        stop: StopAfterStep,
        rates: Mapping[Part, float],
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self._batch_sampler, self._monitor = batch_sampler, monitor
        self._heldout, self._metrics, self._stop = heldout, metrics, stop
        self._rates = dict(rates)
        self._step_loss, self._step_tokens = 0.0, 0

    @property
    def progress(self) -> Progress:
        """What a checkpoint keeps of our own callbacks."""
        return self._heldout.progress

    def get_train_dataloader(self) -> EpochDataLoader:
        """Read what is this process's own; accelerate would cut other batches."""
        return EpochDataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self._batch_sampler,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def create_optimizer(self, model: Any = None) -> Any:
        """Give each part that is trained a rate of its own; the first one's are the trainer's own groups."""
        is_new = self.optimizer is None
        optimizer: Any = super().create_optimizer(model)
        if is_new:
            _, *others = self._trained().parts().items()
            for part, numbers in others:
                _move(optimizer, set(numbers), self._rates[part])
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Take one forward and backward pass, adding up loss and tokens of the optimiser step."""
        scored = inputs["labels"] != NO_LOSS
        self._step_tokens += int(inputs["attention_mask"].sum(dim=1)[scored.any(dim=1)].sum())
        if "decoder_input_ids" in inputs:
            self._step_tokens += int(scored.sum())
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss += float(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Look at loss and gradient norm; the optimiser's step comes only after this returns."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        loss, tokens, stops = processes.totals(self._step_loss, self._step_tokens, self._stop.asked)
        self._step_loss, self._step_tokens = 0.0, 0
        self._metrics.tokens += int(tokens)
        self._metrics.rates = self._present_rates()
        self._stop.is_due = stops > 0  # in all processes after the same step
        loss /= processes.count()  # of which each has multiplied its own by their number
        self._monitor.check(self.state.global_step + 1, loss, float(norm))
        return norm

    def _present_rates(self) -> dict[Part, float]:
        """Return the rate of each part in the step under way."""
        assert self.optimizer is not None
        rates = {id(number): group["lr"] for group in self.optimizer.param_groups for number in group["params"]}
        return {part: rates[id(numbers[0])] for part, numbers in self._trained().parts().items()}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save aside, then rename: whatever goes wrong, the last whole checkpoint stays."""
        folder = Path(str(self.args.output_dir))
        staged = staging(folder)
        if processes.is_first():
            shutil.rmtree(staged, ignore_errors=True)
        processes.wait()
        self.args.output_dir = str(staged)
        try:
            with self._failing_in_one_line(folder):
                super()._save_checkpoint(model, trial)
            processes.wait()  # each has left its random state
            if processes.is_first():
                with self._failing_in_one_line(folder):
                    publish(staged / f"checkpoint-{self.state.global_step}", folder, self.args.save_total_limit or 1)
            processes.wait()
        finally:
            self.args.output_dir = str(folder)
            if processes.is_first():
                shutil.rmtree(staged, ignore_errors=True)

    @contextmanager
    def _failing_in_one_line(self, folder: Path) -> Iterator[None]:
        """Say what kept a checkpoint from being saved; of several processes the first one knows."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            if not processes.is_first():
                raise TrainingError("another process of this run failed; see what the first one says") from None
            is_full = shutil.disk_usage(folder).free < _FULL_BYTES
            reason = "the disk is full" if is_full else " ".join(str(error).split())
            raise TrainingError(
                f"{folder}: cannot save a checkpoint at step {self.state.global_step}: {reason}; the previous "
                "checkpoint is intact, make room and go on with --resume"
            ) from None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the encoder, not the base model."""
        if self.args.should_save:
            self.progress.recent_losses, self.progress.recent_norms = self._monitor.state()
            folder = Path(str(output_dir or self.args.output_dir))
            write_own(folder, self._trained().trained_state(), self._heldout.best, self.progress)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        trained, best, progress = read_own(Path(resume_from_checkpoint))
        self._trained().load_trained_state(trained)
        rollbacks = max(progress.rollbacks, self.progress.rollbacks)
        self.progress.__dict__.update(progress.__dict__ | {"rollbacks": rollbacks})
        self._heldout.best = best
        self._monitor.restore(progress.recent_losses, progress.recent_norms)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Leave out what does not decay in a change of layers, whose names transformers' Trainer does not know."""
        names, delta = super().get_decay_parameter_names(model), self._trained().delta
        if delta is None:
            return names
        standing = set(map(id, delta.numbers)) - set(map(id, delta.decaying))
        left_out = {name for name, number in model.named_parameters() if id(number) in standing}
        return [name for name in names if name not in left_out]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Go on with this process's random numbers; one that was not there before, with the first one's.

        transformers' Trainer finds none where one process goes on for several, or several for one, and draws any.
        """
        if checkpoint is None:
            return
        own = f"rng_state_{processes.rank()}.pth" if processes.count() > 1 else "rng_state.pth"
        names = (own, "rng_state.pth", "rng_state_0.pth")
        with tempfile.TemporaryDirectory() as folder:
            saved = next(path for path in (Path(checkpoint, name) for name in names) if path.exists())
            shutil.copy(saved, Path(folder, own))
            super()._load_rng_state(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """After a rollback, the saved schedule is replayed at the lower peak rate."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.optimizer is None or self.lr_scheduler is None:
            return
        scheduler = self.lr_scheduler
        factor = self.args.learning_rate / scheduler.base_lrs[0]
        if factor != 1.0:
            scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
            scheduler._last_lr = [rate * factor for rate in scheduler._last_lr]
            for group in self.optimizer.param_groups:
                group["lr"] *= factor
                group["initial_lr"] *= factor

    def _trained(self) -> PrefixModel:
        model: PrefixModel = self.accelerator.unwrap_model(self.model)
        return model


def _move(optimizer: Any, numbers: set[nn.Parameter], rate: float) -> None:
    """Put numbers into groups of their own, which are otherwise like those they were in."""
    for group in list(optimizer.param_groups):
        moved = [number for number in group["params"] if number in numbers]
        if moved:
            group["params"] = [number for number in group["params"] if number not in numbers]
            optimizer.add_param_group(group | {"params": moved, "lr": rate})
