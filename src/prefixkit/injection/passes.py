"""A model's forward passes while something is attached: which row reads which prefix, and from which position on.

`attach` puts the methods of `Passes` where the model calls them: around each stack, around the module that runs both
stacks of an encoder-decoder, and in front of `generate`.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from threading import local
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.compat import cache_of, checkpoints_reentrantly, layer_implementation
from prefixkit.config import Placement
from prefixkit.errors import InjectionError
from prefixkit.injection import encoded
from prefixkit.injection.attached import Attached, Nothing, Stamp
from prefixkit.injection.attention import NAMES
from prefixkit.injection.caches import Caches, Read
from prefixkit.injection.positions import past_tokens, text_positions
from prefixkit.injection.requests import check_request
from prefixkit.injection.slots import BANK, Current, Users
from prefixkit.models.inspect import Anatomy
from prefixkit.models.weights import embedding_table
from prefixkit.prefix import Bank, PrefixStates


class _Whole(local):
    """The bank of all stacks while one module runs both, in the calling thread; and what it was read from.

    Attributes:
        source: what the last forward pass of a stack read from.
        present: what the rows of a stack read in the forward pass under way; None between passes.
        last: the same of the last forward pass, once that is over.
        cache: what the caller gave the stack to fill in the forward pass under way.
        sources: how many rows the encoder read in the present `generate`; 0 before it has read any.
        starts: column of the first token of each row that sees an infix; None where that was not said.
    """

    bank: Bank | None = None
    source: Any = None
    present: Read | None = None
    last: Read | None = None
    cache: Any = None
    stamp: Stamp = (None, ())
    sources: int = 0
    starts: Tensor | None = None


class Passes:
    """The hooks of one handle.

    Args:
        model: the model.
        anatomy: its sites.
        guard: called in each forward pass that is about to read a prefix; it may raise.

    Attributes:
        current: the bank of the forward pass under way, which the slots read.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, guard: Callable[[], object]) -> None:
        self.model, self.anatomy, self._guard = model, anatomy, guard
        self._attached: tuple[Attached, int | None] = Nothing(anatomy.geometry), None
        self.current, self._caches = Current(), Caches()
        self._users, self._generating, self._prompting = Users(), Users(), Users()
        self._whole = _Whole()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied or pickled along with the model.

        Raises:
            InjectionError: always.
        """
        raise InjectionError("a model with a prefix attached cannot be copied or pickled; detach it first")

    def switch(self, source: Attached, rows: int | None) -> None:
        """Read something else from the next forward pass on.

        Args:
            source: gives the bank of a forward pass.
            rows: number of rows the bank describes, or None for one prefix shared by all rows.
        """
        self._attached = source, rows  # replaced in one go, and read in one go, whatever other threads do

    def states_of(self, embeddings: Float[Tensor, "p e"]) -> PrefixStates:
        """Return the keys and values that the model, reading nothing else, computes for embeddings, with gradients."""
        like = embedding_table(self.model)
        with self._prompting, self.current.keeping() as kept:
            self.anatomy.stack(inputs_embeds=embeddings[None].to(like.device, self.model.dtype), use_cache=False)
        geometry = self.anatomy.geometry
        return PrefixStates(geometry, tuple(kept[site] for site in range(len(geometry.sites))))

    def _read(self) -> tuple[Attached, int | None]:
        """Return what the calling thread is to read, and how many rows it is for."""
        source, rows = self._attached
        if not isinstance(source, Nothing) or source.deltas:
            self._guard()
        return source, rows

    def close(self) -> None:
        """Forget all forward passes; caches that were filled in them grow no longer."""
        self._mark_unfinished()
        self._caches.close()
        self.current.clear()

    def are_elsewhere(self) -> bool:
        """Whether another thread is in the model."""
        return self._users.has_others()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # bookkeeping, no arithmetic worth a graph
    def before_pass(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the prefix encoder once for both stacks."""
        source, _ = self._read()
        bank = source.read()
        self._whole.bank, self._whole.stamp = bank, source.stamp
        if not self._generating.has_me():  # it encodes by itself, and repeats rows for beams
            call = inspect.signature(root.forward).bind_partial(*args).arguments | kwargs
            self._check_encoded(call.get("encoder_outputs"), source, bank)

    def _check_encoded(self, outputs: Any, source: Attached, bank: Bank) -> None:
        if outputs is not None:
            token = source.token(bank, of_pass=True)
            encoded.check(outputs, token, needs_mark=self._is_in_encoder(source, bank))

    def _is_in_encoder(self, source: Attached, bank: Bank) -> bool:
        """Whether an encoder computes something else than without what is attached."""
        if source.deltas:
            return True
        sites = zip(self.anatomy.geometry.sites, bank.entries, strict=True)
        return any(site.placement is Placement.ENCODER_SELF and own.length for site, own in sites)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after_pass(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forget what was for both stacks; called after a failed pass too."""
        self._whole.bank = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before_stack(
        self, stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Choose each row's prefix and move the text's positions, before the first layer runs."""
        self._users.enter()
        self._mark_unfinished()
        if any(layer_implementation(layer, self.model) not in NAMES.values() for layer in self.anatomy.attention):
            raise InjectionError(
                "the attention implementation was changed while a prefix was attached, so nothing would read it; "
                "detach, change it, and attach again"
            )
        _check_checkpointing(stack)
        call = inspect.signature(stack.forward).bind_partial(*args).arguments | kwargs
        inputs = _inputs(call)
        if inputs is None:  # the stack says what it misses; if it does not, its layers find no bank
            self.current.bank = None
            return None
        if self._prompting.has_me():  # within the `states_of` of another forward pass
            self.current.bank = Nothing(self.anatomy.geometry).read()
            return (), call | {BANK: self.current.bank}
        source, rows = self._read()
        bank = self._whole.bank
        if bank is None or not self._is_whole_current(source):
            bank = source.read()
        read = Read(bank)
        if rows is not None:
            if stack is not self.anatomy.stack and self._generating.has_me():
                self._check_sources(len(inputs))
            read = Read(bank, self._entries(rows, len(inputs)))
        if cache_of(call) is not None:
            self._caches.enter(cache_of(call), *self._marks(source, read))
        self._whole.source, self._whole.present, self._whole.cache = source, read, cache_of(call)
        bank = read.row_by_row()
        offsets = bank.offsets
        if source.is_infix:
            seen = self._seeing(call, inputs)
            bank, offsets = bank.seen_by(seen), offsets.to(seen.device)[:, None] * seen
            if call.get("attention_mask") is None:  # without one, a gap between positions would count as another text
                mask = torch.ones(len(inputs), past_tokens(call) + inputs.shape[1], dtype=torch.long)
                call |= {"attention_mask": mask.to(inputs.device)}
        self.current.bank = bank
        if self.anatomy.geometry.moves_text:
            call |= {"position_ids": text_positions(call, offsets, inputs, self.anatomy)}
        return (), call | {BANK: bank}

    def _infix_behind(self, source: Attached, kwargs: dict[str, Any], given: list[Any]) -> AbstractContextManager[None]:
        """Let an infix stand behind all that `generate` was given to go on from."""
        prompt = next((each for each in given if isinstance(each, Tensor)), None)
        if not source.is_infix:
            return nullcontext()
        if cache_of(kwargs) is not None:
            raise InjectionError("an infix stands behind the whole prompt; give generate the prompt, and no cache")
        return self.starting_at(torch.tensor([0 if prompt is None else max(0, prompt.shape[1] - 1)]))

    @contextmanager
    def starting_at(self, starts: Int[Tensor, "n"]) -> Iterator[None]:
        """Let an infix be seen from these columns on, one for all rows or one per row, in the calling thread."""
        before, self._whole.starts = self._whole.starts, starts
        try:
            yield
        finally:
            self._whole.starts = before

    def _seeing(self, call: dict[str, Any], inputs: Tensor) -> Bool[Tensor, "n t"]:
        """Return which tokens of a forward pass see an infix.

        Raises:
            InjectionError: nobody said where the input ends, or not of these rows.
        """
        starts = self._whole.starts
        if starts is None:
            raise InjectionError(
                "an infix stands between input and target, and where the input ends was not said; call generate, or "
                "use handle.infix_at(...) around the forward pass"
            )
        if len(starts) not in (1, len(inputs)):
            raise InjectionError(f"infix_at: expected a column for each of {len(inputs)} rows, got {len(starts)}")
        past = past_tokens(call)
        columns = torch.arange(past, past + inputs.shape[1], device=inputs.device)
        return columns >= starts.to(inputs.device)[:, None]

    def _check_sources(self, batch: int) -> None:
        """Refuse to go on with some of the rows only, as Whisper does when the shorter recordings are at their end."""
        if self._whole.sources not in (0, batch):
            raise InjectionError(
                f"generate goes on with {batch} of {self._whole.sources} rows, and which prefixes those read is not "
                "known; generate row by row, or attach one prefix for all rows"
            )
        self._whole.sources = batch

    def _is_whole_current(self, source: Attached) -> bool:
        """Whether the bank of both stacks is of the pass under way, not left by one that Ctrl-C ended."""
        (one, changes), (other, now) = self._whole.stamp, source.stamp
        return one is other and changes == now

    def _marks(self, source: Attached, read: Read) -> tuple[Read | None, Read | None]:
        """What is written on a cache of the decoder's own text, and on one of the encoder's keys and values."""
        token = source.token(read.bank)
        mark = None if token is None else Read(token, read.entries)
        return mark, mark if self._is_in_encoder(source, read.bank) else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after_stack(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Mark the cache that a forward pass returns; called after a failed one too."""
        self._users.leave()
        source, read, cache = self._whole.source, self._whole.present, self._whole.cache
        self._whole.present, self._whole.cache, self.current.bank = None, None, None
        self._whole.last = None if read is None else Read(read.bank.detach(), read.entries)
        if read is None:
            return
        self._caches.leave([cache, output], partial(self._marks, source, read))
        if output is not None and stack is not self.anatomy.stack and self._is_in_encoder(source, read.bank):
            encoded.mark(output, source.token(read.bank, of_pass=True))

    def _mark_unfinished(self) -> None:
        """Mark what a pass has begun to fill that Ctrl-C ended: torch then calls no hook."""
        read, cache = self._whole.present, self._whole.cache
        self._whole.present, self._whole.cache = None, None
        if read is not None and cache is not None:
            self._caches.leave(cache, partial(self._marks, self._whole.source, read))

    def _entries(self, rows: int, batch: int) -> tuple[int, ...]:
        """Return the bank entry of each row; inside `generate` a row may stand several times in a row."""
        repeats, rest = divmod(batch, rows)
        if rest or repeats == 0 or (repeats > 1 and not self._generating.has_me()):
            raise _wrong_rows(rows, batch)
        return tuple(row for row in range(rows) for _ in range(repeats))

    def generate(self, own: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the model's `generate`, inside which rows may be repeated for beams.

        Args:
            own: what a caller had put in front of the method.
            args: of `generate`.
            kwargs: of `generate`.

        Raises:
            InjectionError: the batch has other rows than the prefixes, an encoder's output is not of this prefix, or
                the settings ask for what cannot be had.
        """
        source, rows = self._read()
        check_request(self.model, args, kwargs, rows=rows, is_infix=source.is_infix)
        names = ("inputs", self.model.main_input_name, "inputs_embeds", "decoder_input_ids")
        outputs = kwargs.get("encoder_outputs")
        for inputs in (*args[:1], *(kwargs.get(name) for name in names), *([] if outputs is None else outputs[:1])):
            if rows is not None and isinstance(inputs, Tensor) and len(inputs) != rows:
                raise _wrong_rows(rows, len(inputs))
        given = [outputs, *args[:1], *(kwargs.get(name) for name in names)]
        if rows not in (None, 1) and all(each is None for each in given):
            raise _wrong_rows(rows, 1)  # it would begin one text, and repeat it
        if outputs is not None:
            self._check_encoded(outputs, source, source.read())
        if not self._generating.has_me():
            self._whole.sources = 0
        with self._users, self._generating, self._infix_behind(source, kwargs, given):
            if own is None:
                own = partial(getattr(type(self.model), "generate"), self.model)  # noqa: B009 - a mixin may add it
            output = own(*args, **kwargs)
        last = self._whole.last
        if last is not None:  # Whisper puts what it returns together anew
            marks = partial(self._marks, self._whole.source, last)
            self._caches.leave(output, marks, given=cache_of(kwargs))
        return output


def _wrong_rows(rows: int | None, batch: int) -> InjectionError:
    return InjectionError(
        f"prefixes for {rows} rows are attached, the batch has {batch}; attach one prefix (or None) per row"
    )


def _check_checkpointing(stack: nn.Module) -> None:
    """Refuse the reentrant kind: it loses the prefix's gradient, or sends it through the encoder twice."""
    if torch.is_grad_enabled() and checkpoints_reentrantly(stack):
        raise InjectionError(
            "gradient checkpointing with use_reentrant=True gives a prefix wrong gradients or none; "
            'enable it with {"use_reentrant": False}'
        )


def _inputs(call: dict[str, Any]) -> Tensor | None:
    """Return what a stack reads: token ids, embeddings, or the features of a recording; None if it was given none."""
    names = ("input_ids", "inputs_embeds", "input_features")
    return next((call[name] for name in names if call.get(name) is not None), None)
