"""Ways an encoder-decoder writes, over a mixed and padded batch: the logits tokens were chosen from, by the loops."""

import copy
from functools import cache

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from conformance.encoder_families import ENCODER_DECODERS, build
from conformance.foreign import FOREIGN_PAIRS, before_and_after
from conformance.pairs import Pairs, cannot_cache, cannot_generate, make_pairs
from conformance.scene import SIX
from prefixkit.errors import InjectionError
from prefixkit.injection import attach

slow = pytest.mark.slow
EMPTY = DynamicCache()


def build_one(name):
    """A family's model of its own."""
    return build(ENCODER_DECODERS[name])


built = cache(build_one)


@pytest.fixture
def pairs(encoder_decoder, all_float64, make_prefix):
    return make_pairs(built(encoder_decoder), make_prefix)


@pytest.mark.cell("sampling")
@pytest.mark.parametrize("returned", [pytest.param(1, marks=slow), 2])
def test_sampling(cell, returned, pairs):
    if cannot_generate(cell, pairs.model):
        return
    with torch.random.fork_rng():
        torch.manual_seed(5)
        pairs.check(cell, pairs.generate(do_sample=True, top_k=0, num_return_sequences=returned))


@slow
@pytest.mark.cell("beam-sampling")
def test_beam_sampling(cell, pairs):
    if cannot_generate(cell, pairs.model):
        return
    with torch.random.fork_rng():
        torch.manual_seed(5)
        output = pairs.generate(num_beams=3, do_sample=True, top_k=0, num_return_sequences=2, output_scores=True)
    pairs.check_scores(cell, output)


@slow
@pytest.mark.cell("chunked")
@pytest.mark.parametrize("padded", [False, True])
def test_with_a_decoders_prompt_read_in_chunks(cell, padded, pairs, make_ids):
    if cannot_generate(cell, pairs.model):
        return
    prompt = torch.cat([pairs.start, make_ids(3, 4)], dim=1)
    if pairs.model.config.model_type == "whisper":
        with cell.refused(TypeError, "got multiple values for keyword argument 'position_ids'"):  # without a prefix
            pairs.model.generate(**pairs.source, decoder_input_ids=prompt, prefill_chunk_size=3, **SIX)
        return
    if padded:
        with cell.refused(RuntimeError, "The size of tensor a .* must match the size of tensor b"):  # without one too
            pairs.model.generate(**pairs.source, decoder_input_ids=prompt, prefill_chunk_size=3, **SIX)
        return
    pairs = Pairs(pairs.model, pairs.rows, {"input_ids": pairs.source["input_ids"]})
    pairs.check(cell, pairs.generate(decoder_input_ids=prompt, prefill_chunk_size=3), is_greedy=True)


@slow
@pytest.mark.cell("quantised")
def test_a_quantised_cache_is_refused(cell, pairs):
    with cell.refused(ValueError, "This model does not support the quantized cache"):
        pairs.generate(cache_implementation="quantized", cache_config={"backend": "fp8"})


@pytest.mark.cell("offloaded")
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_needs_a_device_to_come_from(cell, kind, pairs):
    if not torch.cuda.is_available():
        with cell.refused(
            InjectionError, f"cache_implementation: '{kind}' moves keys and values between a CUDA device"
        ):
            pairs.generate(cache_implementation=kind)
        return
    if not cannot_generate(cell, pairs.model):
        source = {name: value.to("cuda") for name, value in pairs.source.items()}
        there = Pairs(copy.deepcopy(pairs.model).to("cuda"), pairs.rows, source)
        cell.exact(there.generate(cache_implementation=kind).sequences, there.generate().sequences)


@slow
@pytest.mark.cell("continued")
@pytest.mark.parametrize("copied", [False, True])
def test_going_on_from_a_returned_cache(cell, copied, pairs):
    if cannot_generate(cell, pairs.model):
        return
    three = {"max_new_tokens": 3, "min_new_tokens": 3}
    first = pairs.generate(**three)
    cache = copy.deepcopy(first.past_key_values) if copied else first.past_key_values
    given = {"decoder_input_ids": first.sequences, "past_key_values": cache}
    if pairs.model.config.model_type != "whisper":  # or transformers reads the whole text again
        given["decoder_attention_mask"] = torch.ones_like(first.sequences)
    second = pairs.generate(**given, **three)
    second.logits = (*first.logits, *second.logits)
    pairs.check(cell, second, is_greedy=True)
    with pytest.raises(InjectionError, match="filled under a prefix that is no longer attached; attach it again"):
        pairs.model.generate(**pairs.source, decoder_input_ids=second.sequences, past_key_values=second.past_key_values)


@slow
@pytest.mark.cell("assisted")
@pytest.mark.parametrize("assistant", ["another model", "itself"])
def test_assisted(cell, assistant, encoder_decoder, all_float64, make_prefix):
    model = build_one(encoder_decoder)  # Whisper leaves a note in its assistant's configuration
    if cannot_generate(cell, model):
        return
    helper = model if assistant == "itself" else build_one(encoder_decoder)
    one = make_pairs(model, make_prefix).one(0)
    one.check(cell, one.generate(assistant_model=helper), is_greedy=True)


@slow
@pytest.mark.cell("lookup")
def test_prompt_lookup(cell, pairs, make_ids):
    if cannot_generate(cell, pairs.model):
        return
    one = pairs.one(2)
    prompt = torch.cat([one.start, make_ids(1, 3), make_ids(1, 3)], dim=1)
    given = {} if pairs.model.config.model_type == "whisper" else {"decoder_input_ids": prompt}
    one.check(cell, one.generate(prompt_lookup_num_tokens=2, **given), is_greedy=True)


@pytest.mark.cell("guidance")
def test_guidance_is_refused(cell, pairs, make_ids):
    with cell.refused(
        InjectionError, "guidance_scale: transformers gives the encoder each new token in place of the s"
    ):
        pairs.generate(guidance_scale=1.5, negative_prompt_ids=make_ids(3, 4, seed=7))


@pytest.mark.cell("foreign-cache")
@pytest.mark.parametrize("filled", FOREIGN_PAIRS)
def test_a_foreign_cache_is_refused(cell, filled, pairs, make_ids):
    model, ids = pairs.model, make_ids(3, 4)
    before, after = before_and_after(filled, pairs.rows)
    given = None
    if cannot_cache(model):  # the decoder's own, made by hand
        given = EncoderDecoderCache(*(copy.deepcopy(EMPTY) for _ in range(2)))
    with attach(model, before):
        cache = model(**pairs.source, decoder_input_ids=ids, past_key_values=given, use_cache=True).past_key_values
    if filled == "another's encoder":
        cache = EncoderDecoderCache(copy.deepcopy(EMPTY), cache.cross_attention_cache)
    with attach(model, after), cell.refused(InjectionError, FOREIGN_PAIRS[filled]):
        model(**pairs.source, decoder_input_ids=ids, past_key_values=cache)
