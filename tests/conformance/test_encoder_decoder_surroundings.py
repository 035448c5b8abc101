"""What stands around an encoder-decoder: training, low precision, pipelines, device maps, LoRA, batching."""

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import CompileConfig, pipeline

from conformance.encoder_families import ENCODER_DECODERS, build
from conformance.pairs import Pairs, cannot_cache, make_pairs
from conformance.scene import SIX
from conformance.unsupported import check_flex_is_refused, check_reentrant_is_refused
from prefixkit.errors import InjectionError
from prefixkit.injection import attach
from prefixkit.prefix import BaseCard, Prefix

pytestmark = pytest.mark.slow
#: T5 does not scale its attention scores; without a prefix, too, its rounding errors come to 19 units.
UNITS = 40


@pytest.fixture
def core(core_encoder_decoder, make_prefix):
    """Three rows of a core family, on a model of their own that may be wrapped, compiled or moved."""
    return make_pairs(build(ENCODER_DECODERS[core_encoder_decoder]), make_prefix)


@pytest.mark.cell("precision")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_low_precision_stays_within_rounding_of_float64(
    encoder_decoder, dtype, attention, cell, make_prefix, make_states, make_ids
):
    low = build(ENCODER_DECODERS[encoder_decoder], attention=attention).to(dtype)
    source = {name: value.to(dtype) if value.is_floating_point() else value
              for name, value in make_pairs(low, make_prefix).source.items()}  # fmt: skip
    prefix = Prefix.from_states(make_states(low, 3).map(lambda t: t.to(dtype)), base=BaseCard(id="tiny"))
    with attach(low, [prefix, None, prefix]):
        found = low(**source, decoder_input_ids=make_ids(3, 4)).logits.double()
    exact = low.double()  # the same weights, bit for bit
    source = {name: value.double() if value.is_floating_point() else value for name, value in source.items()}
    same = Prefix.from_states(prefix.states.map(Tensor.double), base=BaseCard(id="tiny"))
    with attach(exact, [same, None, same]):
        expected = exact(**source, decoder_input_ids=make_ids(3, 4)).logits
    error = (found - expected).norm() / expected.norm()
    cell.exact(float(error) <= UNITS * torch.finfo(dtype).eps, True)


@pytest.mark.cell("embeds")
def test_embeddings_in_place_of_tokens(encoder_decoder, cell, all_float64, make_prefix, make_ids):
    """Whisper's encoder reads features, so only its decoder reads embeddings."""
    pairs = make_pairs(build(ENCODER_DECODERS[encoder_decoder]), make_prefix)
    model, source, targets = pairs.model, dict(pairs.source), make_ids(3, 4)
    expected = pairs.logits(targets)
    if "input_ids" in source:
        source["inputs_embeds"] = model.get_encoder().get_input_embeddings()(source.pop("input_ids"))
    embeds = model.get_decoder().get_input_embeddings()(targets)
    with attach(model, list(pairs.rows)):
        cell.exact(model(**source, decoder_inputs_embeds=embeds, use_cache=False).logits, expected)
    if "inputs_embeds" in source and not cannot_cache(model):
        Pairs(model, pairs.rows, source).check(cell, Pairs(model, pairs.rows, source).generate(), is_greedy=True)


@pytest.mark.cell("checkpointing")
def test_reentrant_checkpointing_is_refused(encoder_decoder, cell, make_prefix, make_states, make_ids):
    model = build(ENCODER_DECODERS[encoder_decoder])
    inputs = {**make_pairs(model, make_prefix).source, "labels": make_ids(3, 4), "use_cache": False}
    check_reentrant_is_refused(cell, model, make_states(model, 2), **inputs)


@pytest.mark.cell("flex")
def test_flex_attention_is_refused(encoder_decoder, cell):
    check_flex_is_refused(cell, build(ENCODER_DECODERS[encoder_decoder]))


@pytest.mark.cell("compiled-forward")
def test_one_compiled_model_follows_what_is_attached(core_encoder_decoder, core, cell, unchecked, make_ids):
    """Compiled without a prefix, then run under one, another, mixed rows and none: never a stale one."""
    inputs = {**core.source, "decoder_input_ids": make_ids(3, 4)}
    first, _, third = core.rows
    cases = [None, first, third, list(core.rows), None, first]
    expected = []
    for prefix in cases:
        with attach(core.model, prefix):
            expected.append(core.model(**inputs, use_cache=False).logits)
    assert not torch.allclose(expected[1], expected[2])
    compiled = torch.compile(core.model, backend="eager")  # all but the code generator
    for prefix, logits in zip(cases, expected, strict=True):
        with attach(core.model, prefix):
            cell.exact(compiled(**inputs, use_cache=False).logits, logits, within=1e-5)


@pytest.mark.cell("compiled-generate")
def test_generation_with_a_compiled_step(core_encoder_decoder, core, cell, unchecked):
    config = CompileConfig(backend="eager", fullgraph=False)
    config._compile_all_devices = True
    settings = SIX | {"cache_implementation": "static"}
    counters, frames = torch._dynamo.utils.counters, []
    for rows in (core.rows, core.rows[::-1]):
        with attach(core.model, list(rows)):
            expected = core.model.generate(**core.source, **settings)
            counters.clear()
            found = core.model.generate(**core.source, compile_config=config, **settings)
        frames.append(counters["frames"]["total"])
        cell.exact(found, expected)
    assert frames[0] > 0


@pytest.mark.cell("generate-batch")
def test_continuous_batching_is_refused(core_encoder_decoder, core, cell, make_ids):
    with (
        attach(core.model, core.rows[0]),
        cell.refused(InjectionError, "generate_batch: continuous batching reads no prefix; call generate"),
    ):
        core.model.generate_batch(make_ids(2, 5).tolist(), max_new_tokens=3)


@pytest.mark.cell("pipeline")
def test_transformers_has_no_pipeline_left(core_encoder_decoder, core, cell):
    with cell.refused(KeyError, "The task text2text-generation has been removed from transformers"):
        pipeline("text2text-generation", model=core.model)


@pytest.mark.cell("device-map")
@pytest.mark.parametrize("kind", ["hooks on every module", "weights offloaded"])
def test_accelerates_hooks(core_encoder_decoder, kind, core, cell, all_float64):
    bare = Pairs(copy.deepcopy(core.model), core.rows, core.source)  # the loops know no hooks
    if kind == "weights offloaded":
        cpu_offload(core.model, torch.device("cpu"))
    else:
        dispatch_model(core.model, {"": "cpu"}, force_hooks=True)
    if kind == "weights offloaded" and core_encoder_decoder == "whisper":
        with cell.refused(NotImplementedError, "Cannot copy out of meta tensor"):  # without a prefix
            core.model.generate(**core.source, **SIX)
        return
    bare.check(cell, core.generate(), is_greedy=True)


@pytest.mark.cell("lora")
def test_a_prefix_of_the_base_model_beside_a_lora(core_encoder_decoder, core, cell, all_float64):
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tuned = get_peft_model(core.model, config).double().eval()
    output = Pairs(tuned, core.rows, core.source).generate()
    Pairs(copy.deepcopy(tuned).merge_and_unload(), core.rows, core.source).check(cell, output, is_greedy=True)
