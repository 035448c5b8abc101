"""Attach a prefix to a model, and take it off again without a trace.

    with attach(model, prefix):                     one prefix for every row
        model.generate(...)
    with attach(model, [positive, negative, None]):  one per row, any lengths
        ...
    handle = attach(model, encoder)                 a prefix in training
    ...
    handle.detach()

Inside, everything is plain transformers: forward, generate, gradient checkpointing, caches. Four things are changed
and restored: the name of the attention implementation; a slot on each attention layer; a pair of hooks on each stack,
which choose the rows' prefixes, mark caches and, in a decoder-only model, move the positions past the prefix; and
`generate`, which may repeat rows for beams (a plain forward may not), and under which no other thread may detach. The
prefix encoder runs once per forward pass of the whole model: for that an encoder-decoder has hooks on the module that
runs both stacks.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.compat import cache_of, eager_attention
from prefixkit.config import Placement
from prefixkit.errors import InjectionError
from prefixkit.injection import encoded
from prefixkit.injection.attention import NAMES
from prefixkit.injection.caches import Caches
from prefixkit.injection.positions import check_context, moved_positions, past_tokens
from prefixkit.injection.slots import BANK, Current, Slot, Users, clear, has_slot, place
from prefixkit.models.adapters import plain_model
from prefixkit.models.fingerprint import check_base
from prefixkit.models.inspect import Anatomy, inspect_model
from prefixkit.models.quantised import check_differentiable
from prefixkit.prefix import Bank, Prefix, PrefixEncoder, stack

Attachable = Prefix | PrefixEncoder | Sequence[Prefix | None] | None


def attach(model: nn.Module, prefix: Attachable, *, position_offset: int | None = None) -> "Handle":
    """Make a frozen model read a prefix.

    Args:
        model: a transformers model with nothing attached: decoder-only, encoder-decoder, or an encoder; or a
            `PeftModel` around one, whose LoRA or other adapters then work beside the prefix.
        prefix: one prefix for every row; a sequence with one prefix (or None) per row of the coming batches; an
            encoder to train; or None, which leaves the model alone.
        position_offset: for a prefix encoder, the position of the first text token; left out,
            `Geometry.text_position`.

    Returns:
        A handle: a context manager, or call its `detach`.

    Raises:
        UnsupportedModelError: the model cannot take a prefix, or passes an encoder no gradient.
        BaseMismatchError: a prefix was trained on another base model.
        InjectionError: something is attached already, or a prefix has another geometry.
        ConfigError: a position offset for a model whose text keeps its positions.
    """
    base: PreTrainedModel = plain_model(model)
    anatomy = inspect_model(base)
    if any(has_slot(module) for module in anatomy.attention):
        raise InjectionError("a prefix is attached to this model already; detach it first")
    source: Callable[[], Bank] | None
    if isinstance(prefix, PrefixEncoder):
        check_differentiable(base)
        source = _from_encoder(anatomy, prefix, position_offset)
    else:
        if position_offset is not None:
            raise InjectionError("position_offset: a saved prefix brings its own; give it for an encoder only")
        bank = _build_bank(base, anatomy, prefix)
        source = None if bank is None else lambda: bank
    rows = len(prefix) if isinstance(prefix, Sequence) else None
    return Handle(base, anatomy, source, rows, prefix if isinstance(prefix, PrefixEncoder) else None)


class Handle(AbstractContextManager["Handle"]):
    """What is attached to a model; `detach` restores the model exactly. Made by `attach`.

    Args:
        model: the model.
        anatomy: its sites.
        source: gives the bank of a forward pass; None attaches nothing.
        rows: number of rows the bank describes, or None for one prefix shared by all rows.
        encoder: what gives the bank, if it is in training.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        source: Callable[[], Bank] | None,
        rows: int | None,
        encoder: PrefixEncoder | None = None,
    ) -> None:
        self._model, self._anatomy, self._source, self._rows = model, anatomy, source, rows
        self._encoder = encoder
        self._current, self._caches = Current(), Caches()
        self._users, self._generating = Users(), Users()
        self._pass = Current()  # the whole bank of the forward pass under way, where one module runs both stacks
        self._restore: list[Callable[[], object]] = []
        if source is not None:
            self._install()

    def detach(self) -> None:
        """Restore the model; calling it again does nothing.

        Raises:
            InjectionError: another thread is running the model; the prefix stays attached.
        """
        if self._restore and self._users.has_others():
            raise InjectionError(
                "another thread is running the model with this prefix; join it, then call detach() again"
            )
        while self._restore:
            self._restore.pop()()
        self._caches.close()
        self._current.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detach."""
        self.detach()

    def _install(self) -> None:
        model, implementation = self._model, self._model.config._attn_implementation
        if implementation == "eager":
            for module in self._anatomy.attention:
                eager_attention(module)  # refuses a family without one before anything is changed
        sites = self._anatomy.geometry.sites
        for index, (site, module) in enumerate(zip(sites, self._anatomy.attention, strict=True)):
            is_causal = site.placement is Placement.DECODER_SELF
            place(module, Slot(index, is_causal, implementation, self._current))
            self._restore.append(partial(clear, module))
        self._restore.append(lambda: model.set_attn_implementation(implementation))
        model.set_attn_implementation(NAMES[implementation])
        stacks, root = self._anatomy.stacks, self._anatomy.root
        hooks = [stack.register_forward_pre_hook(self._before_stack, with_kwargs=True) for stack in stacks]
        hooks += [stack.register_forward_hook(self._after_stack, always_call=True) for stack in stacks]
        if len(stacks) > 1:
            hooks.append(root.register_forward_pre_hook(self._before_pass, with_kwargs=True))
            hooks.append(root.register_forward_hook(self._after_pass, always_call=True))
        self._restore.extend(hook.remove for hook in hooks)
        self._shadow("generate", partial(self._generate, vars(model).get("generate")))
        self._shadow("init_continuous_batching", _refuse_batching)

    def _shadow(self, name: str, replacement: Callable[..., Any]) -> None:
        """Put an attribute in front of a method of the model, or of what a caller has put there already."""
        model, own = self._model, vars(self._model).get(name)
        setattr(model, name, replacement)
        self._restore.append(lambda: delattr(model, name) if own is None else setattr(model, name, own))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # bookkeeping, no arithmetic worth a graph
    def _before_pass(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the prefix encoder once for both stacks."""
        assert self._source is not None
        self._pass.bank = bank = self._source()
        if not self._generating.has_me():  # it encodes by itself, and repeats rows for beams
            self._check_encoded(kwargs.get("encoder_outputs"), bank)

    def _check_encoded(self, outputs: Any, bank: Bank) -> None:
        sites = zip(self._anatomy.geometry.sites, bank.sites, strict=True)
        if outputs is not None and any(site.placement is Placement.ENCODER_SELF and own.length for site, own in sites):
            encoded.check(outputs, self._token(bank))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_pass(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._pass.bank = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_stack(self, stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Choose each row's prefix and move the text's positions, before the first layer runs."""
        assert self._source is not None
        self._users.enter()
        if self._model.config._attn_implementation not in NAMES.values():
            raise InjectionError(
                "the attention implementation was changed while a prefix was attached, so nothing would read it; "
                "detach, change it, and attach again"
            )
        _check_checkpointing(stack)
        call = inspect.signature(stack.forward).bind_partial(*args).arguments | kwargs
        inputs = _inputs(call)
        bank = self._source() if self._pass.bank is None else self._pass.bank
        self._caches.enter(cache_of(call), self._token(bank))
        if self._rows is not None:
            bank = bank.rows(self._row_index(len(inputs)))
        self._current.bank = bank
        if self._anatomy.geometry.moves_text:
            call |= {"position_ids": self._positions(call, bank, inputs)}
        return (), call | {BANK: bank}

    def _positions(self, call: dict[str, Any], bank: Bank, inputs: Tensor) -> Tensor:
        """Return the text's positions behind each row's prefix; refuse those the model was not made for."""
        batch, tokens = inputs.shape[:2]
        positions = moved_positions(
            call, bank.offsets, batch=batch, tokens=tokens, from_mask=self._anatomy.counts_by_mask
        )
        if call.get("position_ids") is None:
            most = past_tokens(call) + tokens + int(bank.offsets.max())
            check_context(positions, self._anatomy.context_tokens, most)
        elif self._anatomy.context_tokens is not None:
            check_context(positions, self._anatomy.context_tokens, self._anatomy.context_tokens + 1)
        return positions

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_stack(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Mark the cache that a forward pass returns; called after a failed one too."""
        self._users.leave()
        if output is None:
            return
        token = self._token(self._current.bank)
        self._caches.leave(output, token)
        if stack is not self._anatomy.stack:
            encoded.mark(output, token)

    def _token(self, bank: Bank | None) -> object:
        """What tells this prefix, as it is now, from others."""
        if self._encoder is None:
            return self._source() if self._source is not None else bank
        return self._encoder, tuple(parameter._version for parameter in self._encoder.parameters())

    def _row_index(self, batch: int) -> Tensor:
        """Return the bank entry of each row; inside `generate` a row may stand several times in a row."""
        assert self._rows is not None
        repeats, rest = divmod(batch, self._rows)
        if rest or repeats == 0 or (repeats > 1 and not self._generating.has_me()):
            raise _wrong_rows(self._rows, batch)
        return torch.arange(self._rows).repeat_interleave(repeats)

    def _generate(self, own: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
        names = ("inputs", self._model.main_input_name, "inputs_embeds", "decoder_input_ids")
        for inputs in (*args[:1], *(kwargs.get(name) for name in names)):
            if self._rows is not None and isinstance(inputs, Tensor) and len(inputs) != self._rows:
                raise _wrong_rows(self._rows, len(inputs))
        if kwargs.get("encoder_outputs") is not None:
            assert self._source is not None
            self._check_encoded(kwargs["encoder_outputs"], self._source())
        with self._users, self._generating:
            if own is not None:
                return own(*args, **kwargs)
            return getattr(type(self._model), "generate")(self._model, *args, **kwargs)  # noqa: B009 - a mixin may add it


def _refuse_batching(*_: Any, **__: Any) -> Any:
    raise InjectionError("generate_batch: continuous batching reads no prefix; call generate")


def _wrong_rows(rows: int | None, batch: int) -> InjectionError:
    return InjectionError(
        f"prefixes for {rows} rows are attached, the batch has {batch}; attach one prefix (or None) per row"
    )


def _check_checkpointing(stack: nn.Module) -> None:
    """Refuse the reentrant kind: it loses the prefix's gradient, or sends it through the encoder twice."""
    if not torch.is_grad_enabled():
        return
    for module in stack.modules():
        if getattr(module, "gradient_checkpointing", False) and module.training:
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant", True):
                raise InjectionError(
                    "gradient checkpointing with use_reentrant=True gives a prefix wrong gradients or none; "
                    'enable it with {"use_reentrant": False}'
                )
            return


def _from_encoder(anatomy: Anatomy, encoder: PrefixEncoder, offset: int | None) -> Callable[[], Bank]:
    if encoder.geometry != anatomy.geometry:
        raise InjectionError("the encoder was made for a model of another geometry")
    position = anatomy.geometry.text_position(encoder.lengths, is_gated=encoder.gates is not None, asked=offset)
    return lambda: stack([encoder()], [position])


def _inputs(call: dict[str, Any]) -> Tensor:
    """Return what a stack reads: token ids, embeddings, or the features of a recording."""
    names = ("input_ids", "inputs_embeds", "input_features")
    inputs: Tensor = next(call[name] for name in names if call.get(name) is not None)
    return inputs


def _build_bank(
    model: PreTrainedModel, anatomy: Anatomy, prefix: Prefix | Sequence[Prefix | None] | None
) -> Bank | None:
    """Stack saved prefixes, each distinct one once per row it serves; None if there is nothing to attach."""
    rows = [prefix] if isinstance(prefix, Prefix) or prefix is None else list(prefix)
    if not rows:
        raise InjectionError("no rows: give one prefix (or None) per row of the batch")
    for each in rows:
        if not isinstance(each, Prefix | None):
            raise InjectionError(f"expected a Prefix or None per row, got {type(each).__name__}")
        if each is not None:
            if each.states.geometry != anatomy.geometry:
                raise InjectionError(
                    f"the prefix of {each.card.base.id} has another geometry than this model; load its base model"
                )
            check_base(model, each.card.base)
    if all(each is None for each in rows):
        return None
    return stack(
        [None if each is None else each.states for each in rows],
        [0 if each is None else each.position_offset for each in rows],
    )
