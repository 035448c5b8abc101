"""What was changed in a frozen model's layers, beside the keys and values of a prefix: a LoRA, trained biases, ...

He et al. (2022) write prefix tuning, adapters and LoRA alike as a change Δh that is added to a hidden state. A prefix
is keys and values; every other method is a `Delta`: its name, its settings, and its numbers by name. What they mean,
`methods/` knows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prefixkit.config import Method


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

    @property
    def num_parameters(self) -> int:
        """Numbers it holds."""
        return sum(tensor.numel() for tensor in self.tensors.values())
