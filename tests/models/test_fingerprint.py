"""The fingerprint tells models apart by what they compute, not by how they are stored."""

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from conformance.encoder_families import ENCODER_DECODERS, ENCODERS, build
from conformance.families import FAMILIES, build_model
from conformance.test_all_of_transformers import build_tiny
from prefixkit.errors import BaseMismatchError
from prefixkit.models import fingerprint as fingerprints
from prefixkit.models.fingerprint import check_base, fingerprint, sample
from prefixkit.models.older_fingerprints import older_sample, older_settings_of
from prefixkit.models.packaged import SMOLLM2_135M
from prefixkit.models.settings import settings_of
from prefixkit.models.weights import all_modules
from prefixkit.prefix import BaseCard

FIXTURES = Path(__file__).parents[1] / "fixtures"
RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_does_not_depend_on_the_number_format(make_tiny_llama, dtype):
    model = make_tiny_llama().bfloat16()  # numbers that every format here holds
    assert fingerprint(copy.deepcopy(model).to(dtype)) == fingerprint(model.float())


@pytest.mark.parametrize("columns", [slice(1, None), slice(64, None), slice(0, 64)])
def test_what_changed_in_some_columns_of_a_wide_weight_is_seen(make_tiny_llama, columns):
    """Heads that were silenced, say: even steps through a weight of 512 columns met the first of them only."""
    model = make_tiny_llama(hidden_size=512, num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=1)
    before = fingerprint(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, columns] = 0
    assert fingerprint(model) != before


def test_numbers_are_sampled_all_over_a_weight_and_each_once():
    for rows, columns in ((512, 512), (1000, 576), (513, 1), (49152, 576), (7, 3)):
        places = sample(torch.arange(rows * columns))
        assert len(set(places.tolist())) == len(places) == min(512, rows * columns)
        tenths = torch.bincount(places % columns * 10 // columns, minlength=10)
        if columns > 100:
            assert tenths.min() > 30


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


def test_it_follows_weights_that_change_behind_torchs_back(make_tiny_llama):
    model = make_tiny_llama()
    before = fingerprint(model)
    model.model.layers[1].mlp.up_proj.weight.data[5].mul_(2)  # no counter of torch's moves
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.mul_(2),
        lambda weight: weight.data[-2:].fill_(0.5),  # as those of added tokens are set
        lambda weight: weight.data.add_(1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefix_does_not_go_to_a_base_that_changed_behind_torchs_back(make_tiny_llama, change, dtype):
    model = make_tiny_llama().to(dtype)
    base = BaseCard(id="tiny", fingerprint=fingerprint(model))
    check_base(model, base)
    change(model.model.embed_tokens.weight)
    with pytest.raises(BaseMismatchError):
        check_base(model, base)


def test_it_follows_settings_that_change_inside_others(make_tiny_llama):
    model = make_tiny_llama()
    before = fingerprint(model)
    model.config.rope_parameters["rope_theta"] *= 2
    assert fingerprint(model) != before


def test_it_follows_modules_that_are_replaced(make_tiny_llama):
    model, other = make_tiny_llama(), make_tiny_llama(seed=1)
    before = fingerprint(model)
    model.model.layers[1].mlp = other.model.layers[1].mlp
    assert fingerprint(model) != before


def test_all_modules_are_found_once_shared_ones_too(make_tiny_llama):
    model = make_tiny_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    found = all_modules(model)
    assert len(found) == len(set(found))
    assert set(found) == set(model.modules())


ALL = [*FAMILIES, *ENCODER_DECODERS, *ENCODERS]


def build_any(name, **changes):
    if name in FAMILIES:
        return build_model(name, **changes)
    return build((ENCODER_DECODERS | ENCODERS)[name], AutoModel if name in ENCODERS else AutoModelForSeq2SeqLM)


@pytest.mark.parametrize("name", ALL)
def test_a_saved_copy_has_the_same_one(tmp_path, name):
    """Files keep a setting's keys in another order than a configuration just made (ModernBERT's rotary settings)."""
    model = build_any(name)
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
    assert fingerprint(saved) == fingerprint(model)
    again = type(model)(type(model.config)(**model.config.to_dict())).double()
    again.load_state_dict(model.state_dict())
    assert fingerprint(again) == fingerprint(model)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("mixtral", "num_experts_per_tok", 1),
        ("olmoe", "norm_topk_prob", True),
        ("glm4-moe", "routed_scaling_factor", 7.0),
        ("starcoder2", "norm_epsilon", 0.1),
        ("nemotron", "norm_eps", 0.5),
        ("smollm3", "no_rope_layer_interval", 3),
        ("smollm3", "no_rope_layers", [0, 1, 1]),
        ("llama4", "attention_chunk_size", 8),
        ("olmo", "clip_qkv", 0.1),
        ("gpt-oss", "swiglu_limit", 0.1),
        ("minimax-m2", "rotary_dim", 4),
        ("phi-moe", "router_jitter_noise", 0.4),
        ("llama", "rms_norm_eps", 0.1),
        ("gemma2", "final_logit_softcapping", 0.5),
        ("granite", "logits_scaling", 2.0),
        ("mistral-window", "sliding_window", 3),
    ],
)
def test_it_tells_whatever_setting_changes_the_answer(name, key, value, make_ids):
    model, other = build_model(name), build_model(name, **{key: value})
    other.load_state_dict(model.state_dict())
    ids = make_ids(2, 9)
    assert float((model(input_ids=ids).logits - other(input_ids=ids).logits).abs().max()) > 1e-6, "it must matter here"
    assert fingerprint(model) != fingerprint(other)


def test_it_tells_a_setting_that_no_release_of_transformers_knows(make_tiny_llama):
    model, other = make_tiny_llama(), make_tiny_llama()
    other.config.something_new = 0.5
    assert fingerprint(model) != fingerprint(other)


def test_it_tells_where_the_positions_of_an_encoders_text_begin():
    """RoBERTa's begin behind the entry of padding; for the rest padding's id is any other."""
    same = {}
    for name in ("roberta", "bert"):
        model, other = (build(ENCODERS[name], AutoModel, pad_token_id=padding) for padding in (0, 1))
        other.load_state_dict(model.state_dict())
        same[name] = fingerprint(model) == fingerprint(other)
    assert same == {"roberta": False, "bert": True}


def test_it_follows_settings_that_change_in_place(make_tiny_llama):
    model = make_tiny_llama()
    before = fingerprint(model)
    model.config.rms_norm_eps = 0.5
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pad_token_id", 5),
        ("eos_token_id", [3, 4]),
        ("use_cache", False),
        ("attention_dropout", 0.3),
        ("initializer_range", 0.5),
        ("id2label", {0: "A", 1: "B", 2: "C"}),
        ("problem_type", "regression"),
        ("dtype", torch.bfloat16),
        ("name_or_path", "elsewhere"),
        ("output_hidden_states", True),
        ("do_sample", True),
        ("temperature", 0.7),
        ("max_new_tokens", 5),
        ("architectures", ["Other"]),
        ("added_by_a_later_release", None),
    ],
)
def test_what_cannot_change_the_layers_does_not_count(make_tiny_llama, key, value):
    model = make_tiny_llama()
    before = fingerprint(model)
    setattr(model.config, key, value)
    assert fingerprint(model) == before


def test_a_setting_that_is_the_default_need_not_be_known(make_tiny_llama):
    """So the releases of transformers before and after one that adds a setting agree."""
    model = make_tiny_llama()
    before = fingerprint(model)
    del model.config.mlp_bias
    assert fingerprint(model) == before


def test_numbers_count_by_value_not_by_kind(make_tiny_llama):
    model = make_tiny_llama()
    before = fingerprint(model)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000}
    assert (fingerprint(model), type(model.config.rope_parameters["rope_theta"])) == (before, int)


def test_settings_that_differ_by_layer_count_layer_by_layer():
    model = build_tiny("gemma4_unified_text")
    assert model.config.is_heterogeneous
    prints = {fingerprint(model)}
    for head_dim in (8, 16):
        model.config.per_layer_config = {0: {"head_dim": head_dim}, 2: {"head_dim": 4}}
        prints.add(fingerprint(model))
    assert len(prints) == 3
    check_base(model, BaseCard(id="tiny", fingerprint=fingerprint(model)))
    with pytest.raises(BaseMismatchError):
        check_base(model, BaseCard(id="tiny", fingerprint="0" * 64))


def test_the_settings_of_every_family_are_written_as_ever():
    """A release, of prefixkit's or transformers', that wrote them in another way would refuse all saved prefixes."""
    found = {name: hashlib.sha256(settings_of(build_any(name)).encode()).hexdigest()[:16] for name in ALL}
    assert found == json.loads((FIXTURES / "settings.json").read_text())


def test_prefixes_from_when_the_order_of_a_settings_keys_counted_are_still_accepted(make_tiny_llama):
    model = make_tiny_llama()
    model.config.rope_parameters = dict(sorted(model.config.rope_parameters.items(), reverse=True))
    newer, older = older_settings_of(model)
    assert "'rope_theta': 10000.0, 'rope_type': 'default'" in newer
    assert "'rope_type': 'default', 'rope_theta': 10000.0" in older
    prints = fingerprints._digests(model, [(newer, older_sample), (older, older_sample)])
    assert len({*prints, fingerprint(model)}) == 3  # else this would show nothing
    for old in prints:
        check_base(model, BaseCard(id="tiny", fingerprint=old))
        with pytest.raises(BaseMismatchError):
            check_base(make_tiny_llama(seed=1), BaseCard(id="tiny", fingerprint=old))


def test_the_published_results_still_name_their_base():
    """Their base is a package, so this looks only where it has been fetched before."""
    if not SMOLLM2_135M.is_ready():
        pytest.skip("the packaged model is not in the cache")
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2_135M.folder, dtype=torch.bfloat16)
    run = json.loads((RESULTS / "positive-reviews" / "run.json").read_text())
    check_base(model, BaseCard(id="smollm2-135m", fingerprint=run["base"]["fingerprint"]))
