"""What is attached to a model: saved prefixes, or one in training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.errors import InjectionError, UnsupportedModelError
from prefixkit.methods import DeltaModule, SoftPrompt
from prefixkit.models.fingerprint import check_base
from prefixkit.models.inspect import Anatomy, Kind
from prefixkit.models.quantised import check_differentiable
from prefixkit.prefix import Bank, BaseCard, Delta, Geometry, Prefix, PrefixEncoder, PrefixStates, stack

#: Something that is read, and how often each of its parts was changed in place.
Stamp = tuple[object, tuple[int, ...]]


@dataclass(frozen=True)
class Saved:
    """Prefixes that no longer change.

    Attributes:
        is_infix: they stand between input and target.
        deltas: what is changed in the model's layers beside them.
    """

    bank: Bank
    is_infix: bool = False
    deltas: tuple[Delta, ...] = ()

    def read(self) -> Bank:
        """Return the bank of a forward pass."""
        return self.bank

    @property
    def stamp(self) -> Stamp:
        """What changes when something else is to be read."""
        return self.bank, ()

    def token(self, read: Bank, *, of_pass: bool = False) -> Bank | None:
        """What tells these prefixes from others: their numbers."""
        return self.bank


@dataclass(frozen=True)
class InTraining:
    """A prefix encoder, the position of the first text token behind its prefix, and changes in training beside it."""

    encoder: PrefixEncoder
    position: int
    deltas: tuple[DeltaModule, ...] = ()
    is_infix: bool = False

    def read(self) -> Bank:
        """Run the encoder; return the bank of a forward pass."""
        return stack([self.encoder()], [self.position], self._beside)

    @property
    def _beside(self) -> object:
        return _versions(self.deltas), self.is_infix

    @property
    def stamp(self) -> Stamp:
        """What changes when something else is to be read, known without running the encoder.

        Weights that are changed through `.data` do not count; what outlives a forward pass asks for `token`.
        """
        return self.encoder, tuple(parameter._version for parameter in self.encoder.parameters())

    def token(self, read: Bank, *, of_pass: bool = False) -> Bank | None:
        """What tells this prefix, as it is now, from others and from itself after another step: its numbers.

        Args:
            read: the bank of the present forward pass.
            of_pass: with dropout too, take the numbers of this pass; if not, the encoder runs once more, without it.
        """
        if self.encoder.training and self.encoder.dropout > 0 and not of_pass:
            return stack([self.encoder.materialise()], [self.position], self._beside)
        return read.detach()


@dataclass(frozen=True)
class Prompted:
    """A soft prompt in training, and the position of the first text token behind it.

    Attributes:
        states: has the model compute the keys and values of embeddings, with gradients.
    """

    prompt: SoftPrompt
    position: int
    states: Callable[[Tensor], PrefixStates]
    is_infix = False
    deltas = ()

    def read(self) -> Bank:
        """Have the model read the embeddings; return the bank of a forward pass."""
        return stack([self.states(self.prompt())], [self.position])

    @property
    def stamp(self) -> Stamp:
        """What changes when something else is to be read."""
        return self.prompt, tuple(parameter._version for parameter in self.prompt.parameters())

    def token(self, read: Bank, *, of_pass: bool = False) -> Bank | None:
        """What tells this prompt, as it is now, from others; with dropout, each pass from the next."""
        return read.detach()


@dataclass(frozen=True)
class Nothing:
    """No prefix to read, in a model whose hooks are in place: a bank without virtual tokens.

    Attributes:
        deltas: changes in training of the model's layers.
        position: of the first text token.
    """

    geometry: Geometry
    deltas: tuple[DeltaModule, ...] = ()
    position: int = 0
    is_infix = False

    def read(self) -> Bank:
        """Return the bank of a forward pass."""
        return stack([PrefixStates.empty(self.geometry)], [self.position], _versions(self.deltas))

    @property
    def stamp(self) -> Stamp:
        """What changes when something else is to be read."""
        return None, ()

    def token(self, read: Bank, *, of_pass: bool = False) -> Bank | None:
        """What is read under it belongs to no prefix, but perhaps to the changes in training as they are now."""
        return read if self.deltas else None


def _versions(deltas: tuple[DeltaModule, ...]) -> object:
    """Return what tells changes in training from others, and from themselves after another step."""
    return tuple((delta.serial, *(number._version for number in delta.numbers)) for delta in deltas)


def require_trainable(module: nn.Module) -> None:
    """Refuse what no gradient can reach.

    Raises:
        InjectionError: it was made under `torch.inference_mode`.
    """
    if any(parameter.is_inference() for parameter in module.parameters()):
        raise InjectionError(
            "the encoder was made under torch.inference_mode(), so no gradient reaches it; make it outside"
        )


def require_own(deltas: Sequence[DeltaModule], model: PreTrainedModel) -> None:
    """Refuse changes in training that this model cannot be trained with.

    Raises:
        UnsupportedModelError: the model passes them no gradient.
        InjectionError: one was made for another model, or under `torch.inference_mode`.
    """
    for delta in deltas:
        check_differentiable(model)
        require_trainable(delta)
        if not delta.is_for(model):
            raise InjectionError(f"{delta.method}: was made for the layers of another model; build it for this one")


def require_order(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Refuse an infix in a model whose text is not read in order.

    Raises:
        UnsupportedModelError: it is not.
    """
    if anatomy.kind is not Kind.DECODER:
        raise UnsupportedModelError(
            f"infix: {type(model).__name__} is no decoder-only model, so nothing lies between input and target; "
            "choose prefix"
        )


Attached = Saved | InTraining | Prompted | Nothing


def from_encoder(
    model: PreTrainedModel,
    anatomy: Anatomy,
    encoder: PrefixEncoder,
    offset: int | None,
    deltas: tuple[DeltaModule, ...] = (),
    *,
    infix: bool = False,
) -> InTraining:
    """Return a prefix encoder as a source.

    Args:
        model: the base model.
        anatomy: its sites.
        encoder: made for the same geometry.
        offset: the position asked for; None for `Geometry.text_position`.
        deltas: changes in training beside it.
        infix: the virtual tokens stand between input and target.

    Raises:
        UnsupportedModelError: the model passes it no gradient, or is no decoder-only one, where an infix is none.
        InjectionError: it has another geometry, or was made under `torch.inference_mode`.
        ConfigError: a position for a model whose text keeps its positions.
    """
    check_differentiable(model)
    if encoder.geometry != anatomy.geometry:
        raise InjectionError("the encoder was made for a model of another geometry")
    require_trainable(encoder)
    position = encoder.text_position(offset)
    if infix:
        require_order(model, anatomy)
    return InTraining(encoder, position, deltas, infix)


def from_prompt(
    model: PreTrainedModel,
    anatomy: Anatomy,
    prompt: SoftPrompt,
    offset: int | None,
    states: Callable[[Tensor], PrefixStates],
) -> Prompted:
    """Return a soft prompt as a source.

    Raises:
        UnsupportedModelError: the model passes it no gradient.
        InjectionError: it has another geometry, or was made under `torch.inference_mode`.
    """
    check_differentiable(model)
    require_trainable(prompt)
    if prompt.geometry != anatomy.geometry:
        raise InjectionError("the soft prompt was made for a model of another geometry")
    return Prompted(prompt, anatomy.geometry.text_position(prompt.lengths, is_gated=False, asked=offset), states)


def require_attachable(given: object) -> None:
    """Raise if something cannot be attached, and say what makes a prefix of it.

    Raises:
        InjectionError: it is neither a prefix, one per row, an encoder, nor None.
    """
    rows = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    is_rows = rows is given
    known = (Prefix,) if is_rows else (Prefix, PrefixEncoder, SoftPrompt)
    for each in rows:
        if each is None or isinstance(each, known):
            continue
        hint = ""
        if isinstance(each, str | PathLike):
            hint = f"; Prefix.load({str(each)!r}) reads one from there"
        elif isinstance(each, PrefixStates):
            hint = "; Prefix.from_states(states, base=...) makes one of them"
        expected = "a Prefix or None per row" if is_rows else "a Prefix, one per row, a PrefixEncoder or None"
        raise InjectionError(f"expected {expected}, got {type(each).__name__}{hint}")


def from_prefixes(
    model: PreTrainedModel, anatomy: Anatomy, prefix: Prefix | Sequence[Prefix | None] | None
) -> Saved | None:
    """Return saved prefixes, one for all rows or one per row, as a source; None if there is nothing to attach.

    Raises:
        BaseMismatchError: a prefix was trained on another base model.
        InjectionError: a prefix has another geometry, or there are no rows.
    """
    rows = [prefix] if isinstance(prefix, Prefix) or prefix is None else list(prefix)
    if not rows:
        raise InjectionError("no rows: give one prefix (or None) per row of the batch")
    bases: dict[str | None, BaseCard] = {}
    for each in rows:
        if each is not None:
            if each.states.geometry != anatomy.geometry:
                raise InjectionError(
                    f"the artefact of {each.card.base.id} has another geometry than this model; load its base model"
                )
            bases.setdefault(each.card.base.fingerprint, each.card.base)
    for base in bases.values():  # once each: a look at the model takes as long as a switch
        check_base(model, base)
    if all(each is None for each in rows):
        return None
    distinct = list(dict.fromkeys(rows))
    states = [None if each is None else each.states for each in distinct]
    infixes = {each.is_infix for each in rows if each is not None and any(each.states.lengths)}
    if len(infixes) > 1:
        raise InjectionError("an infix and a prefix stand at different places; attach them one after the other")
    is_infix = infixes == {True}
    if is_infix:
        require_order(model, anatomy)
    offsets = [0 if each is None else each.position_offset for each in distinct]
    deltas = deltas_of(prefix)
    bank = stack(states, offsets, (deltas, is_infix))
    if len(distinct) < len(rows):
        places = {each: place for place, each in enumerate(distinct)}
        bank = bank.rows(torch.tensor([places[each] for each in rows]))
    return Saved(bank, is_infix, deltas)


def deltas_of(prefix: Prefix | Sequence[Prefix | None] | None) -> tuple[Delta, ...]:
    """Return what saved prefixes change in the model's layers, which must be the same for all rows.

    Raises:
        InjectionError: it is not.
    """
    rows = [prefix] if isinstance(prefix, Prefix) or prefix is None else list(prefix)
    each = [() if row is None else row.deltas for row in rows]
    if any(deltas != each[0] for deltas in each):
        method = next(delta.method for deltas in each for delta in deltas)
        raise InjectionError(
            f"{method} changes the layers for all rows of a batch at once; attach artefacts with the same one, give "
            "them one after the other, or turn it off with without()"
        )
    return each[0]
