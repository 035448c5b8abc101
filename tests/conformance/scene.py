"""A batch worth checking: three rows, padded, under one prefix, none, and a gated prefix of other lengths."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from conformance import reference
from conformance.families import FAMILIES, Family
from conformance.record import Cell
from prefixkit.prefix import Prefix, PrefixStates

PADDINGS = ("none, no mask", "none, mask", "left", "right")
#: Settings of a plain continuation of six tokens; the end of text is never chosen.
SIX = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
#: What lets a test see the logits a token was chosen from.
LOGITS = {"return_dict_in_generate": True, "output_logits": True}
END = 2


def padding(kind: str, rows: int, tokens: int) -> Tensor | None:
    """A mask in which the first row is whole and the others are padded, each by another number of tokens."""
    if kind == "none, no mask":
        return None
    mask = torch.ones(rows, tokens, dtype=torch.long)
    for row in range(1, rows):
        if kind == "left":
            mask[row, : row + 1] = 0
        if kind == "right":
            mask[row, -row - 1 :] = 0
    return mask


@dataclass(frozen=True)
class Scene:
    """A model, the prefixes of three rows, and their left-padded text."""

    family: Family
    model: PreTrainedModel
    rows: Sequence[Prefix | None]
    ids: Tensor
    mask: Tensor

    def alone(self, row: int) -> Tensor:
        """A row's text without padding, [1, t]."""
        return self.ids[row, self.mask[row].bool()][None]

    def logits(self, row: int, text: Tensor) -> Tensor:
        """What the loops give for a text `[t]` under a row's prefix, [t, v]."""
        prefix = self.rows[row]
        states, offset = (None, 0) if prefix is None else (prefix.states, prefix.position_offset)
        embeds = self.model.get_input_embeddings()(text[None])
        return reference.logits(self.model, self.family, [states], [offset], embeds)[0]

    def steps(self, row: int, continuation: Tensor) -> Tensor:
        """The logits a row's continuation `[m]` was chosen from, if it was chosen rightly, [m, v]."""
        prompt = self.alone(row)[0]
        whole = self.logits(row, torch.cat([prompt, continuation]))
        return whole[len(prompt) - 1 : -1]

    def score(self, row: int, continuation: Tensor) -> Tensor:
        """The mean log-probability of a continuation, as beam search scores it."""
        steps = torch.log_softmax(self.steps(row, continuation), dim=-1)
        return steps.gather(1, continuation[:, None]).mean()


def greedy(logits: Tensor) -> Tensor:
    """The tokens greedy search takes from `[m, v]`, never the end of text."""
    logits = logits.clone()
    logits[:, END] = -torch.inf
    return logits.argmax(dim=1)


def make_scene(
    name: str,
    model: PreTrainedModel,
    make_prefix: Callable[..., Prefix],
    make_ids: Callable[..., Tensor],
) -> Scene:
    """The scene of a family; layers of no length and a gate among the prefixes."""
    layers = model.config.get_text_config().num_hidden_layers
    rows = [
        make_prefix(model, [3, 2, 4][:layers], seed=1),
        None,
        make_prefix(model, [2, 0, 1][:layers], seed=2, gated=True, offset=1),
    ]
    mask = padding("left", 3, 9)
    assert mask is not None
    return Scene(FAMILIES[name], model, rows, make_ids(3, 9), mask)


def states_of(rows: Sequence[Prefix | None]) -> list[PrefixStates | None]:
    """The states of each row."""
    return [None if prefix is None else prefix.states for prefix in rows]


def offsets_of(rows: Sequence[Prefix | None]) -> list[int]:
    """The position of each row's first token."""
    return [0 if prefix is None else prefix.position_offset for prefix in rows]


def check_steps(cell: Cell, scene: Scene, row: int, continuation: Tensor, logits: Iterable[Tensor]) -> None:
    """The logits a row's tokens came from are those of the loops on that row alone."""
    cell.exact(torch.stack(list(logits)), scene.steps(row, continuation))


def check_greedy(cell: Cell, scene: Scene, output: Any) -> None:
    """Each row's six tokens are what greedy search over the loops takes, and so are the logits."""
    for row in range(3):
        continuation = output.sequences[row, -6:]
        check_steps(cell, scene, row, continuation, [step[row] for step in output.logits])
        cell.exact(continuation, greedy(scene.steps(row, continuation)))
