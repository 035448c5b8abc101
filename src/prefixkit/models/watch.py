"""Whether a model is still what it was when somebody looked: asked at every attach and switch, so it must be quick.

A look at all numbers takes a second; what is watched instead changes with settings, modules and weights: torch's
counters of changes in place, where each weight lies and in which shape, and its first and last number. The counters
alone miss changes through ``.data``: that is how PEFT merges adapters, and how embeddings of added tokens, the last
ones, are often set.
"""

from collections.abc import Callable, Sequence
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from functools import partial
from itertools import chain
from operator import attrgetter, is_not, methodcaller
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.compat import own_part
from prefixkit.models.settings import seen_settings
from prefixkit.models.weights import all_modules, plain_parts

_Cell = c_uint8 | c_uint16 | c_uint32 | c_uint64
#: Reads a number in memory as an integer, by its size in bytes.
_CELLS: dict[int, type[_Cell]] = {1: c_uint8, 2: c_uint16, 4: c_uint32, 8: c_uint64}

_children, _own_weights = attrgetter("_modules"), attrgetter("_parameters")
_version, _layout, _value = attrgetter("_version"), attrgetter("shape", "dtype"), attrgetter("value")
_is_there = partial(is_not, None)


class Watch:
    """A look at a model, compared with how it is now; the model is not kept alive by it.

    Args:
        model: the model as it is at this moment.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        modules = all_modules(model)
        self._settings = seen_settings(model.config)
        self._modules = [ref(module) for module in modules]
        self._links = _links(modules)
        weights = _weights(modules)
        plain, other = _sorted(weights)
        self._counters = _counters(plain, other)
        self._layouts = [*map(_layout, weights)]
        self._places = [*map(Tensor.data_ptr, plain)]
        # Read only while every weight lies where it lay, in one piece of the same size.
        self._cells = [cell for weight in plain for cell in _end_cells(weight)]
        self._ends = [*map(_value, self._cells)]
        self._others = _state_of(other)

    def holds(self, model: PreTrainedModel) -> bool:
        """Whether nothing about the model seems to have changed."""
        modules = [module for each in self._modules if (module := each()) is not None]
        if len(modules) != len(self._modules) or _links(modules) != self._links:
            return False
        weights = _weights(modules)
        plain, other = _sorted(weights)
        return (
            _counters(plain, other) == self._counters
            and [*map(_layout, weights)] == self._layouts
            and [*map(Tensor.data_ptr, plain)] == self._places
            and [*map(_value, self._cells)] == self._ends
            and _state_of(other) == self._others
            and seen_settings(model.config) == self._settings
        )


def _links(modules: Sequence[nn.Module]) -> list[int]:
    """Return which modules are whose children."""
    return [*map(id, _held(_children, modules))]


def _weights(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [*filter(_is_there, _held(_own_weights, modules))]


def _held(dictionary_of: Callable[[nn.Module], Any], modules: Sequence[nn.Module]) -> list[Any]:
    """Return all that is in one dictionary of each module."""
    each = [*map(dictionary_of, modules)]
    try:
        return [*chain.from_iterable(map(dict.values, each))]
    except TypeError:  # modules that torch compiled have something else than a dictionary
        return [*chain.from_iterable(map(methodcaller("values"), each))]


def _sorted(weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights whose numbers lie in this machine's memory one after the other, and the others."""
    plain: list[Tensor] = []
    other: list[Tensor] = []
    for weight in weights:
        is_plain = type(weight) is nn.Parameter and weight.is_cpu and weight.is_contiguous()
        (plain if is_plain else other).append(weight)
    return plain, other


def _counters(plain: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[int, int]:
    return sum(map(_version, plain)), sum(map(_version, map(own_part, other)))


def _end_cells(weight: Tensor) -> list[_Cell]:
    """Return where the first and last number of a weight are, as integers that follow them."""
    start, size, count = weight.data_ptr(), weight.itemsize, weight.numel()
    kind = _CELLS.get(size, c_uint8)
    return [kind.from_address(start), kind.from_address(start + (count - 1) * size)] if count else []


def _state_of(weights: Sequence[Tensor]) -> tuple[list[int], list[float]]:
    """Return what changes with weights on other devices, quantised or spread over processes; it takes longer."""
    # What merges an adapter into a quantised weight puts a new one in its place, with a counter of its own; so does
    # what spreads a weight over several processes.
    packed = [id(weight) for weight in weights if type(weight) is not nn.Parameter and not weight.is_meta]
    held = [own_part(weight) for weight in weights if not weight.is_meta]
    parts = (part for weight in held for _, part in plain_parts("", weight) if part.numel())
    ends = [part[(end,) * part.dim()].double() for part in parts for end in (0, -1)]
    return packed, torch.stack(ends).tolist() if ends else []
