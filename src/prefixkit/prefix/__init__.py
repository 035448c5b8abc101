"""The heart: what a prefix is. Knows torch, not transformers.

`encoder` is the file to read first.
"""

from prefixkit.prefix.artefact import PREFIX_FILES, Prefix
from prefixkit.prefix.bank import Bank, SiteBank, stack
from prefixkit.prefix.card import BaseCard, DeltaCard, HeadCard, PrefixCard, SiteCard, TrainingCard
from prefixkit.prefix.delta import Delta
from prefixkit.prefix.encoder import PrefixEncoder
from prefixkit.prefix.geometry import Geometry, Site
from prefixkit.prefix.head import ClassificationHead, Head, HeadKind
from prefixkit.prefix.init import distinct_tokens, init_mlp, init_random, init_zero, match_units, reproduce
from prefixkit.prefix.states import PrefixStates, SiteStates

__all__ = [
    "PREFIX_FILES",
    "Bank",
    "BaseCard",
    "ClassificationHead",
    "Delta",
    "DeltaCard",
    "Geometry",
    "Head",
    "HeadCard",
    "HeadKind",
    "Prefix",
    "PrefixCard",
    "PrefixEncoder",
    "PrefixStates",
    "Site",
    "SiteBank",
    "SiteCard",
    "SiteStates",
    "TrainingCard",
    "distinct_tokens",
    "init_mlp",
    "init_random",
    "init_zero",
    "match_units",
    "reproduce",
    "stack",
]
