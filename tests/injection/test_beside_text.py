"""Models that read more than text: with a prefix they read text exactly, and refuse the rest in words."""

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from conformance.families import FAMILIES, GROUPED
from conformance.scene import SIX
from prefixkit.errors import InjectionError
from prefixkit.injection import attach
from prefixkit.models.inspect import recomputable_layers
from prefixkit.models.text_states import text_states
from prefixkit.prefix import BaseCard, Prefix

EYES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
        "patch_size": 14}  # fmt: skip
IMAGE = 90


def make(name):
    torch.manual_seed(0)
    if name == "gemma3":
        settings = FAMILIES["gemma3"].settings | {"sliding_window": 64}  # else text in a prefix's place would be hidden
        config = Gemma3Config(text_config=settings, vision_config=EYES, mm_tokens_per_image=4,
                              image_token_index=IMAGE)  # fmt: skip
        model = Gemma3ForConditionalGeneration(config)
    elif name == "llava":
        text, eyes = CONFIG_MAPPING["llama"](**GROUPED), CLIPVisionConfig(**EYES)
        config = LlavaConfig(text_config=text, vision_config=eyes, image_token_index=IMAGE, vision_feature_layer=-1)
        model = LlavaForConditionalGeneration(config)
    else:
        axes = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        eyes = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 14}
        config = Qwen2VLConfig(text_config=GROUPED | {"rope_parameters": axes}, vision_config=eyes,
                               image_token_id=IMAGE, vision_start_token_id=91, vision_end_token_id=92)  # fmt: skip
        model = Qwen2VLForConditionalGeneration(config)
    return model.double().eval().requires_grad_(False)


def prefix_of(model, text):
    return Prefix.from_states(text_states(model, text), base=BaseCard(id="tiny"))


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen2_vl"])
def test_gradient_checkpointing_is_counted_in_layers_of_text(name):
    model = make(name)
    layers = recomputable_layers(model)
    assert len(layers) == model.config.get_text_config().num_hidden_layers
    assert not any("Vision" in type(layer).__name__ or "Siglip" in type(layer).__name__ for layer in layers)


@pytest.mark.parametrize(("name", "layer"), [("gemma3", "SiglipAttention"), ("llava", "CLIPAttention")])
def test_an_image_is_refused_and_text_is_not(name, layer, make_ids):
    model = make(name)
    text, ids = make_ids(4, seed=4), make_ids(1, 4)
    image = torch.cat([torch.full((1, 4), IMAGE), ids], dim=1)
    call = {"input_ids": image, "pixel_values": torch.randn(1, 3, 28, 28, dtype=torch.float64)}
    if name == "gemma3":
        call["token_type_ids"] = (image == IMAGE).long()
    seen = model(**call).logits
    expected = model(input_ids=torch.cat([text[None], ids], dim=1)).logits[:, 4:]
    with attach(model, prefix_of(model, text)):
        with pytest.raises(InjectionError, match=f"^{layer} is no layer of the text, .* images and sound are not"):
            model(**call)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(model(**call).logits, seen)


@pytest.mark.parametrize("use_cache", [True, False])
def test_positions_along_several_axes_all_move(use_cache, make_ids):
    """Qwen2-VL's `generate` hands down text's positions and time, height and width: one more axis than its forward."""
    model = make("qwen2_vl")
    text, ids = make_ids(4, seed=4), make_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # the second row is padded
    whole = torch.cat([text.expand(2, -1), ids], dim=1)
    alone = [model.generate(whole[:1], use_cache=use_cache, **SIX)[0, -6:]]
    alone += [model.generate(torch.cat([text, ids[1, 3:]])[None], use_cache=use_cache, **SIX)[0, -6:]]
    plain = model.generate(ids, attention_mask=mask, use_cache=use_cache, **SIX)[:, -6:]
    with attach(model, prefix_of(model, text)):
        found = model.generate(ids, attention_mask=mask, use_cache=use_cache, **SIX)[:, -6:]
    assert torch.equal(found, torch.stack(alone))
    assert not torch.equal(found, plain)
