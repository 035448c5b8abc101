"""The fingerprint tells models apart by what they compute, not by how they are stored."""

import copy

import pytest
import torch
from transformers import AutoModel

from conformance.encoder_families import ENCODER_DECODERS, ENCODERS, build
from prefixkit.errors import BaseMismatchError
from prefixkit.models import fingerprint as fingerprints
from prefixkit.models.fingerprint import check_base, fingerprint
from prefixkit.prefix import BaseCard


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_does_not_depend_on_the_number_format(make_tiny_llama, dtype):
    model = make_tiny_llama().bfloat16()  # numbers that every format here holds
    assert fingerprint(copy.deepcopy(model).to(dtype)) == fingerprint(model.float())


@pytest.mark.parametrize(
    ("key", "value"),
    [("activation_function", "relu"), ("scale_attn_by_inverse_layer_idx", True), ("layer_norm_epsilon", 0.5)],
)
def test_it_tells_settings_that_change_what_the_same_weights_compute(make_tiny_gpt2, key, value):
    model, other = make_tiny_gpt2(), make_tiny_gpt2()
    setattr(other.config, key, value)
    assert fingerprint(model) != fingerprint(other)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("bart", "scale_embedding", True),
        ("bart", "decoder_attention_heads", 4),
        ("t5", "feed_forward_proj", "gelu"),
        ("t5", "relative_attention_max_distance", 8),
    ],
)
def test_it_tells_settings_of_encoder_decoders_too(family, key, value):
    model, other = build(ENCODER_DECODERS[family]), build(ENCODER_DECODERS[family], **{key: value})
    other.load_state_dict(model.state_dict())
    ids = torch.arange(3, 33)[None]
    answers = [each(input_ids=ids, decoder_input_ids=ids).logits for each in (model, other)]
    assert float((answers[0] - answers[1]).abs().max()) > 1e-6, "the setting must matter here"
    assert fingerprint(model) != fingerprint(other)


def test_it_follows_weights_that_change_in_place(make_tiny_llama):
    model = make_tiny_llama()
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    assert fingerprint(model) != before


@pytest.mark.parametrize("name", ENCODERS)
def test_a_saved_copy_has_the_same_one(tmp_path, name):
    """Files keep a setting's keys in another order than a configuration just made (ModernBERT's rotary settings)."""
    model = build(ENCODERS[name], AutoModel)
    model.save_pretrained(tmp_path)
    assert fingerprint(AutoModel.from_pretrained(tmp_path)) == fingerprint(model)


def test_prefixes_from_when_the_order_of_a_settings_keys_counted_are_still_accepted(make_tiny_llama):
    model = make_tiny_llama()
    model.config.rope_parameters = dict(sorted(model.config.rope_parameters.items(), reverse=True))
    plain = "".join(f"{key}={getattr(model.config, key, None)!r};" for key in fingerprints._SETTINGS)
    old = fingerprints._digest(model, lambda setting: setting)
    assert old != fingerprint(model)  # else this would show nothing
    assert repr(model.config.rope_parameters) in plain
    check_base(model, BaseCard(id="tiny", fingerprint=old))
    with pytest.raises(BaseMismatchError):
        check_base(make_tiny_llama(seed=1), BaseCard(id="tiny", fingerprint=old))
