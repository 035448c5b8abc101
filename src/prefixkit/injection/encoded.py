"""Which prefix an encoder's output was computed under, so that a decoder does not go on from it under another.

An encoder's output can be kept and given to the model again (`encoder_outputs`). Computed without the prefix that is
attached, it would leave the encoder's part of it out without a word.
"""

from typing import Any

from torch import Tensor

from prefixkit.errors import InjectionError
from prefixkit.injection.caches import is_same

_ATTRIBUTE = "_prefixkit_encoded_under"


def mark(output: Any, token: object) -> None:
    """Write on an encoder's output under which prefix it was computed.

    Args:
        output: what the encoder returned; its first entry is the last hidden state.
        token: tells prefixes apart, as for caches.
    """
    setattr(output[0], _ATTRIBUTE, token)


def check(outputs: Any, token: object) -> None:
    """Refuse an encoder's output that was computed under another prefix, or under none.

    Raises:
        InjectionError: it was.
    """
    hidden: Tensor = outputs[0]
    if not is_same(getattr(hidden, _ATTRIBUTE, None), token):
        raise InjectionError(
            "encoder_outputs were computed without the prefix that is attached; compute them inside attach(), "
            "or give the model what its encoder is to read"
        )
