"""What a method cannot do is refused in one line that says so, word for word, and the model is left alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, PreTrainedModel

from conformance.encoder_families import ENCODER_DECODERS
from conformance.encoder_families import build as build_encoder_decoder
from methods.conftest import METHODS
from prefixkit.config import Method, MethodConfig, PrefixConfig, load_recipe
from prefixkit.errors import ArtefactError, ConfigError, PrefixkitError, UnsupportedModelError
from prefixkit.methods import build_delta, new_soft_prompt, restore_delta
from prefixkit.models.weights import all_modules
from prefixkit.prefix import Delta

Make = Callable[..., Any]
LINEAR = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"


def refusal(error: type[PrefixkitError], call: Callable[[], object]) -> str:
    """What is said."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    return str(caught.value)


def build(model: PreTrainedModel, settings: Any) -> Any:
    return build_delta(model, MethodConfig.model_validate(settings), torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def make_any(make_model: Make) -> Make:
    """A factory of fresh models: of a decoder-only family, or an encoder or encoder-decoder."""

    def make(name: str) -> PreTrainedModel:
        if name == "bert":
            return BertForMaskedLM(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                              intermediate_size=16)).eval()  # fmt: skip
        return build_encoder_decoder(ENCODER_DECODERS[name]) if name in ("t5", "bart") else make_model(name, fresh=True)

    return make


@pytest.mark.parametrize(
    ("family", "settings", "error", "message"),
    [
        ("bert", "adapter", UnsupportedModelError,
         "adapter: BertForMaskedLM is no decoder-only model, which adapters are for here; choose lora"),
        ("bart", "adapter", UnsupportedModelError,
         "adapter: BartForConditionalGeneration is no decoder-only model, which adapters are for here; choose lora"),
        ("ctrl", "adapter", UnsupportedModelError,
         "adapter: CTRLLMHeadModel has no feed-forward network that is known in transformer.h.0 (mlp, feed_forward, "
         "block_sparse_moe, or fc1 and fc2); choose another method or base model"),
        ("opt", {"kind": "adapter", "style": "parallel"}, UnsupportedModelError,
         "adapter: the feed-forward network of OPTForCausalLM is no module of its own, so nothing stands beside it; "
         "set method.style to houlsby or pfeiffer"),
        ("llama", {"kind": "bitfit", "biases": "own"}, UnsupportedModelError,
         "bitfit: LlamaForCausalLM has no biases; set method.biases=added for one on every linear layer"),
        ("t5", {"kind": "bitfit", "biases": "own"}, UnsupportedModelError,
         "bitfit: T5ForConditionalGeneration has no biases; set method.biases=added for one on every linear layer"),
        ("biogpt", "ia3", ConfigError, "ia3: PEFT knows no layers to change in a biogpt model; choose lora"),
        ("biogpt", "lora", ConfigError,
         "lora: PEFT knows no layers to change in a biogpt model; name the layers in method.targets"),
        ("llama", {"kind": "lora", "targets": ["nope"]}, ConfigError,
         f"method.targets: no layer's name ends in nope in this llama model; its linear layers are {LINEAR}"),
        ("llama", {"kind": "lora", "targets": ["q_proj", "v_porj"]}, ConfigError,  # PEFT would train q_proj
         f"method.targets: no layer's name ends in v_porj in this llama model; its linear layers are {LINEAR}"),
        ("llama", {"kind": "lora", "targets": ["proj"]}, ConfigError,
         f"method.targets: no layer's name ends in proj in this llama model; its linear layers are {LINEAR}"),
        ("llama", {"kind": "lora", "targets": ["q_proj", "input_layernorm"]}, ConfigError,
         f"method.targets: PEFT has no lora for LlamaRMSNorm; name linear layers: {LINEAR}"),
        ("llama", {"kind": "lora", "targets": ["self_attn"]}, ConfigError,
         f"method.targets: PEFT has no lora for LlamaAttention; name linear layers: {LINEAR}"),
        ("llama", {"kind": "top-layers", "top_layers": 4}, ConfigError,
         "method.top_layers: expected at most the model's 3 layers, got 4"),
        ("t5", {"kind": "top-layers", "top_layers": 3}, ConfigError,
         "method.top_layers: expected at most the model's 2 layers, got 3"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_take_is_refused_and_leaves_it_alone(
    family: str, settings: Any, error: type[PrefixkitError], message: str, make_any: Make
) -> None:
    model = make_any(family)
    modules, wanted = list(map(id, all_modules(model))), [weight.requires_grad for weight in model.parameters()]
    assert refusal(error, lambda: build(model, settings)) == message
    assert list(map(id, all_modules(model))) == modules
    assert [weight.requires_grad for weight in model.parameters()] == wanted
    assert not hasattr(model, "peft_config")


def test_bitfit_takes_the_usual_substitute_where_a_model_has_no_biases(make_any: Make) -> None:
    found = {family: build(make_any(family), "bitfit") for family in ("llama", "t5", "gpt2", "bert")}
    kinds = {family: delta.settings["biases"] for family, delta in found.items()}
    assert kinds == {"llama": "added", "t5": "added", "gpt2": "own", "bert": "own"}
    networks = {"encoder": 1, "decoder": 2}  # behind so many attentions
    assert set(found["t5"].named()) == {
        f"{stack}.block.{layer}.layer.{part}.bias"
        for stack, count in networks.items()
        for layer in range(2)
        for part in (*(f"{i}.{kind}Attention.{name}" for i, kind in enumerate(("Self", "EncDec")[:count])
                       for name in "qkvo"), f"{count}.DenseReluDense.wi", f"{count}.DenseReluDense.wo")
    }  # fmt: skip


def test_biases_by_another_name_are_biases_and_routers_have_none(make_model: Make, make_ids: Make) -> None:
    experts = build(make_model("gpt-oss", "eager", fresh=True), "bitfit")
    assert {name.rpartition(".")[2] for name in experts.named()} == {"bias", "gate_up_proj_bias", "down_proj_bias"}
    for settings in ("bitfit", {"kind": "adapter", "style": "parallel"}):
        model = make_model("llama4", fresh=True)
        plain, delta = model(make_ids(2, 5)).logits, build(model, settings)
        assert not any("router" in name for name in delta.named())
        undo = delta.insert()
        assert torch.allclose(model(make_ids(2, 5)).logits, plain, rtol=0, atol=1e-12)
        undo()
    message = refusal(
        ConfigError, lambda: build(make_model("llama4", fresh=True), {"kind": "lora", "targets": ["router"]})
    )
    assert message.endswith("is a Llama4Router, which does more than a linear layer; leave router out")


def test_the_targets_that_peft_chose_are_saved(make_model: Make) -> None:
    model = make_model("llama", fresh=True)
    delta = build(model, "lora")
    assert delta.settings["targets"] == ["q_proj", "v_proj"]
    again = restore_delta(model, delta.materialise())
    assert again.named().keys() == delta.named().keys()


@pytest.mark.parametrize(("name", "layer"), [("full", 1), ("top-layers", 2)])
def test_weights_in_bits_are_not_fine_tuned(name: str, layer: int, make_model: Make) -> None:
    model, weight = make_model("llama", fresh=True), f"model.layers.{layer}.mlp.up_proj.weight"
    module: Any = model.get_submodule(weight.rpartition(".")[0])
    module.weight = nn.Parameter(torch.zeros(48, 16, dtype=torch.uint8), requires_grad=False)  # two numbers in a byte
    module.forward = lambda hidden: hidden.new_zeros(*hidden.shape[:-1], 48)
    message = f"{name}: {weight} is quantised, and cannot be trained; load the base model unquantised, or choose lora"
    assert refusal(UnsupportedModelError, lambda: build(model, METHODS[name])) == message


@pytest.mark.parametrize("name", METHODS)
def test_an_offloaded_model_takes_what_stands_beside_its_weights(
    name: str, tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    places = dict.fromkeys(["lm_head", *(f"transformer.{part}" for part in ("wte", "wpe", "h.0", "ln_f"))], "cpu")
    places |= {"transformer.h.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tiny_gpt2_dir, device_map=places, offload_folder=tmp_path, dtype=torch.float32
    )
    expected = {
        name: f"{name}: transformer.h.1.attn.c_attn is offloaded, and PEFT's layers cannot be; load the base model "
        "whole, or choose adapter"
        for name in ("lora", "ia3")
    } | {
        name: f"{name}: the base model is offloaded, and its weights cannot be trained; load it whole, or choose "
        "adapter"
        for name in ("bitfit", "full", "top-layers")
    }
    if name in expected:
        assert refusal(UnsupportedModelError, lambda: build(model, METHODS[name])) == expected[name]
    else:
        assert {number.device.type for number in build(model, METHODS[name]).numbers} == {"cpu"}


def test_a_model_with_adapters_of_its_own_takes_no_second_lora(make_model: Make) -> None:
    model = get_peft_model(make_model("llama", fresh=True), LoraConfig(r=2)).get_base_model()
    for name in ("lora", "ia3"):
        assert refusal(UnsupportedModelError, lambda name=name: build(model, METHODS[name])) == (
            f"{name}: the model has adapters of PEFT already; take them out with unload(), or attach a prefix without "
            "deltas"
        )


@pytest.mark.parametrize("method", [Method.EMBEDDING, Method.PROMPT_TUNING, Method.P_TUNING])
@pytest.mark.parametrize(
    ("family", "changes", "tokens", "error", "message"),
    [
        ("t5", {}, 4, UnsupportedModelError,
         "{}: T5ForConditionalGeneration is no decoder-only model, so a soft prompt is not read once for all rows; "
         "choose prefix or lora"),
        ("bert", {}, 4, UnsupportedModelError,
         "{}: BertForMaskedLM is no decoder-only model, so a soft prompt is not read once for all rows; "
         "choose prefix or lora"),
        ("gpt2", {"n_embd": 33, "n_head": 3}, 4, UnsupportedModelError,
         "{}: embeddings of 33 numbers cannot be halved; choose another method"),
        ("gpt2", {}, 65, ConfigError,  # transformers says: index out of range in self
         "prefix.num_virtual_tokens: the model itself reads those of {}, and its context is 64; take fewer than 65"),
        ("llama", {}, 65, ConfigError,
         "prefix.num_virtual_tokens: the model itself reads those of {}, and its context is 64; take fewer than 65"),
    ],
)  # fmt: skip
def test_soft_prompts_need_a_model_that_reads_them(
    method: Method, family: str, changes: dict[str, int], tokens: int, error: type[PrefixkitError], message: str,
    make_any: Make, make_model: Make,
) -> None:  # fmt: skip
    model = make_model(family, **changes) if changes else make_any(family)
    config = PrefixConfig(num_virtual_tokens=tokens)
    said = refusal(error, lambda: new_soft_prompt(model, method, config, dtype=torch.float64, seed=0))
    assert said == message.format(method)


#: For each setting of one method's, a value it does not have if nothing is said.
_SETTINGS = {
    "rank": ("lora", 3), "alpha": ("lora", 1.0), "dropout": ("lora", 0.5), "targets": ("lora", "[q_proj]"),
    "style": ("adapter", "houlsby"), "bottleneck": ("adapter", 3), "scale": ("adapter", 2.0),
    "biases": ("bitfit", "added"), "top_layers": ("top-layers", 1),
}  # fmt: skip


@pytest.mark.parametrize("setting", _SETTINGS)
def test_a_setting_of_another_method_is_refused_by_every_method(setting: str) -> None:
    owner, value = _SETTINGS[setting]
    for method in Method:
        overrides = [f"method={method}", f"method.{setting}={value}", "data.prompt=the film"]
        if method == owner:
            assert setting in load_recipe("positive-reviews", overrides).method.settings
            continue
        said = refusal(ConfigError, lambda overrides=overrides: load_recipe("positive-reviews", overrides))
        assert said == f"method: {setting}: is a setting of {owner}, and the method is {method}"
    assert _SETTINGS.keys() == {name for kind in Method for name in MethodConfig.model_construct(kind=kind).settings}


def test_numbers_of_another_model_are_refused(make_model: Make, make_delta: Make) -> None:
    model = make_model("llama", fresh=True)
    lora = make_delta(model, "lora").materialise()
    small = make_model("llama", fresh=True, num_hidden_layers=2)
    wide, gpt2 = make_model("llama", fresh=True, hidden_size=64), make_model("gpt2", fresh=True)
    query = "model.layers.0.self_attn.q_proj.lora_A.weight"
    found = {
        "a layer too few": (small, lora),
        "wider": (wide, lora),
        "other names": (gpt2, Delta(Method.LORA, dict(lora.settings) | {"targets": ["q_proj"]}, {})),
        "fewer layers": (small, Delta(Method.TOP_LAYERS, {"top_layers": 3}, {})),
        "a setting from the future": (model, Delta(Method.LORA, {"rank": 2, "bits": 3}, lora.tensors)),
        "a kind from the future": (model, Delta(Method.BITFIT, {"biases": "some"}, {})),
        "no delta": (model, Delta(Method.PREFIX, {}, {})),
    }
    said = {name: refusal(ArtefactError, lambda pair=pair: restore_delta(*pair)) for name, pair in found.items()}
    again = "; load the base model it was trained on"
    assert said == {
        "a layer too few": "lora: model.layers.2.self_attn.q_proj.lora_A.weight is no layer of this model" + again,
        "wider": f"lora: {query}: expected shape [2, 64], got [2, 32]" + again,
        "other names": "lora: method.targets: no layer's name ends in q_proj in this gpt2 model; its linear layers are "
        "c_attn, c_fc, c_proj, lm_head" + again,
        "fewer layers": "top-layers: method.top_layers: expected at most the model's 2 layers, got 3" + again,
        "a setting from the future": "lora: this prefixkit does not know its settings {'rank': 2, 'bits': 3}; upgrade "
        "it",
        "a kind from the future": "bitfit: this prefixkit does not know its settings {'biases': 'some'}; upgrade it",
        "no delta": "prefix: not a change of a model's layers that this prefixkit knows; upgrade it",
    }  # fmt: skip
