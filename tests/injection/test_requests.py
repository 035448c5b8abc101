"""What `generate` is asked for and cannot be had under a prefix is refused before it starts, in one line."""

import pytest
import torch
from transformers import GenerationConfig

from conformance.encoder_families import ENCODER_DECODERS, build, source_of
from conformance.reference import reading
from prefixkit.errors import InjectionError
from prefixkit.injection import attach

OFFLOADED = "cache_implementation: 'offloaded' moves keys and values between a CUDA device and the CPU, and torch finds"
GUIDED = "guidance_scale: transformers gives the encoder each new token in place of the source"


@pytest.mark.skipif(torch.cuda.is_available(), reason="can be had")
@pytest.mark.parametrize("given", ["named", "by position", "as the model's own"])
def test_an_offloaded_cache_without_a_device(given, make_model, make_prefix, make_ids):
    model = make_model("llama", fresh=True)
    config = GenerationConfig(cache_implementation="offloaded", max_new_tokens=2, pad_token_id=0)
    args, kwargs = [make_ids(1, 5)], {}
    if given == "named":
        kwargs = {"cache_implementation": "offloaded", "max_new_tokens": 2}
    elif given == "by position":
        args.append(config)
    else:
        model.generation_config = config
    with attach(model, make_prefix(model, 3)), pytest.raises(InjectionError, match=OFFLOADED):
        model.generate(*args, **kwargs)


def test_a_decoding_of_the_callers_own_with_rows_of_their_own(make_model, make_prefix, make_ids):
    def tiled(model, input_ids, **_):
        return model(torch.cat([input_ids, input_ids])).logits[:, -1].argmax(-1)

    model, ids = make_model("llama"), make_ids(2, 5)
    one, other = make_prefix(model, 3), make_prefix(model, 2)
    with attach(model, [one, other]), pytest.raises(InjectionError, match="custom_generate: in which order it repeats"):
        model.generate(ids, custom_generate=tiled, pad_token_id=0)
    with attach(model, one):
        expected = model(ids).logits[:, -1].argmax(-1)
        assert torch.equal(model.generate(ids, custom_generate=tiled, pad_token_id=0), expected.repeat(2))


def test_times_of_words_are_refused_and_the_model_goes_on(make_prefix):
    model = build(ENCODER_DECODERS["whisper"])
    source = source_of(model, 1)
    with attach(model, make_prefix(model, 3)):
        before = model.generate(**source, max_new_tokens=4)
        with pytest.raises(InjectionError, match="return_token_timestamps: they are read off the attention to the rec"):
            model.generate(**source, max_new_tokens=4, return_token_timestamps=True)
        assert torch.equal(model.generate(**source, max_new_tokens=4), before)


def test_a_guidance_of_one_is_none(make_prefix):
    model = build(ENCODER_DECODERS["bart"])
    with attach(model, make_prefix(model, 3)):
        plain = model.generate(**source_of(model, 1), max_new_tokens=4)
        assert torch.equal(model.generate(**source_of(model, 1), max_new_tokens=4, guidance_scale=1), plain)
        with pytest.raises(InjectionError, match=GUIDED):
            model.generate(**source_of(model, 1), max_new_tokens=4, guidance_scale=1.5)


def test_a_decoder_without_input_says_what_it_misses(make_prefix):
    model = build(ENCODER_DECODERS["t5"])
    with (
        attach(model, make_prefix(model, 3)),
        pytest.raises(ValueError, match="You must specify exactly one of input_ids or inputs_embeds"),
    ):
        model(**source_of(model, 1))


class TestWhisper:
    """It builds the cache it returns anew, and drops rows whose recording has ended."""

    @pytest.fixture
    def model(self):
        return build(ENCODER_DECODERS["whisper"])

    @staticmethod
    def continued(model):
        """Three tokens, and three more from the cache that was returned."""
        source = source_of(model, 2)
        three = {"return_dict_in_generate": True, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        first = model.generate(**source, **three)
        options = {"decoder_input_ids": first.sequences, "past_key_values": first.past_key_values}
        return model.generate(**source, **options, **three)

    @pytest.mark.parametrize("mixed", [False, True])
    def test_the_cache_it_returns_is_gone_on_from_with_its_prefix_only(self, model, mixed, make_prefix):
        prefix, other = make_prefix(model, 3, seed=1), make_prefix(model, 3, seed=2)
        rows = [prefix, None] if mixed else [prefix] * 2
        with reading(model, [row and row.states for row in rows]):
            expected = self.continued(model).sequences
        with attach(model, rows if mixed else prefix):
            output = self.continued(model)
        assert torch.equal(output.sequences, expected)
        options = {"decoder_input_ids": output.sequences, "past_key_values": output.past_key_values}
        with pytest.raises(InjectionError, match="filled under a prefix that is no longer attached; attach it again"):
            model.generate(**source_of(model, 2), **options, max_new_tokens=2)
        with attach(model, other), pytest.raises(InjectionError, match="filled under another prefix than the one att"):
            model.generate(**source_of(model, 2), **options, max_new_tokens=2)

    @pytest.mark.parametrize("copies", [1, 2])
    def test_rows_that_end_before_others_are_not_taken_for_others(self, model, copies, make_prefix):
        model.generation_config.no_timestamps_token_id = 90
        features = torch.randn(2, 8, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        mask = torch.ones(2, 60, dtype=torch.long)
        mask[0, 25:] = 0
        options = {"return_timestamps": True, "max_new_tokens": 5, "num_beams": 2, "num_return_sequences": copies}
        prefix = make_prefix(model, 3)
        with attach(model, prefix):
            assert len(model.generate(features, attention_mask=mask, **options)) == 2 * copies
        with (
            attach(model, [prefix, None]),
            pytest.raises(InjectionError, match=f"generate goes on with {copies} of {2 * copies} rows, and which pref"),
        ):
            model.generate(features, attention_mask=mask, **options)
