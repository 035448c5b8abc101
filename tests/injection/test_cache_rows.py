"""A cache with a prefix per row, whose rows are moved, and caches that are put together from others' layers."""

import copy

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from conformance.encoder_families import ENCODER_DECODERS, build, source_of
from prefixkit.errors import InjectionError
from prefixkit.injection import attach
from prefixkit.models.inspect import inspect_model

DETACHED = "past_key_values were filled under a prefix that is no longer attached; attach it again"
ORDER = "past_key_values hold their rows in another order than the prefixes; attach those in the same order, or start"
OTHER = "past_key_values were filled under another prefix than the one attached; start with an empty cache"

#: What moves a cache's rows, and where each row stood before.
MOVES = {
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
    "chosen": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "layer by layer": (
        lambda cache: [layer.reorder_cache(torch.tensor([1, 0, 2])) for layer in cache.layers],
        [1, 0, 2],
    ),
}


@pytest.fixture
def model(make_model):
    return make_model("llama")


@pytest.fixture
def prefixes(model, make_prefix):
    """One per row, of different lengths, and a row without."""
    return [make_prefix(model, 3, seed=1), make_prefix(model, [0, 5, 1], seed=2), None]


@pytest.fixture
def ids(make_ids):
    return make_ids(3, 8)


# transformers moves the rows of a static cache by reorder_cache alone
@pytest.mark.parametrize(
    ("move", "static"), [*((move, False) for move in MOVES), ("reordered", True), ("layer by layer", True)]
)
def test_moved_rows_go_on_under_prefixes_in_their_order_and_no_other(model, prefixes, ids, move, static):
    change, order = MOVES[move]
    cache = StaticCache(config=model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
    with attach(model, prefixes):
        expected = model(input_ids=ids).logits[order, 5:]
        model(input_ids=ids[:, :5], past_key_values=cache)
        change(cache)
        with pytest.raises(InjectionError, match=ORDER if len(order) == 3 else "prefixes for 3 rows are attached"):
            model(input_ids=ids[order, 5:], past_key_values=cache)
    with pytest.raises(InjectionError, match=DETACHED):
        model(input_ids=ids[order, 5:], past_key_values=cache)
    with attach(model, [prefixes[row] for row in order]):
        found = model(input_ids=ids[order, 5:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_rows_moved_after_detach_or_in_a_copy_are_known_too(model, prefixes, ids):
    with attach(model, prefixes):
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    copied = copy.deepcopy(cache)
    for each in (cache, copied):
        each.reorder_cache(torch.tensor([1, 0, 2]))
        with attach(model, prefixes), pytest.raises(InjectionError, match=ORDER):
            model(input_ids=ids[:, 5:], past_key_values=each)
        each.reorder_cache(torch.tensor([1, 0, 2]))
        with attach(model, prefixes):
            expected = model(input_ids=ids).logits[:, 5:]
            found = model(input_ids=ids[:, 5:], past_key_values=each).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_a_cache_of_one_prefix_for_all_rows_goes_on_under_that_prefix_for_each(model, prefixes, ids):
    with attach(model, prefixes[0]):
        expected = model(input_ids=ids).logits[:, 5:]
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([1, 0, 2]))  # rows are alike
        cache.reorder_cache(torch.tensor([1, 0, 2]))
    other = copy.deepcopy(cache)
    with attach(model, [prefixes[0]] * 3):
        found = model(input_ids=ids[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    with attach(model, [prefixes[0], prefixes[1], prefixes[0]]), pytest.raises(InjectionError, match=OTHER):
        model(input_ids=ids[:, 5:], past_key_values=other)


def _shallow(cache, model):
    return copy.copy(cache)


def _moved(cache, model):
    fresh = DynamicCache(config=model.config)
    fresh.layers = list(cache.layers)
    return fresh


def _one_layer_moved(cache, model):
    fresh = model(input_ids=torch.tensor([[5, 6, 7, 8, 9]] * 3), use_cache=True).past_key_values
    fresh.layers[-1] = cache.layers[-1]
    return fresh


@pytest.mark.parametrize("make", [_shallow, _moved, _one_layer_moved])
def test_layers_in_another_cache_are_refused_once_the_prefix_is_gone(model, prefixes, ids, make):
    with attach(model, prefixes):
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        before = _shallow(cache, model)
    for each in (before, make(cache, model)):
        with pytest.raises(InjectionError, match=DETACHED):
            model(input_ids=ids[:, 5:], past_key_values=each)


def test_a_cache_that_the_model_fills_and_does_not_return_is_marked(model, prefixes, ids):
    cache = DynamicCache()  # its layers come into being in the pass
    with attach(model, prefixes):
        model(input_ids=ids[:, :5], past_key_values=cache, use_cache=False)
    with pytest.raises(InjectionError, match=DETACHED):
        model(input_ids=ids[:, 5:], past_key_values=cache)


def test_a_cache_that_a_failed_pass_has_begun_to_fill_is_marked(model, prefixes, ids):
    cache = DynamicCache()

    def fail(*_):
        raise RuntimeError("in the last layer")

    hook = model.model.layers[-1].mlp.register_forward_pre_hook(fail)
    with attach(model, prefixes), pytest.raises(RuntimeError, match="in the last layer"):
        model(input_ids=ids[:, :5], past_key_values=cache)
    hook.remove()
    with pytest.raises(InjectionError, match=DETACHED):
        model(input_ids=ids[:, 5:], past_key_values=cache)


def test_an_encoder_decoders_cache_and_its_outputs_keep_their_order(make_prefix, make_ids):
    model = build(ENCODER_DECODERS["bart"])
    length = list(inspect_model(model).geometry.lengths(3))
    prefixes = [make_prefix(model, length, seed=seed) for seed in (1, 2)]
    source, target, swapped = source_of(model, 2), make_ids(2, 4), torch.tensor([1, 0])
    with attach(model, prefixes):
        expected = model(**source, decoder_input_ids=target).logits[swapped, 3:]
        outputs = model.get_encoder()(**source)
        mask = {name: value[swapped] for name, value in source.items() if name == "attention_mask"}
        cache = model(**source, decoder_input_ids=target[:, :3], use_cache=True).past_key_values
        cache.reorder_cache(swapped)
        turned = copy.copy(outputs)
        turned.last_hidden_state = outputs.last_hidden_state[swapped]
        given = {"decoder_input_ids": target[swapped, 3:], "past_key_values": cache, **mask}
        with pytest.raises(InjectionError, match="encoder_outputs were computed without the prefix that is attached"):
            model(encoder_outputs=turned, **given)
        fresh = EncoderDecoderCache(DynamicCache(), cache.cross_attention_cache)
        for each in (cache, fresh):
            with pytest.raises(InjectionError, match=ORDER):
                model(encoder_outputs=outputs, **given | {"past_key_values": each})
    with attach(model, prefixes[::-1]):
        outputs = model.get_encoder()(**{name: value[swapped] for name, value in source.items()})
        found = model(encoder_outputs=outputs, **given).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_copies_of_single_layers_get_marks_of_their_own(model, prefixes, ids):
    with attach(model, prefixes):
        expected = model(input_ids=ids).logits[:, 5:]
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        copied = DynamicCache(config=model.config)
        copied.layers = [copy.copy(layer) for layer in cache.layers]
        del cache
        found = model(input_ids=ids[:, 5:], past_key_values=copied).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    with pytest.raises(InjectionError, match=DETACHED):
        model(input_ids=ids[:, 5:], past_key_values=copied)


def test_a_cache_that_an_interrupted_pass_has_begun_to_fill_is_marked(model, prefixes, ids):
    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[-1].mlp.register_forward_pre_hook(interrupt)
    for again in (False, True):
        cache = DynamicCache()
        with attach(model, prefixes):
            with pytest.raises(KeyboardInterrupt):
                model(input_ids=ids[:, :5], past_key_values=cache)
            if again:  # torch calls no hook after an interrupt: the next pass sees to it
                with pytest.raises(KeyboardInterrupt):
                    model(input_ids=ids)
        with pytest.raises(InjectionError, match=DETACHED):
            model(input_ids=ids[:, 5:], past_key_values=cache)
    hook.remove()


def test_what_a_caller_has_put_in_front_of_a_layers_methods_is_called_and_left_there(model, prefixes, ids):
    cache, calls = DynamicCache(config=model.config), []
    layer = cache.layers[0]
    update, reorder = layer.update, layer.reorder_cache
    layer.update = lambda *args, **options: (calls.append("update"), update(*args, **options))[1]
    layer.reorder_cache = lambda beam_idx: (calls.append("reorder"), reorder(beam_idx))[1]
    own = layer.update
    with attach(model, prefixes):
        model(input_ids=ids[:, :5], past_key_values=cache)
        cache.reorder_cache(torch.tensor([0, 1, 2]))
    with pytest.raises(InjectionError, match=DETACHED):
        model(input_ids=ids[:, 5:], past_key_values=cache)
    cache.reset()
    model(input_ids=ids[:, 5:], past_key_values=cache)
    assert calls == ["update", "reorder", "update"]
    assert layer.update is own
