"""Attach a prefix to a model, and take it off again without a trace.

    with attach(model, prefix):                     one prefix for every row
        model.generate(...)
    with attach(model, [positive, negative, None]):  one per row, any lengths
        ...
    handle = attach(model, encoder)                 a prefix in training
    ...
    handle.switch(positive)                         something else, or None, from now on
    ...
    handle.detach()

Inside, everything is plain transformers: forward, generate, gradient checkpointing, caches. ARCHITECTURE.md lists what
is changed meanwhile, and why: the name of the attention implementation, a slot on each attention layer, hooks around
each stack, and what stands in front of `generate` and `save_pretrained`. The prefix encoder runs once per forward pass
of the whole model: for that an encoder-decoder has hooks on the module that runs both stacks.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from threading import RLock
from types import TracebackType
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.compat import attention_settings, eager_attention, implementation_of, restore_attention
from prefixkit.config import Placement
from prefixkit.errors import InjectionError
from prefixkit.injection.attached import (
    Attached,
    Nothing,
    deltas_of,
    from_encoder,
    from_prefixes,
    from_prompt,
    require_attachable,
    require_own,
)
from prefixkit.injection.attention import NAMES
from prefixkit.injection.passes import Passes
from prefixkit.injection.slots import Slot, clear, forget, has_slot, leave_out, place
from prefixkit.logs import get_logger
from prefixkit.methods import DeltaModule, SoftPrompt, Undo, restore_delta, undo_all
from prefixkit.models.adapters import plain_model
from prefixkit.models.base import Base
from prefixkit.models.inspect import Anatomy, inspect_model
from prefixkit.models.weights import all_modules
from prefixkit.prefix import Delta, Prefix, PrefixEncoder

Attachable = Prefix | PrefixEncoder | SoftPrompt | Sequence[Prefix | None] | None

log = get_logger(__name__)

#: Seconds between looks at whether other threads have left a model, and until they are waited for aloud.
_PAUSE, _PATIENCE = 0.01, 5.0
#: Held while a model is changed or restored, so that of two threads that attach to it at once one is refused.
_changing = RLock()


def attach(
    model: nn.Module | Base,
    prefix: Attachable,
    *,
    position_offset: int | None = None,
    deltas: Sequence[DeltaModule] = (),
    infix: bool = False,
    guard: Callable[[], object] = lambda: None,
) -> "Handle":
    """Make a frozen model read a prefix, and change its layers if the artefact has a LoRA, say, beside it.

    Args:
        model: a transformers model with nothing attached: decoder-only, encoder-decoder, or an encoder; what
            `load_base_model` returned; or a `PeftModel` around one, whose LoRA or other adapters then work beside the
            prefix.
        prefix: one prefix for every row; a sequence with one prefix (or None) per row of the coming batches; an
            encoder to train, or a soft prompt; or None, which leaves the model alone.
        position_offset: for what is trained, the position of the first text token; left out,
            `Geometry.text_position`.
        deltas: changes of the model's layers to train, beside a prefix encoder or alone (`prefix` None).
        infix: for a prefix encoder, its virtual tokens stand between input and target (see `Handle.infix_at`).
        guard: called at the start of each forward pass that is about to read something, in the thread that runs it;
            it may raise to keep a thread out.

    Returns:
        A handle: a context manager, or call its `detach`.

    Raises:
        UnsupportedModelError: the model cannot take a prefix, or passes an encoder no gradient.
        BaseMismatchError: a prefix was trained on another base model.
        InjectionError: something is attached already, a prefix has another geometry, or what is given is none.
        ConfigError: a position offset for a model whose text keeps its positions.
    """
    base = plain_model(model.model if isinstance(model, Base) else model)
    with _changing:
        if any(map(has_slot, all_modules(base))):
            raise InjectionError("a prefix is attached to this model already; detach it first")
        if implementation_of(base) in NAMES.values():
            raise InjectionError(
                "this model shares its configuration with one to which a prefix is attached; give it a copy: "
                "config=copy.deepcopy(config)"
            )
        anatomy = inspect_model(base)
        passes = Passes(base, anatomy, guard)
        source, rows = _to_attach(passes, prefix, position_offset, tuple(deltas), infix=infix)
        if source is None:
            return Handle(base, anatomy, None)
        passes.switch(source, rows)
        saved = _saved_deltas(prefix)
        return Handle(base, anatomy, passes, [*deltas, *(restore_delta(base, each) for each in saved)], saved)


def _to_attach(
    passes: Passes,
    prefix: Attachable,
    position_offset: int | None,
    deltas: tuple[DeltaModule, ...] = (),
    *,
    infix: bool = False,
) -> tuple[Attached | None, int | None]:
    """Return what is to be read, None if that is nothing, and how many rows it is for, None if for any."""
    require_attachable(prefix)
    base, anatomy = passes.model, passes.anatomy
    require_own(deltas, base)
    rows = len(prefix) if isinstance(prefix, Sequence) else None
    if isinstance(prefix, SoftPrompt):
        if deltas:
            raise InjectionError("deltas: are trained beside a prefix encoder, or alone, not beside a soft prompt")
        return from_prompt(base, anatomy, prefix, position_offset, passes.states_of), rows
    if isinstance(prefix, PrefixEncoder):
        return from_encoder(base, anatomy, prefix, position_offset, deltas, infix=infix), rows
    if infix:
        raise InjectionError("infix: a saved prefix knows whether it is one; say so for an encoder only")
    if deltas and prefix is None:
        position = anatomy.geometry.text_position([0], is_gated=False, asked=position_offset)
        return Nothing(anatomy.geometry, deltas, position), rows
    if position_offset is not None:
        raise InjectionError("position_offset: a saved prefix brings its own; give it for an encoder only")
    if deltas:
        raise InjectionError("deltas: a saved prefix brings its own; give changes to train with an encoder, or alone")
    return from_prefixes(base, anatomy, prefix), rows


def _saved_deltas(prefix: Attachable) -> tuple[Delta, ...]:
    return () if isinstance(prefix, PrefixEncoder | SoftPrompt) else deltas_of(prefix)


class Handle(AbstractContextManager["Handle"]):
    """What is attached to a model; `detach` restores the model exactly. Made by `attach`.

    Args:
        model: the model.
        anatomy: its sites.
        passes: what happens in its forward passes; None attaches nothing.
        deltas: what is changed in its layers meanwhile.
        saved: what those were restored from, if they were.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        passes: Passes | None,
        deltas: Sequence[DeltaModule] = (),
        saved: tuple[Delta, ...] = (),
    ) -> None:
        self._model, self._anatomy, self._passes = model, anatomy, passes
        self._restore: list[Callable[[], object]] = []
        self._inserted: list[DeltaModule] = []
        self._saved = saved
        self._take_out: list[Undo] = []
        if passes is not None:
            try:
                self._install(passes)
                self._insert(deltas, saved)
            except BaseException:
                self._undo()
                raise

    def switch(
        self,
        prefix: Attachable,
        *,
        position_offset: int | None = None,
        deltas: Sequence[DeltaModule] = (),
        infix: bool = False,
    ) -> None:
        """Let the model read something else from now on, or nothing, its hooks staying in place.

        Layers that gradient checkpointing runs again in a backward pass read what they read before. With nothing to
        read the model answers as it does without a handle, up to rounding: its masks are made in another way.

        Args:
            prefix: as for `attach`; what was given there, `deltas` and all, holds no longer.
            position_offset: likewise.
            deltas: likewise.
            infix: likewise.

        Raises:
            As `attach` does; what was attached then stays so. And InjectionError: the handle is detached, or was made
            with nothing to attach; or another thread is running the model.
        """
        if self._passes is None or not self._restore:
            raise InjectionError("nothing is attached by this handle; call attach() again")
        _require_alone(self._passes, "switch")
        with _changing:
            before = self._inserted, self._saved
            undo_all(self._take_out)  # what is new is checked against, and made for, the bare model
            try:
                source, rows = _to_attach(self._passes, prefix, position_offset, tuple(deltas), infix=infix)
                saved = _saved_deltas(prefix)
                is_same = bool(saved) and saved == before[1]
                modules = before[0] if is_same else [restore_delta(self._model, delta) for delta in saved]
                self._insert([*deltas, *modules], saved)
            except BaseException:
                undo_all(self._take_out)
                self._insert(*before)
                raise
            self._passes.switch(Nothing(self._anatomy.geometry) if source is None else source, rows)

    @contextmanager
    def infix_at(self, starts: Int[Tensor, "n"]) -> Iterator[None]:
        """Say where the input ends, for the calling thread's forward passes meanwhile; `generate` knows by itself.

        An infix (Li & Liang, 2021, §7.3) stands between input and target, [x; INFIX; y]: the input does not see it. As
        virtual tokens are keys and values alone, which predict nothing, the last token of the input is the first to
        see them, and to be moved past them: it predicts the first token of the target.

        Args:
            starts: column of the first token that sees the infix, one for all rows or one per row.
        """
        if self._passes is None:
            yield
            return
        with self._passes.starting_at(starts):
            yield

    def rest(self) -> None:
        """Let the model read nothing from now on, as `switch(None)` does, whatever threads are running it.

        For a caller whose guard has let no other thread read: one that did would go on without its prefix.
        """
        if self._inserted:
            raise InjectionError("rest: layers are changed for all threads; call switch(None) when none runs the model")
        if self._passes is not None:
            self._passes.switch(Nothing(self._anatomy.geometry), None)

    def detach(self, *, wait: bool = True) -> None:
        """Restore the model; calling it again does nothing.

        Args:
            wait: for other threads that are attaching or detaching at this moment.

        Raises:
            InjectionError: another thread is running the model, or there is something to wait for; the prefix stays
                attached.
        """
        if not _changing.acquire(blocking=wait):
            raise InjectionError("another thread is attaching a prefix or detaching one; call detach() again")
        try:
            if self._passes is None or not self._restore:
                return
            _require_alone(self._passes, "detach")
            self._undo()
            self._passes.close()
        finally:
            _changing.release()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detach; where another thread is running the model, such as one that generates a stream, once it is done."""
        told = time.monotonic() + _PATIENCE
        while self._restore:
            with suppress(InjectionError):  # another thread is in the model
                return self.detach()
            if time.monotonic() > told:
                log.warning("another thread is running the model; the prefix is detached when it has finished")
                told = math.inf
            time.sleep(_PAUSE)

    def _undo(self) -> None:
        undo_all(self._take_out)
        while self._restore:
            self._restore.pop()()

    def _insert(self, deltas: Sequence[DeltaModule], saved: tuple[Delta, ...]) -> None:
        for delta in deltas:
            self._take_out.append(delta.insert())
        self._inserted, self._saved = list(deltas), saved

    def _install(self, passes: Passes) -> None:
        model, implementation = self._model, implementation_of(self._model)
        if implementation == "eager":
            for module in self._anatomy.attention:
                eager_attention(module)  # refuses a family without one before anything is changed
        stacks, root = self._anatomy.stacks, self._anatomy.root
        outside = set(all_modules(model)).difference(*map(all_modules, stacks))
        leave_out(outside)
        self._restore.append(partial(forget, outside))
        sites = self._anatomy.geometry.sites
        for index, (site, module) in enumerate(zip(sites, self._anatomy.attention, strict=True)):
            is_causal = site.placement is Placement.DECODER_SELF
            place(module, Slot(index, is_causal, implementation, passes.current))
            self._restore.append(partial(clear, module))
        self._restore.append(partial(restore_attention, attention_settings(model)))
        model.set_attn_implementation(NAMES[implementation])
        for stack in stacks:
            self._hook(stack, passes.before_stack, passes.after_stack)
        if len(stacks) > 1:
            self._hook(root, passes.before_pass, passes.after_pass)
        self._shadow("generate", partial(passes.generate, vars(model).get("generate")))
        self._shadow("init_continuous_batching", _refuse_batching)
        self._shadow("save_pretrained", partial(self._save_base, vars(model).get("save_pretrained")))

    def _hook(self, module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        """Call one function before each of a module's forward passes and the other after it, failed or not."""
        self._restore.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        self._restore.append(module.register_forward_hook(after, always_call=True).remove)

    def _save_base(self, own: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
        """Stand in for `save_pretrained`, which would write changed layers down as the base model's own."""
        if self._inserted:
            raise InjectionError(
                f"save_pretrained: {self._inserted[0].method} has changed this model's layers, and would be saved as "
                "its own weights, or lost; save the Prefix instead, or detach first"
            )
        save = own or partial(type(self._model).save_pretrained, self._model)
        return save(*args, **kwargs)

    def _shadow(self, name: str, replacement: Callable[..., Any]) -> None:
        """Put an attribute in front of a method of the model, or of what a caller has put there already."""
        model, own = self._model, vars(self._model).get(name)
        setattr(model, name, replacement)
        self._restore.append(lambda: delattr(model, name) if own is None else setattr(model, name, own))


def _require_alone(passes: Passes, call: str) -> None:
    if passes.are_elsewhere():
        raise InjectionError(f"another thread is running the model with this prefix; join it, then call {call}() again")


def _refuse_batching(*_: Any, **__: Any) -> Any:
    raise InjectionError("generate_batch: continuous batching reads no prefix; call generate")
