"""Arithmetic in float64 throughout, though families run their norms, routers and eager softmax in float32."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SOFTMAX = {torch.softmax, torch.nn.functional.softmax, Tensor.softmax}
_CASTS = {Tensor.to, Tensor.type}


class KeepFloat64(TorchFunctionMode):
    """Leaves float64 tensors float64 where a model asks for float32.

    Two implementations that differ in the last bit of float64 may round to different float32 numbers in between; a
    comparison at 1e-10 would then say more about rounding than about a prefix.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer `x.float()`, `x.to(torch.float32)` and `softmax(x, dtype=torch.float32)` in float64."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.dtype == torch.float64:
            if func is Tensor.float:
                return first
            if func in _CASTS:
                args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            if func in _SOFTMAX or func in _CASTS:
                kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in kwargs.items()}
        return func(*args, **kwargs)
