"""What was changed in a frozen model's layers, beside the keys and values of a prefix: a LoRA, trained biases, ...

He et al. (2022) write prefix tuning, adapters and LoRA alike as a change Δh that is added to a hidden state. A prefix
is keys and values; every other method is a `Delta`: its name, its settings, and its numbers by name. What they mean,
`methods/` knows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefixkit.config import Biases, Method

#: Operations per number and token. Fine-tuned weights stand in the place of others.
_FLOPS = {Method.LORA: 2, Method.ADAPTER: 2, Method.IA3: 1, Method.BITFIT: 1, Method.FULL: 0, Method.TOP_LAYERS: 0}


@dataclass(frozen=True, eq=False)
class Delta:
    """The trained numbers of one method.

    Attributes:
        method: whose they are.
        settings: everything needed to build the method's layers again, as plain JSON.
        tensors: the numbers, by the name of the layer they belong to; shared, not copied.
    """

    method: Method
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def __eq__(self, other: object) -> bool:
        """Whether it is the same change, with the same settings and numbers: an artefact may be loaded twice."""
        if self is other:
            return True
        if not isinstance(other, Delta) or self.method is not other.method or self.settings != other.settings:
            return False
        return self.tensors.keys() == other.tensors.keys() and all(
            _is_same(own, other.tensors[name]) for name, own in self.tensors.items()
        )

    def __hash__(self) -> int:
        return hash((self.method, frozenset(self.tensors)))

    @property
    def flops_per_token(self) -> int:
        """Operations it adds to each token of text: two per number that is multiplied and summed up, one per other."""
        if self.method is Method.BITFIT and self.settings.get("biases") == Biases.OWN:
            return 0  # the model's own are added as they were
        return _FLOPS[self.method] * self.num_parameters

    @property
    def num_parameters(self) -> int:
        """Numbers it holds."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one is other or (
        one.shape == other.shape and one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    )
