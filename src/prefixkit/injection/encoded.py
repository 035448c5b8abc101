"""Which prefix an encoder's output was computed under, so that a decoder does not go on from it under another.

An encoder's output can be kept and given to the model again (`encoder_outputs`). Computed without the prefix that is
attached, it would leave the encoder's part of it out without a word. What is computed under a prefix that has virtual
tokens in the encoder is marked. After `detach` nobody looks at marks: a bare model takes any output.
"""

from typing import Any

from prefixkit.errors import InjectionError
from prefixkit.prefix import Bank

_ATTRIBUTE = "_prefixkit_encoded_under"


def mark(output: Any, token: Bank | None) -> None:
    """Write on an encoder's output under which prefix it was computed.

    Args:
        output: what the encoder returned; its first entry is the last hidden state.
        token: tells prefixes apart, as for caches.
    """
    for marked in (output, output[0]):  # either may be handed on without the other; `generate` puts repeated rows in it
        if not isinstance(marked, tuple):
            setattr(marked, _ATTRIBUTE, token)


def check(outputs: Any, token: Bank | None, *, needs_mark: bool) -> None:
    """Refuse an encoder's output that was computed under another prefix.

    Args:
        outputs: what the encoder returned.
        token: of the prefix that is attached.
        needs_mark: that prefix has virtual tokens in the encoder, so an output without a mark is another's too.

    Raises:
        InjectionError: it was, or its rows may stand in another order than their prefixes.
    """
    on_states: Bank | None = getattr(outputs[0], _ATTRIBUTE, None)
    marked = on_states or getattr(outputs, _ATTRIBUTE, None)
    if marked is None and not needs_mark:
        return
    has_other_rows = on_states is None and marked is not None and len(marked) > 1
    if marked is None or token is None or has_other_rows or not marked.equals(token):
        raise InjectionError(
            "encoder_outputs were computed without the prefix that is attached; compute them inside attach(), "
            "or give the model what its encoder is to read"
        )
