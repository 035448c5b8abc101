"""How a frozen model reads a prefix. `attention` is the file to read first."""

from prefixkit.injection.attach import Attachable, Handle, attach

__all__ = ["Attachable", "Handle", "attach"]
