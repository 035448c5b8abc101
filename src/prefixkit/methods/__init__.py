"""Methods other than the prefix: what they train, and how it comes into a frozen model.

Those that change its layers (LoRA, IA3, BitFit, adapters, fine-tuning) are each a `DeltaModule`, which
`injection.attach` puts in beside a prefix, or alone. Those that train the embeddings of virtual tokens are each a
`SoftPrompt`, which is a prefix as soon as the model has read it.
"""

from prefixkit.methods.delta import DeltaModule, Undo, undo_all
from prefixkit.methods.registry import build_delta, check_installed, rate_of, restore_delta
from prefixkit.methods.soft_prompt import SoftPrompt, embedding_geometry, new_soft_prompt

__all__ = [
    "DeltaModule",
    "SoftPrompt",
    "Undo",
    "build_delta",
    "check_installed",
    "embedding_geometry",
    "new_soft_prompt",
    "rate_of",
    "restore_delta",
    "undo_all",
]
