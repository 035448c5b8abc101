"""The classification head: what a hidden state says about a label, trained beside a prefix.

P-tuning v2 (Liu et al., 2022, §3.3) predicts labels not with words of the vocabulary but with a linear layer on the
frozen model's last hidden states, randomly initialised and trained together with the prefix,

    logits = W h + b            h: [..., e]   W: [c, e]   b: [c]   logits: [..., c]

one such `h` for a whole text (kind sequence), or one for each word (kind token). Which hidden states those are,
`models/reading.py` says; of a whole text it may also be their mean.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefixkit.config import Pooling
from prefixkit.errors import ArtefactError

#: Standard deviation of the weights a head starts from, as in BERT's own heads.
_START_STD = 0.02


class HeadKind(StrEnum):
    """What gets a label."""

    SEQUENCE = "sequence"
    TOKEN = "token"


@dataclass(frozen=True, eq=False)
class Head:
    """A trained head: plain tensors and the names of its labels.

    Attributes:
        kind: what gets a label.
        labels: the label of each logit, in order.
        weight: `W`.
        bias: `b`.
        pooling: the hidden state of a whole text.

    Raises:
        ArtefactError: there are fewer than two labels, two of one name, or another number than logits; or the labels of
            words are asked of the mean over a text.
    """

    kind: HeadKind
    labels: tuple[str, ...]
    weight: Float[Tensor, "c e"]
    bias: Float[Tensor, "c"]
    pooling: Pooling = Pooling.TOKEN

    def __post_init__(self) -> None:
        if self.weight.dtype != self.bias.dtype or not self.weight.is_floating_point():
            raise ArtefactError(
                f"head: expected weight and bias in one number format, got {self.weight.dtype} and {self.bias.dtype}"
            )
        names = len(set(self.labels))
        if names < 2 or names != len(self.labels) or names != len(self.weight):
            raise ArtefactError(
                f"head.labels: expected {len(self.weight)} different labels, two or more, got {', '.join(self.labels)}"
            )

        if self.kind is HeadKind.TOKEN and self.pooling is not Pooling.TOKEN:
            raise ArtefactError(f"head.pooling: a head for words reads each word's own token, not the {self.pooling}")

    @property
    def num_parameters(self) -> int:
        """Numbers it holds."""
        return self.weight.numel() + self.bias.numel()

    def __call__(self, hidden: Float[Tensor, "*k e"]) -> Float[Tensor, "*k c"]:
        """Return the logits of hidden states, in the head's own number format."""
        weight = self.weight.to(hidden.device)
        return nn.functional.linear(hidden.to(weight.dtype), weight, self.bias.to(hidden.device))


class ClassificationHead(nn.Module):
    """The trainable head.

    Args:
        kind: what gets a label.
        labels: names of the labels, in the order of the logits.
        size: `e`, width of the base model's hidden states.
        pooling: the hidden state of a whole text.
        dropout: share of a hidden state's numbers set to zero while training (the rest is scaled up).
        generator: draws the weights it starts from.
        dtype: number format of the parameters.
    """

    def __init__(
        self,
        kind: HeadKind,
        labels: tuple[str, ...],
        size: int,
        *,
        pooling: Pooling = Pooling.TOKEN,
        dropout: float = 0.0,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.kind, self.labels, self.pooling, self.dropout = kind, labels, pooling, dropout
        self.weight = nn.Parameter(_START_STD * torch.randn(len(labels), size, generator=generator, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(len(labels), dtype=dtype))

    def forward(self, hidden: Float[Tensor, "k e"]) -> Float[Tensor, "k c"]:
        """Return the logits of hidden states, in the head's own number format under autocast too."""
        with torch.autocast(hidden.device.type, enabled=False):
            kept = nn.functional.dropout(hidden.to(self.weight.dtype), self.dropout, self.training)
            return nn.functional.linear(kept, self.weight, self.bias)

    def materialise(self) -> Head:
        """Return the head as plain tensors that later training steps do not change."""
        return Head(self.kind, self.labels, self.weight.detach().clone(), self.bias.detach().clone(), self.pooling)

    def num_parameters(self) -> int:
        """Numbers that are trained."""
        return self.weight.numel() + self.bias.numel()
