"""Threads that share a model: each gets its own rows, and nothing is detached under a thread that is running."""

import contextlib
import importlib
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from prefixkit.errors import InjectionError
from prefixkit.injection import attach
from prefixkit.models.inspect import inspect_model

RUNNING = r"another thread is running the model with this prefix; join it, then call detach\(\) again"


@pytest.fixture
def held(make_model):
    """A model whose first layer waits, in threads other than the main one, until it is let go."""
    model = make_model("llama", fresh=True)
    inside, go = threading.Event(), threading.Event()

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go.wait(60)

    model.model.layers[1].register_forward_pre_hook(wait)
    return model, inside, go


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_detaching_under_a_running_thread_is_refused_and_the_thread_keeps_its_prefix(call, held, make_prefix, make_ids):
    model, inside, go = held
    ids, prefix = make_ids(1, 5), make_prefix(model, 3)

    def run():
        if call == "forward":
            return model(input_ids=ids).logits
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)

    with attach(model, prefix):
        expected = run()
    plain = run()
    assert not torch.equal(expected, plain)
    handle = attach(model, prefix)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        assert inside.wait(60)
        try:
            with pytest.raises(InjectionError, match=RUNNING):
                handle.detach()
            with pytest.raises(InjectionError, match=RUNNING.replace("detach", "switch")):
                handle.switch(None)
            with pytest.raises(InjectionError, match="attached to this model already; detach it first"):
                attach(model, prefix)
        finally:
            go.set()
        assert torch.equal(future.result(), expected)
    handle.detach()
    assert torch.equal(run(), plain)


def test_leaving_a_block_waits_for_a_thread_that_generates_and_lets_the_blocks_own_error_through(
    held, make_prefix, make_ids, monkeypatch, caplog
):
    """A stream that is left half-way: the model must not stay steered, with no handle left to detach it."""
    monkeypatch.setattr(importlib.import_module("prefixkit.injection.attach"), "_PATIENCE", 0.05)
    monkeypatch.setattr(logging.getLogger("prefixkit"), "propagate", True)  # a test of commands may have said no
    model, inside, go = held
    ids, prefix = make_ids(1, 5), make_prefix(model, 3)
    plain = model(ids).logits
    with ThreadPoolExecutor(1) as pool:

        def leave():
            with attach(model, prefix):
                future.append(pool.submit(model.generate, ids, max_new_tokens=3, do_sample=False))
                assert inside.wait(60)
                threading.Timer(0.3, go.set).start()
                raise ValueError("mine")

        future = []
        with pytest.raises(ValueError, match="mine"):
            leave()
        assert future[0].done()
    assert "another thread is running the model; the prefix is detached when it has finished" in caplog.text
    assert torch.equal(model(ids).logits, plain)


def test_a_thread_generating_beams_neither_moves_nor_excuses_the_rows_of_another(held, make_prefix, make_ids):
    model, inside, go = held
    ids, rows = make_ids(2, 5), [make_prefix(model, 3, seed=1), make_prefix(model, 2, seed=2)]
    with attach(model, rows):
        logits = model(input_ids=ids).logits
        beams = model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=2, max_new_tokens=4, do_sample=False)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(
                model.generate, ids, attention_mask=torch.ones_like(ids), num_beams=2, max_new_tokens=4, do_sample=False
            )
            assert inside.wait(60)
            try:
                assert torch.equal(model(input_ids=ids).logits, logits)
                with pytest.raises(InjectionError, match="prefixes for 2 rows are attached, the batch has 4"):
                    model(input_ids=torch.cat([ids, ids]))
            finally:
                go.set()
            assert torch.equal(future.result(), beams)


def test_a_failed_call_does_not_count_as_running(make_model, make_prefix, make_ids):
    model = make_model("llama", fresh=True)
    handle = attach(model, [make_prefix(model, 3)])

    def fail():
        for call in (lambda: model(input_ids=make_ids(2, 5)), lambda: model.generate(make_ids(2, 5))):
            with pytest.raises(InjectionError, match="the batch has 2"):
                call()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(fail).result()
    handle.detach()
    assert model.config._attn_implementation == "sdpa"


def test_a_thread_that_died_in_a_forward_pass_does_not_count_as_running(make_model, make_prefix, make_ids):
    """KeyboardInterrupt and SystemExit skip torch's hooks."""
    model = make_model("llama", fresh=True)

    def die(*_):
        raise SystemExit

    handle = attach(model, make_prefix(model, 3))
    hook = model.model.layers[1].register_forward_pre_hook(die)

    def run():
        with contextlib.suppress(SystemExit):
            model(input_ids=make_ids(1, 5))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    hook.remove()
    handle.detach()
    assert model.config._attn_implementation == "sdpa"


def test_of_threads_that_attach_at_the_same_instant_one_wins(make_model, make_prefix, monkeypatch):
    module = importlib.import_module("prefixkit.injection.attach")
    model = make_model("llama", fresh=True)
    prefix, found = make_prefix(model, 3), module.has_slot

    def slowly(layer):
        answer = found(layer)
        time.sleep(0.02)  # long enough for another thread to look as well
        return answer

    monkeypatch.setattr(module, "has_slot", slowly)
    start = threading.Barrier(4)

    def run():
        start.wait(60)
        try:
            return attach(model, prefix)
        except InjectionError as refusal:
            return str(refusal)

    with ThreadPoolExecutor(4) as pool:
        outcomes = [future.result() for future in [pool.submit(run) for _ in range(4)]]
    handles = [outcome for outcome in outcomes if not isinstance(outcome, str)]
    assert len(handles) == 1
    assert [o for o in outcomes if isinstance(o, str)] == [
        "a prefix is attached to this model already; detach it first"
    ] * 3
    handles[0].detach()
    assert not any(found(layer) for layer in model.modules())


def test_models_inspected_in_several_threads_are_told_apart(make_model):
    families = ["llama", "gpt2", "opt", "gpt-neox"] * 3
    models = [make_model(family, fresh=True) for family in families]
    expected = [inspect_model(make_model(family)).geometry for family in families]
    start = threading.Barrier(len(models))

    def run(model):
        start.wait(60)
        return inspect_model(model).geometry

    with ThreadPoolExecutor(len(models)) as pool:
        assert list(pool.map(run, models)) == expected


def test_one_model_inspected_in_several_threads_beside_one_that_runs_it(make_model, make_ids):
    model, ids = make_model("llama", fresh=True), make_ids(1, 5)
    expected, geometry = model(input_ids=ids).logits, inspect_model(make_model("llama")).geometry
    start = threading.Barrier(6)

    def run(is_inspector):
        start.wait(60)
        if is_inspector:
            return inspect_model(model).geometry == geometry
        return all(torch.equal(model(input_ids=ids).logits, expected) for _ in range(20))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(run, [True, True, False, True, False, True]))
