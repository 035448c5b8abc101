"""Seeds: one per run, and named streams derived from it.

The library never seeds torch globally. Code that needs randomness asks for a stream by name, so adding a
consumer never shifts the numbers another one draws.
"""

import hashlib


def derive(seed: int, stream: str) -> int:
    """Return the seed of a named stream, a non-negative 63-bit integer.

    Args:
        seed: the run's seed; 0 is a seed like any other.
        stream: what the numbers are for, such as ``"data.order"``.
    """
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
