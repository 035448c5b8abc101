"""What every method that changes a model's layers has in common: its trainable numbers, and how they are put in."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import Tensor, nn

from prefixkit.config import Method
from prefixkit.errors import ArtefactError
from prefixkit.prefix import Delta

_serials = count()

#: Takes a change out of a model again.
Undo = Callable[[], None]


class DeltaModule(nn.Module, ABC):
    """A trainable change of a frozen model's layers; made for one model, and in it between `insert` and its undoing.

    The model's own weights are never written to: what a method trains stands beside them, or in their place.

    Args:
        named: the trainable numbers, by the name of the layer they belong to.
        settings: what the method has to be made from for the same layers again, as plain JSON and by the names of its
            settings in a recipe; what was left to the method is decided in it.

    Attributes:
        serial: tells it from all others of this process.
    """

    method: ClassVar[Method]

    def __init__(self, named: Mapping[str, nn.Parameter], settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings = dict(settings)
        self.serial = next(_serials)
        self._model: ref[nn.Module] | None = None
        self._names = tuple(named)
        # Trainer finds what is not to decay, biases above all, by name; a name of torch's has no dots.
        self._numbers = nn.ParameterDict((name.replace(".", "/"), number) for name, number in named.items())

    @property
    def numbers(self) -> list[nn.Parameter]:
        """The trainable numbers."""
        return list(self._numbers.values())

    @property
    def decaying(self) -> list[nn.Parameter]:
        """The numbers that weight decay is for: matrices. Biases and scales are not to be small, nor IA3's factors."""
        return [] if self.method is Method.IA3 else [number for number in self.numbers if number.dim() > 1]

    def made_for(self, model: nn.Module) -> "DeltaModule":
        """Remember whose layers these change."""
        self._model = ref(model)
        return self

    def is_for(self, model: nn.Module) -> bool:
        """Whether the change was made for this very model."""
        return self._model is not None and self._model() is model

    @abstractmethod
    def insert(self) -> Undo:
        """Put the change into the model; returns what takes it out and leaves the model as it was, bit for bit."""

    def touches(self, module: nn.Module | None) -> bool:
        """Whether the change is one of this very module, so that its weights alone do not say what it computes."""
        return False

    def named(self) -> dict[str, nn.Parameter]:
        """Return the trainable numbers by name."""
        return dict(zip(self._names, self.numbers, strict=True))

    def materialise(self) -> Delta:
        """Return the numbers as they are; later training steps do not change them."""
        tensors = {name: number.detach().clone() for name, number in self.named().items()}
        return Delta(self.method, self.settings, tensors)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over numbers by name.

        Raises:
            ArtefactError: a name or a shape is not the model's.
        """
        own = self.named()
        strange = sorted(own.keys() ^ tensors.keys())
        if strange:
            raise ArtefactError(
                f"{self.method}: {strange[0]} is {'missing' if strange[0] in own else 'no layer of this model'}; "
                "load the base model it was trained on"
            )
        for name, number in own.items():
            if number.shape != tensors[name].shape:
                raise ArtefactError(
                    f"{self.method}: {name}: expected shape {list(number.shape)}, got {list(tensors[name].shape)}; "
                    "load the base model it was trained on"
                )
            number.copy_(tensors[name])

    def num_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(number.numel() for number in self.numbers)


def undo_all(undoing: list[Undo]) -> None:
    """Undo the last change first."""
    while undoing:
        undoing.pop()()


def training_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the number format to train in beside weights of `dtype`: float32 keeps small updates, float64 stays."""
    return torch.promote_types(dtype, torch.float32)
