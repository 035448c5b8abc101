"""A cache filled under one prefix is not continued under another, under none, or the other way round."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from conformance.encoder_families import ENCODER_DECODERS, build, source_of
from prefixkit.config import Placement
from prefixkit.errors import InjectionError
from prefixkit.injection import attach
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import PrefixEncoder, reproduce

DETACHED = "past_key_values were filled under a prefix that is no longer attached; attach it again"
OTHER = "past_key_values were filled under another prefix than the one attached; start with an empty cache"
PLAIN = "past_key_values hold text that was read without this prefix; start with an empty cache"


@pytest.fixture
def model(make_model):
    return make_model("llama")


@pytest.fixture
def ids(make_ids):
    return make_ids(1, 8)


@pytest.fixture(params=["made by the model", "dynamic", "static"])
def fill(request, model):
    """Read a text into a cache, returned by the model or given to it."""

    def read(text):
        given = {
            "made by the model": lambda: None,
            "dynamic": lambda: DynamicCache(config=model.config),
            "static": lambda: StaticCache(config=model.config, max_cache_len=20),
        }[request.param]()
        return model(input_ids=text, past_key_values=given, use_cache=True).past_key_values

    return read


def test_a_cache_filled_under_a_prefix_refuses_to_grow_without_it(model, make_prefix, ids, fill):
    with attach(model, make_prefix(model, 3)):
        cache = fill(ids[:, :5])
    with pytest.raises(InjectionError, match=DETACHED):
        model(input_ids=ids[:, 5:], past_key_values=cache)
    with pytest.raises(InjectionError, match=DETACHED), attach(model, None):
        model(input_ids=ids[:, 5:], past_key_values=cache)


def test_a_cache_filled_under_a_prefix_is_refused_under_another(model, make_prefix, ids, fill):
    with attach(model, make_prefix(model, 3, seed=1)):
        cache = fill(ids[:, :5])
    for other in (make_prefix(model, 3, seed=2), make_prefix(model, 3, seed=1, offset=0), [make_prefix(model, 2)]):
        with attach(model, other), pytest.raises(InjectionError, match=OTHER):
            model(input_ids=ids[:, 5:], past_key_values=cache)


def test_a_cache_filled_without_a_prefix_is_refused_under_one(model, make_prefix, ids, fill):
    cache = fill(ids[:, :5])
    with attach(model, make_prefix(model, 3)), pytest.raises(InjectionError, match=PLAIN):
        model(input_ids=ids[:, 5:], past_key_values=cache)


@pytest.mark.parametrize("rows", [False, True])
def test_a_cache_goes_on_under_an_equal_prefix_attached_again(model, make_prefix, ids, fill, rows):
    def prefix():
        return [make_prefix(model, [3, 0, 1])] if rows else make_prefix(model, [3, 0, 1])

    with attach(model, prefix()):
        expected = model(input_ids=ids).logits
        cache = fill(ids[:, :3])
    for start in (3, 4):
        with attach(model, prefix()):
            found = model(input_ids=ids[:, start : start + 1], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(found, expected[:, start : start + 1], rtol=0, atol=1e-10)
    with pytest.raises(InjectionError, match=DETACHED):
        model(input_ids=ids[:, 5:], past_key_values=cache)


@pytest.mark.parametrize("when", ["while attached", "after detach"])
def test_a_copied_cache_is_refused_like_the_first(model, make_prefix, ids, when):
    prefix = make_prefix(model, 3)
    with attach(model, prefix):
        expected = model(input_ids=ids).logits[:, 5:]
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        copied = copy.deepcopy(cache)
    copied = copied if when == "while attached" else copy.deepcopy(cache)
    with pytest.raises(InjectionError, match=DETACHED):
        model(input_ids=ids[:, 5:], past_key_values=copied)
    with attach(model, prefix):
        for each in (copied, cache):  # each still holds its own text
            found = model(input_ids=ids[:, 5:], past_key_values=each).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_an_emptied_cache_may_be_used_for_anything(model, make_prefix, ids):
    plain = model(input_ids=ids).logits
    cache = StaticCache(config=model.config, max_cache_len=20)
    with attach(model, make_prefix(model, 3, seed=1)):
        model(input_ids=ids, past_key_values=cache)
        cache.reset()
        model(input_ids=ids[:, :2], past_key_values=cache)
    cache.reset()
    found = model(input_ids=ids, past_key_values=cache).logits
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-10)
    cache.reset()
    with attach(model, make_prefix(model, 3, seed=2)):
        expected = model(input_ids=ids).logits
        found = model(input_ids=ids, past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("change", [lambda weight: weight.add_(0.1), lambda weight: weight.data.mul_(3)])
def test_a_cache_of_an_encoder_is_refused_once_the_encoder_has_changed(model, make_states, ids, change):
    states = make_states(model, 2)
    encoder = PrefixEncoder(states.geometry, states.lengths, dtype=torch.float64)
    reproduce(encoder, states)
    with attach(model, encoder), torch.no_grad():
        expected = model(input_ids=ids).logits[:, 5:]
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        model(input_ids=ids[:, 4:5], past_key_values=cache)
        found = model(input_ids=ids[:, 5:], past_key_values=copy.deepcopy(cache)).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        change(next(encoder.parameters()))
        with pytest.raises(InjectionError, match=OTHER):
            model(input_ids=ids[:, 5:], past_key_values=cache)


def test_dropout_of_the_encoder_does_not_make_a_cache_another_prefixs(model, make_states, ids):
    states = make_states(model, 2)
    encoder = PrefixEncoder(states.geometry, states.lengths, dropout=0.5, dtype=torch.float64)
    reproduce(encoder, states)
    with attach(model, encoder), torch.no_grad():
        assert model.generate(ids, max_new_tokens=3, min_new_tokens=3, pad_token_id=0).shape == (1, 11)
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        next(encoder.parameters()).data.mul_(3)
        with pytest.raises(InjectionError, match=OTHER):
            model(input_ids=ids[:, 4:], past_key_values=cache)


class TestCross:
    """The cache of an encoder's keys and values, which stands beside that of the decoder's own text."""

    @pytest.fixture
    def model(self):
        return build(ENCODER_DECODERS["bart"])

    @pytest.fixture
    def make(self, model, make_prefix):
        def prefix(seed, placements=None):
            return make_prefix(model, list(inspect_model(model).geometry.lengths(3, placements=placements)), seed=seed)

        return prefix

    @pytest.fixture
    def read(self, model, make_ids):
        """Read a source and a target; give what a decoder says and its cache."""
        source, target = source_of(model, 1), make_ids(1, 3)

        def run(cache=None):
            return model(**source, decoder_input_ids=target, past_key_values=cache, use_cache=True)

        return run

    @staticmethod
    def fresh(cache):
        return EncoderDecoderCache(DynamicCache(), cache.cross_attention_cache)

    def test_it_is_refused_under_another_prefix(self, model, make, read):
        with attach(model, make(1)):
            cache = read().past_key_values
        for other in (make(2), make(1, [Placement.DECODER_SELF])):
            with attach(model, other), pytest.raises(InjectionError, match=OTHER):
                read(self.fresh(cache))

    def test_it_is_refused_under_a_prefix_in_the_encoder_if_there_was_none(self, model, make, read):
        plain = read().past_key_values
        with attach(model, make(1, [Placement.DECODER_SELF])):
            without = read().past_key_values
        for cache in (plain, without):
            with attach(model, make(1)), pytest.raises(InjectionError, match=PLAIN):
                read(self.fresh(cache))

    def test_it_goes_on_under_its_own_prefix_and_if_nothing_of_that_is_in_the_encoder(self, model, make, read):
        own, decoder_only = make(1), make(1, [Placement.DECODER_SELF, Placement.CROSS])
        with attach(model, own):
            cache = read().past_key_values
        for prefix, filled in ((own, cache), (decoder_only, read().past_key_values)):
            with attach(model, prefix):
                torch.testing.assert_close(read(self.fresh(filled)).logits, read().logits, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("copied", [False, True])
    def test_after_detach_emptying_the_decoders_own_text_is_not_enough(self, model, make, read, copied):
        expected = read().logits
        with attach(model, make(1)):
            cache = read().past_key_values
        cache = copy.deepcopy(cache) if copied else cache
        cache.self_attention_cache.reset()
        with pytest.raises(InjectionError, match=DETACHED):
            read(cache)
        cache.reset()
        torch.testing.assert_close(read(cache).logits, expected, rtol=0, atol=1e-10)


def test_marks_keep_neither_cache_nor_model_alive(make_model, make_prefix, ids):
    model = make_model("llama", fresh=True)
    handle = attach(model, make_prefix(model, 3))
    cache = model(input_ids=ids, use_cache=True).past_key_values
    gone = weakref.ref(cache), weakref.ref(model)
    del cache
    gc.collect()
    assert gone[0]() is None
    handle.detach()
    del handle, model
    gc.collect()
    assert gone[1]() is None


def test_a_cache_filled_under_a_prefix_cannot_be_pickled(model, make_prefix, ids):
    with attach(model, make_prefix(model, 3)):
        cache = model(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(InjectionError, match="filled under a prefix cannot be saved; save the prefix and the text"):
            pickle.dumps(cache)
