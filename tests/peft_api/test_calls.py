"""Calls of one `PeftModel` that overlap read what each asks for, or are refused; nobody gets the plain base unasked."""

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread, get_ident
from time import sleep
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteria

from prefixkit import PeftModel, PrefixTuningConfig, get_peft_model
from prefixkit.errors import InjectionError
from prefixkit.peft.calls import calls_of

TOKENS: dict[str, Any] = {
    "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True
}  # fmt: skip
OTHER_THREAD = "another thread is running this model, and reads something else .*; join it first, or give each thread a"
Batch = dict[str, Tensor]


@pytest.fixture
def model(base: PreTrainedModel) -> PeftModel:
    return new(base, 1)


def new(base: PreTrainedModel, seed: int) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, init_weights="random")
        return get_peft_model(base, config).eval()


class Pause(StoppingCriteria):
    """Stops between the second token and the third, until it is told to go on."""

    def __init__(self) -> None:
        self.is_there, self.may_go, self.tokens = Event(), Event(), 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.tokens += 1
        if self.tokens == 2:
            self.is_there.set()
            assert self.may_go.wait(60)
        return torch.zeros(len(input_ids), dtype=torch.bool)


@contextmanager
def under_way(call: Callable[[], Any], is_there: Event, may_go: Event) -> Iterator[dict[str, Any]]:
    """Inside the block a call stands still in another thread; afterwards it has finished, with a result or an error."""
    found: dict[str, Any] = {}

    def run() -> None:
        try:
            with torch.no_grad():
                found["result"] = call()
        except Exception as error:
            found["error"] = error

    thread = Thread(target=run)
    thread.start()
    try:
        assert is_there.wait(60)
        yield found
    finally:
        may_go.set()
        thread.join(60)


def generating(
    model: PeftModel, batch: Batch, *, use_cache: bool = True
) -> tuple[Callable[[], tuple[Tensor, ...]], Event, Event]:
    pause = Pause()

    def call() -> tuple[Tensor, ...]:
        out = model.generate(batch["input_ids"], use_cache=use_cache, stopping_criteria=[pause], **TOKENS)
        found: tuple[Tensor, ...] = out.logits
        return found

    return call, pause.is_there, pause.may_go


def logits(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=batch["input_ids"]).logits
    return found


@pytest.mark.parametrize("use_cache", [True, False])
def test_another_threads_calls_leave_a_generation_its_prefix(use_cache: bool, model: PeftModel, batch: Batch) -> None:
    ids = batch["input_ids"]
    expected = model.generate(ids, use_cache=use_cache, **TOKENS)
    with under_way(*generating(model, batch, use_cache=use_cache)) as found:
        assert torch.equal(model.generate(ids, use_cache=use_cache, **TOKENS).sequences, expected.sequences)
        assert torch.equal(model.generate(ids[:1], **TOKENS).sequences, expected.sequences[:1])
    for step, right in zip(found["result"], expected.logits, strict=True):
        assert torch.equal(step, right)
    assert model.base_model.config._attn_implementation == "sdpa"


def test_a_call_that_ends_while_another_begins_leaves_it_its_prefix(model: PeftModel, batch: Batch) -> None:
    expected, plain = logits(model, batch), logits(model.base_model, batch)
    is_there, may_go, first = Event(), Event(), [True]

    def pause(*_: Any) -> None:
        if first and first.pop():
            is_there.set()
            assert may_go.wait(60)

    hook = model.base_model.register_forward_pre_hook(pause)  # the prefix is attached, no stack has begun
    with under_way(lambda: logits(model, batch), is_there, may_go) as found:
        assert torch.equal(logits(model, batch), expected)
    hook.remove()
    assert torch.equal(found["result"], expected)
    assert torch.equal(logits(model.base_model, batch), plain)


def test_while_another_thread_runs_it_whoever_wants_something_else_is_refused(
    model: PeftModel, base: PreTrainedModel, batch: Batch
) -> None:
    expected, plain = logits(model, batch), logits(base, batch)
    text = model.generate(batch["input_ids"], **TOKENS).logits
    other = new(base, 2)
    with under_way(*generating(model, batch, use_cache=False)) as found:
        with pytest.raises(InjectionError, match=OTHER_THREAD), model.disable_adapter():
            logits(model, batch)
        with pytest.raises(InjectionError, match=OTHER_THREAD):
            logits(other, batch)
        with pytest.raises(InjectionError, match=OTHER_THREAD), other.disable_adapter():
            logits(other, batch)
        with pytest.raises(InjectionError, match=OTHER_THREAD):  # in training: it wants a gradient
            model(**batch)
        with pytest.raises(InjectionError, match="another thread is running this base model with a prefix; join it fi"):
            logits(base, batch)
        with pytest.raises(InjectionError, match="another thread is running this base model with a prefix; join it fi"):
            base.generate(batch["input_ids"], **TOKENS)
        with pytest.raises(InjectionError, match=OTHER_THREAD):
            model.unload()
        assert torch.equal(logits(model, batch), expected)  # the same numbers, without a gradient
        with torch.no_grad():
            model.encoder.states[0].add_(1)
        with pytest.raises(InjectionError, match=OTHER_THREAD):
            logits(model, batch)
    for step, right in zip(found["result"], text, strict=True):
        assert torch.equal(step, right)
    assert torch.equal(logits(base, batch), plain)
    assert not torch.equal(logits(model, batch), expected)


def test_without_its_prefix_it_is_not_run_beside_a_thread_that_reads_it(model: PeftModel, batch: Batch) -> None:
    def plainly() -> Any:
        with model.disable_adapter():
            return call()

    call, *events = generating(model, batch)
    plain = logits(model.base_model, batch)
    with model.disable_adapter():
        expected = model.generate(batch["input_ids"], **TOKENS).logits
    with under_way(plainly, *events) as found:
        with pytest.raises(InjectionError, match=OTHER_THREAD):
            logits(model, batch)
        assert torch.equal(logits(model.base_model, batch), plain)
    for step, right in zip(found["result"], expected, strict=True):
        assert torch.equal(step, right)


def test_leaving_the_prefix_out_is_one_threads_own_affair(model: PeftModel, batch: Batch) -> None:
    expected, plain = logits(model, batch), logits(model.base_model, batch)
    found: list[Tensor] = []
    with model.disable_adapter():
        thread = Thread(target=lambda: found.append(logits(model, batch)))
        thread.start()
        thread.join()
        with model.disable_adapter():
            pass
        assert torch.equal(logits(model, batch), plain)
    assert torch.equal(found[0], expected)
    assert torch.equal(logits(model, batch), expected)


class Nested(LogitsProcessor):
    """Calls the model again at every token."""

    def __init__(self, call: Callable[[Tensor], Any]) -> None:
        self.call, self.found = call, list[Any]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.found.append(self.call(input_ids))
        return scores


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_call_inside_a_call_takes_nothing_from_it(use_cache: bool, model: PeftModel, batch: Batch) -> None:
    expected = model.generate(batch["input_ids"], use_cache=use_cache, **TOKENS)
    inner = Nested(lambda ids: model(input_ids=ids).logits[:, -1])
    found = model.generate(batch["input_ids"], use_cache=use_cache, logits_processor=[inner], **TOKENS)
    assert torch.equal(found.sequences, expected.sequences)
    for again, step in zip(inner.found, expected.logits, strict=True):
        # One token at a time or all at once: float64 sums in another order.
        torch.testing.assert_close(again, step.double(), rtol=0, atol=1e-5)

    def plainly(ids: Tensor) -> Any:
        with model.disable_adapter():
            return model(input_ids=ids)

    with pytest.raises(InjectionError, match="made inside another call of this model, which reads something else; mak"):
        model.generate(batch["input_ids"], logits_processor=[Nested(plainly)], **TOKENS)
    with pytest.raises(InjectionError, match="made inside another call of this model"):
        model.generate(batch["input_ids"], logits_processor=[Nested(lambda _: model.unload())], **TOKENS)
    assert torch.equal(model.generate(batch["input_ids"], **TOKENS).sequences, expected.sequences)


def test_copies_are_models_of_their_own(model: PeftModel, batch: Batch) -> None:
    expected = logits(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.encoder.states[0].mul_(2)
        with under_way(*generating(model, batch)):
            assert not torch.equal(logits(twin, batch), expected)
    assert torch.equal(logits(model, batch), expected)


def test_under_gradient_checkpointing_the_last_of_two_models_to_go_leaves_the_base_plain(
    base: PreTrainedModel, batch: Batch
) -> None:
    first, second = new(base, 1).train(), new(base, 2).train()
    expected = torch.autograd.grad(second(**batch).loss, list(second.encoder.parameters()))
    first.gradient_checkpointing_enable()
    first(**batch).loss.backward()
    loss = second(**batch).loss
    del first
    gc.collect()
    found = torch.autograd.grad(loss, list(second.encoder.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # float32 parameters
    assert base.config._attn_implementation != "sdpa"
    del second, loss
    gc.collect()
    assert base.config._attn_implementation == "sdpa"


def test_a_thread_that_was_about_to_run_the_base_model_is_refused_and_the_call_it_met_ends_well(
    model: PeftModel, base: PreTrainedModel, batch: Batch
) -> None:
    """The hooks stay in place between calls; the base model's own begins before the call, and meets it within."""
    expected = logits(model, batch)
    base.activation_checkpointing_enable({"use_reentrant": False})
    model.train()(**batch).loss.backward()
    model.eval()
    stack: Any = base.model
    is_there, may_go = Event(), Event()
    outsiders: list[int] = []

    def pause(*_: Any) -> None:
        if get_ident() in outsiders:
            is_there.set()
            assert may_go.wait(60)

    def outside() -> Tensor:
        outsiders.append(get_ident())
        return logits(base, batch)

    hook = stack.register_forward_pre_hook(pause, prepend=True)
    with under_way(outside, is_there, may_go) as found, under_way(*generating(model, batch)) as inside:
        may_go.set()
        while not found:
            sleep(0.01)
    hook.remove()
    with pytest.raises(InjectionError, match="another thread is running this base model with a prefix; join it first"):
        raise found["error"]
    assert "error" not in inside
    assert torch.equal(logits(model, batch), expected)


def test_a_model_that_is_collected_waits_for_no_thread_that_attaches(base: PreTrainedModel, batch: Batch) -> None:
    model = new(base, 1).train()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    calls, is_there, may_go = calls_of(base), Event(), Event()

    def hold() -> None:  # as a thread would that is beginning a call
        with calls._lock:
            is_there.set()
            assert may_go.wait(60)

    with under_way(hold, is_there, may_go):
        del model
        gc.collect()  # comes back
    for _ in range(500):
        if base.config._attn_implementation == "sdpa":
            break
        sleep(0.01)
    assert base.config._attn_implementation == "sdpa"


def test_an_error_in_the_last_call_leaves_nothing_attached(model: PeftModel, base: PreTrainedModel) -> None:
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]))
    assert base.config._attn_implementation == "sdpa"


def test_a_model_that_is_collected_while_another_thread_runs_its_base_lets_go_of_that_later(
    base: PreTrainedModel, batch: Batch
) -> None:
    model = new(base, 1).train()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    is_there, may_go = Event(), Event()

    def pause(*_: Any) -> None:
        is_there.set()
        assert may_go.wait(60)

    layer: Any = base.model.layers[0]
    hook = layer.register_forward_pre_hook(pause)
    with under_way(lambda: logits(base, batch), is_there, may_go) as found:
        del model
        gc.collect()
        sleep(0.2)
    hook.remove()
    assert "error" not in found
    for _ in range(500):
        if base.config._attn_implementation == "sdpa":
            break
        sleep(0.01)
    assert base.config._attn_implementation == "sdpa"
