"""The artefact: a prefix as a folder of two files, loaded with checks and never with pickle.

    prefix.safetensors   <placement>.<layer>.key, .value   [g, p, d]     .gate   [h]
                         head.weight                       [c, e]        head.bias   [c]   where labels were learned
                         <method>:<layer>.<weight>         where layers were changed too, by a LoRA, say
    prefix.json          the card: geometry, base model, training, scores, SHA-256 of the file above

A site of length 0 has no tensors. A folder named ``training/`` may stand beside them with what is needed to
train on; deleting it leaves a deployable prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from prefixkit.errors import ArtefactError
from prefixkit.files import atomic_path, read_json, sha256_file, write_json
from prefixkit.prefix.card import SCHEMA_VERSION, BaseCard, DeltaCard, HeadCard, PrefixCard, SiteCard, TrainingCard
from prefixkit.prefix.delta import Delta
from prefixkit.prefix.geometry import Site
from prefixkit.prefix.head import Head
from prefixkit.prefix.states import PrefixStates, SiteStates

TENSORS_NAME = "prefix.safetensors"
CARD_NAME = "prefix.json"
#: What an artefact consists of.
PREFIX_FILES = (TENSORS_NAME, CARD_NAME)


@dataclass(frozen=True, eq=False)
class Prefix:
    """A materialised prefix: its states, and the card that says what they are.

    Attributes:
        states: keys and values per site.
        card: geometry, base model, position offset, training, scores.
        head: the classification head that was trained with it; None for a prefix that steers text.
        deltas: what is changed in the model's layers beside the prefix, or in place of one that has length 0.
    """

    states: PrefixStates
    card: PrefixCard
    head: Head | None = None
    deltas: tuple[Delta, ...] = ()

    @classmethod
    def from_states(
        cls,
        states: PrefixStates,
        *,
        base: BaseCard,
        position_offset: int | None = None,
        head: Head | None = None,
        deltas: Sequence[Delta] = (),
        infix: bool = False,
        training: TrainingCard | None = None,
        licence: str = "",
    ) -> "Prefix":
        """Make a prefix from states.

        Args:
            states: keys and values per site; copied, so later training steps do not change the prefix.
            base: the model they belong to.
            position_offset: position of the first text token; left out, `Geometry.text_position`.
            head: the classification head trained with them, if one was.
            deltas: changes of the model's layers trained with them, if any were; one per method.
            infix: the virtual tokens stand between input and target.
            training: how they were trained, if they were.
            licence: terms of the base model and the data.
        """
        position_offset = states.geometry.text_position(states.lengths, is_gated=states.has_gate, asked=position_offset)
        card = PrefixCard(
            base=base,
            position_offset=position_offset,
            sites=tuple(
                SiteCard(
                    placement=site.placement,
                    layer=site.layer,
                    query_heads=site.query_heads,
                    kv_heads=site.kv_heads,
                    head_dim=site.head_dim,
                    num_virtual_tokens=length,
                )
                for site, length in zip(states.geometry.sites, states.lengths, strict=True)
            ),
            infix=infix,
            head=None if head is None else HeadCard.of(head),
            deltas=tuple(map(DeltaCard.of, deltas)),
            training=training,
            licence=licence,
        )
        return cls(states.detach(), card, head, tuple(deltas))

    def __repr__(self) -> str:
        parts = " + ".join(self.parts) or "nothing"
        tokens, numbers = self.states.num_virtual_tokens, self.num_parameters
        return f"Prefix({parts} for {self.card.base.id}, {tokens} virtual tokens, {numbers:,} numbers)"

    @property
    def position_offset(self) -> int:
        """Position of the first text token."""
        return self.card.position_offset

    @property
    def is_infix(self) -> bool:
        """Whether it has virtual tokens between input and target."""
        return self.card.infix and any(self.states.lengths)

    @property
    def parts(self) -> tuple[str, ...]:
        """What it consists of: ``"prefix"`` where it has virtual tokens, and the method of each delta."""
        own = ("prefix",) if any(self.states.lengths) else ()
        return (*own, *(str(delta.method) for delta in self.deltas))

    @property
    def num_parameters(self) -> int:
        """Numbers it holds: keys and values, gates, deltas, and the head's."""
        held = self.states.num_parameters + sum(delta.num_parameters for delta in self.deltas)
        return held if self.head is None else held + self.head.num_parameters

    @property
    def trained_parameters(self) -> int:
        """Numbers that had to be learned, those of an MLP that is folded away included.

        Of what was not trained, or no longer has all its parts, the numbers it holds.
        """
        training = self.card.training
        return self.num_parameters if training is None or self.card.turned_off else training.trained_parameters

    @property
    def flops_per_token(self) -> int:
        """Operations it adds to each token of text that the base model reads or writes."""
        return self.states.flops_per_token + sum(delta.flops_per_token for delta in self.deltas)

    @property
    def nbytes(self) -> int:
        """Memory it takes beside the base model, in bytes."""
        return self.states.nbytes + sum(tensor.nbytes for delta in self.deltas for tensor in delta.tensors.values())

    def without(self, *parts: str) -> "Prefix":
        """Return the artefact with some of its `parts` turned off; the text stays at the positions it was trained at.

        The card says which, beside how all of them were trained.

        Raises:
            ArtefactError: it has no such part.
        """
        if not parts:
            return self
        unknown = sorted(set(parts) - set(self.parts))
        if unknown:
            raise ArtefactError(
                f"{unknown[0]}: not a part of this artefact, which has {', '.join(self.parts) or 'none'}"
            )
        deltas = tuple(delta for delta in self.deltas if delta.method not in parts)
        sites = self.card.sites
        states = self.states
        if "prefix" in parts:
            states = PrefixStates.empty(states.geometry)
            sites = tuple(site.model_copy(update={"num_virtual_tokens": 0}) for site in sites)
        offset = 0 if self.card.infix and "prefix" in parts else self.card.position_offset
        infix = self.card.infix and "prefix" not in parts
        changed = {
            "sites": sites,
            "infix": infix,
            "position_offset": offset,
            "deltas": tuple(map(DeltaCard.of, deltas)),
            "turned_off": (*self.card.turned_off, *(part for part in self.parts if part in parts)),
            "content_hash": "",
            "scores": {},
        }
        return replace(self, states=states, deltas=deltas, card=self.card.model_copy(update=changed))

    def with_scores(self, scores: dict[str, float]) -> "Prefix":
        """Return the same prefix with what evaluation measured."""
        return replace(self, card=self.card.model_copy(update={"scores": scores}))

    def save(self, folder: str | Path) -> "Prefix":
        """Write the artefact: both files are written aside and flushed, then renamed into place.

        Returns:
            The prefix with the content hash of what was written.

        Raises:
            ArtefactError: the folder cannot be written to; files already there are untouched.
        """
        folder = Path(folder)
        tensors = _to_tensors(self.states) | _head_tensors(self.head) | _delta_tensors(self.deltas)
        try:
            with atomic_path(folder / CARD_NAME) as card_path, atomic_path(folder / TENSORS_NAME) as path:
                path.write_bytes(save(tensors))  # not save_file, whose full disk is no OSError
                card = self.card.model_copy(update={"content_hash": sha256_file(path)})
                write_json(card_path, card.to_json())
        except (OSError, ValueError) as error:
            raise ArtefactError(f"{folder}: cannot save the artefact: {error}") from None
        return replace(self, card=card)

    @classmethod
    def load(cls, folder: str | Path) -> "Prefix":
        """Read an artefact and check it: schema, hash, shapes against the geometry, finite numbers.

        Args:
            folder: an artefact, or a run folder.

        Raises:
            ArtefactError: something is missing, damaged, or from a newer schema; the message says what.
        """
        folder = Path(folder)
        card = _read_card(folder)
        path = folder / TENSORS_NAME
        if not path.is_file():
            raise ArtefactError(f"{folder}: has {CARD_NAME} but no {TENSORS_NAME}; copy the whole folder again")
        content = path.read_bytes()  # read once: what is checked is what is used, whoever writes the file meanwhile
        found = sha256(content).hexdigest()
        if found != card.content_hash:
            raise ArtefactError(
                f"{path}: content hash {found[:12]} is not the card's {card.content_hash[:12]}; "
                "the file was truncated or changed, copy it again"
            )
        try:
            tensors = load(content)
        except SafetensorError as error:
            raise ArtefactError(f"{path}: not a readable safetensors file: {error}") from None
        deltas = tuple(_take_delta(tensors, each, path) for each in card.deltas)
        tensors = _in_one_block(tensors, path)
        head = None if card.head is None else _take_head(tensors, card.head, path)
        return cls(_from_tensors(tensors, card, path), card, head, deltas)


def _in_one_block(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return tensors as parts of one block of memory, all numbers checked; one block per number format, the head apart.

    A thousand prefixes in blocks of their own layers' size would take a tenth more memory, and each twice as long.
    """
    found: dict[str, Tensor] = {}
    blocks: dict[tuple[torch.dtype, bool], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        blocks.setdefault((tensor.dtype, name.startswith("head.")), {})[name] = tensor
    for own in blocks.values():
        block = torch.cat([tensor.flatten() for tensor in own.values()])
        if not block.sum().isfinite() and not torch.isfinite(block).all():  # a sum of large numbers may overflow
            name = next(name for name, tensor in own.items() if not torch.isfinite(tensor).all())
            raise ArtefactError(f"{path}: {name} holds NaN or infinite numbers")
        parts = block.split([tensor.numel() for tensor in own.values()])
        found |= {name: part.view(tensor.shape) for (name, tensor), part in zip(own.items(), parts, strict=True)}
    return found


def _to_tensors(states: PrefixStates) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for site, own in zip(states.geometry.sites, states.sites, strict=True):
        if own.length:
            tensors[f"{site.name}.key"] = own.key.detach().cpu().contiguous()
            tensors[f"{site.name}.value"] = own.value.detach().cpu().contiguous()
            if own.gate is not None:
                tensors[f"{site.name}.gate"] = own.gate.detach().cpu().contiguous()
    return tensors


def _from_tensors(tensors: dict[str, Tensor], card: PrefixCard, path: Path) -> PrefixStates:
    geometry = card.geometry()
    sites = tuple(
        _take_site(tensors, card_site, site, path) for card_site, site in zip(card.sites, geometry.sites, strict=True)
    )
    if tensors:
        raise ArtefactError(f"{path}: unexpected tensor {min(tensors)}")
    return PrefixStates(geometry, sites)


def _take_site(tensors: dict[str, Tensor], card: SiteCard, site: Site, path: Path) -> SiteStates:
    length = card.num_virtual_tokens
    if length == 0:
        empty = torch.zeros(site.kv_heads, 0, site.head_dim)
        return SiteStates(empty, empty)
    shapes: dict[str, tuple[int, ...]] = {
        "key": (site.kv_heads, length, site.head_dim),
        "value": (site.kv_heads, length, site.head_dim),
    }
    if f"{site.name}.gate" in tensors:
        shapes["gate"] = (site.query_heads,)
    return SiteStates(**{part: _take(tensors, f"{site.name}.{part}", shape, path) for part, shape in shapes.items()})


def _head_tensors(head: Head | None) -> dict[str, Tensor]:
    if head is None:
        return {}
    parts = {"head.weight": head.weight, "head.bias": head.bias}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in parts.items()}


def _take_head(tensors: dict[str, Tensor], card: HeadCard, path: Path) -> Head:
    classes = len(card.labels)
    weight = _take(tensors, "head.weight", (classes, card.hidden_size), path)
    return Head(card.kind, card.labels, weight, _take(tensors, "head.bias", (classes,), path), card.pooling)


def _delta_tensors(deltas: Sequence[Delta]) -> dict[str, Tensor]:
    return {
        f"{delta.method}:{name}": tensor.detach().cpu().contiguous()
        for delta in deltas
        for name, tensor in delta.tensors.items()
    }


def _take_delta(tensors: dict[str, Tensor], card: DeltaCard, path: Path) -> Delta:
    taken = {name: _take(tensors, f"{card.method}:{name}", shape, path) for name, shape in card.tensors.items()}
    for name, tensor in taken.items():
        if not torch.isfinite(tensor).all():
            raise ArtefactError(f"{path}: {card.method}:{name} holds NaN or infinite numbers")
    return Delta(card.method, card.settings, taken)


def _take(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], path: Path) -> Tensor:
    """Take one tensor out of those read, checked."""
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise ArtefactError(f"{path}: tensor {name} is missing")
    if tuple(tensor.shape) != shape:
        raise ArtefactError(f"{path}: {name}: expected shape {list(shape)}, got {list(tensor.shape)}")
    return tensor


def _read_card(folder: Path) -> PrefixCard:
    path = folder / CARD_NAME
    if not path.is_file():
        what = "no such folder" if not folder.is_dir() else f"has no {CARD_NAME}"
        raise ArtefactError(f"{folder}: {what}; expected an artefact or a finished run")
    try:
        values = read_json(path)
    except (ValueError, OSError) as error:
        raise ArtefactError(f"{path}: not readable as JSON: {error}") from None
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtefactError(
            f"{path}: schema version {version!r}, this prefixkit reads {SCHEMA_VERSION}; upgrade prefixkit"
        )
    try:
        return PrefixCard.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtefactError(f"{path}: {where}: {first['msg']}") from None
