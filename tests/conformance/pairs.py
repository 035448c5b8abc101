"""What cells of encoder-decoders share: a source of three rows, their prefixes, and what the loops say of an output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from conformance.encoder_families import source_of
from conformance.record import Cell
from conformance.reference import reading
from conformance.scene import LOGITS, SIX, greedy, states_of
from prefixkit.injection import attach
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import BaseCard, Prefix, PrefixStates


@dataclass(frozen=True)
class Pairs:
    """A model, the prefixes of its rows, and what its encoder reads."""

    model: PreTrainedModel
    rows: Sequence[Prefix | None]
    source: Mapping[str, Tensor]

    @property
    def start(self) -> Tensor:
        """The token a decoder starts from, for each row: [b, 1]."""
        return torch.full((len(self.rows), 1), self.model.config.decoder_start_token_id)

    def one(self, row: int) -> "Pairs":
        """A row alone."""
        source = {name: value[row : row + 1] for name, value in self.source.items()}
        return Pairs(self.model, [self.rows[row]], source)

    def generate(self, **settings: Any) -> Any:
        """Generate six tokens for all rows under their prefixes."""
        with attach(self.model, list(self.rows)):
            return self.model.generate(**self.source, **SIX | LOGITS | settings)

    def logits(self, targets: Tensor) -> Tensor:
        """What the loops give for the decoder's texts `[k * b, t]`, each row's `k` in a row: [k * b, t, v]."""
        copies = len(targets) // len(self.rows)
        source = {name: value.repeat_interleave(copies, 0) for name, value in self.source.items()}
        with reading(self.model, states_of(self.rows)):
            logits: Tensor = self.model(**source, decoder_input_ids=targets, use_cache=False).logits
        return logits

    def check(self, cell: Cell, output: Any, *, is_greedy: bool = False) -> None:
        """The logits that tokens came from, and greedy tokens themselves, are those of the loops."""
        found = torch.stack(list(output.logits), dim=1)  # [b, m, v]
        tokens = found.shape[1]
        expected = self.logits(output.sequences[:, :-1])[:, -tokens:]
        cell.exact(found, expected)
        if is_greedy:
            cell.exact(output.sequences[:, -tokens:], torch.stack([greedy(row) for row in expected]))

    def check_scores(self, cell: Cell, output: Any) -> None:
        """What beam search says a text scores is its mean log-probability under the loops."""
        steps = self.logits(output.sequences[:, :-1])[:, -6:].log_softmax(dim=-1)  # [k * b, m, v]
        scores = steps.gather(2, output.sequences[:, -6:, None])[..., 0].mean(dim=1)
        cell.exact(output.sequences_scores.double(), scores)


def make_pairs(model: PreTrainedModel, make_prefix: Any) -> Pairs:
    """Three rows, the later ones with a padded source: a prefix with layers of no length, none, and a gated one."""
    sites = len(make_prefix(model, 1).states.sites)
    source = source_of(model, 3)
    if "input_ids" in source:
        mask = torch.ones_like(source["input_ids"])
        mask[1, -1:], mask[2, -2:] = 0, 0
        source = source | {"attention_mask": mask}
    first = ([3, 2, 4, 0, 1, 2, 3, 1] * 3)[:sites]
    return Pairs(model, [make_prefix(model, first, seed=1), None, make_prefix(model, 2, seed=2, gated=True)], source)


def cannot_cache(model: PreTrainedModel) -> bool:
    """Whether transformers makes the cache too short: as long as the encoder of an asymmetric T5."""
    return model.config.model_type == "t5" and model.config.num_layers != model.config.num_decoder_layers


def cannot_generate(cell: Cell, model: PreTrainedModel) -> bool:
    """Whether transformers itself cannot, for want of a cache: without a prefix, nor with one."""
    if not cannot_cache(model):
        return False
    geometry = inspect_model(model).geometry
    rows = torch.ones(2, geometry.numbers_per_token, dtype=torch.float64)
    prefix = Prefix.from_states(PrefixStates.from_rows(geometry, rows), base=BaseCard(id="tiny"))
    for attached in (None, prefix):
        with attach(model, attached), cell.refused(IndexError, "list index out of range"):
            model.generate(**source_of(model, 2), **SIX)
    return True
