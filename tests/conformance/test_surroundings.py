"""What stands around a model: compilers, pipelines, device maps, LoRA, caches of others, continuous batching."""

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from transformers import CompileConfig, pipeline

from conformance.foreign import FOREIGN, before_and_after
from conformance.scene import LOGITS, SIX, check_greedy, make_scene
from conformance.unsupported import check_flex_is_refused
from prefixkit.errors import InjectionError
from prefixkit.injection import attach

pytestmark = pytest.mark.slow


@pytest.fixture
def fresh_scene(family, make_model, make_prefix, make_ids):
    """The scene of a core family, on a model of its own that may be wrapped, compiled or moved."""
    return make_scene(family, make_model(family, fresh=True), make_prefix, make_ids)


@pytest.mark.cell("compiled-forward")
def test_one_compiled_model_follows_what_is_attached(family, cell, unchecked, fresh_scene):
    """Compiled without a prefix, then run under one, another, mixed rows and none: never a stale one."""
    model, ids = fresh_scene.model, fresh_scene.ids
    first, _, gated = fresh_scene.rows
    cases = [None, first, gated, list(fresh_scene.rows), None, first]
    expected = []
    for prefix in cases:
        with attach(model, prefix):
            expected.append(model(input_ids=ids).logits)
    assert not torch.allclose(expected[1], expected[2])
    compiled = torch.compile(model, backend="aot_eager")  # all but the code generator
    for prefix, logits in zip(cases, expected, strict=True):
        with attach(model, prefix):
            cell.exact(compiled(input_ids=ids).logits, logits, within=1e-5)  # norms and eager softmax run in float32


@pytest.mark.cell("compiled-generate")
def test_generation_with_a_compiled_step(family, cell, unchecked, fresh_scene):
    """transformers compiles the decoding step of a static cache; on the CPU only when told to."""
    settings = SIX | {"cache_implementation": "static", "attention_mask": fresh_scene.mask}
    config = CompileConfig(backend="eager", fullgraph=False)
    config._compile_all_devices = True
    counters = torch._dynamo.utils.counters
    frames = []
    for rows in (fresh_scene.rows, [None] * 3, fresh_scene.rows[::-1]):
        with attach(fresh_scene.model, rows):
            expected = fresh_scene.model.generate(fresh_scene.ids, **settings)
            counters.clear()
            found = fresh_scene.model.generate(fresh_scene.ids, compile_config=config, **settings)
        frames.append(counters["frames"]["total"])
        cell.exact(found, expected)
    assert frames[0] > 0


@pytest.mark.cell("pipeline")
@pytest.mark.parametrize("batch", [1, 3])
def test_a_pipeline_writes_what_the_rows_prefixes_say(family, batch, cell, make_model, make_prefix, tiny_tokenizer):
    model = make_model(family, vocab_size=len(tiny_tokenizer))
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.padding_side = "left"
    prompts = ["the film was", "a", "i love this plot"]
    first, second = make_prefix(model, 3, seed=1), make_prefix(model, [2, 0, 1], seed=2)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = SIX | {"return_tensors": True, "batch_size": batch}

    def tokens(results):
        return [[int(token) for token in result[0]["generated_token_ids"][-6:]] for result in results]

    alone = []
    for prefix, prompt in zip((first, None, second), prompts, strict=True):
        with attach(model, prefix):
            ids = tokenizer(prompt, return_tensors="pt")
            alone.append(model.generate(ids["input_ids"], attention_mask=ids["attention_mask"], **SIX)[0, -6:].tolist())
    if batch == 3:
        with attach(model, [first, None, second]):
            cell.exact(tokens(write(prompts, **options)), alone)
        with attach(model, [first, None]), pytest.raises(InjectionError, match="prefixes for 2 rows are attached"):
            write(prompts, **options)
    with attach(model, first):
        cell.exact(tokens(write(prompts[:1], **options)), alone[:1])


@pytest.mark.cell("device-map")
@pytest.mark.parametrize("kind", ["hooks on every module", "weights offloaded", "attached first"])
def test_accelerates_hooks(family, kind, cell, all_float64, fresh_scene):
    model = fresh_scene.model
    if kind == "weights offloaded":
        run(cell, fresh_scene, lambda: cpu_offload(model, torch.device("cpu")))
    elif kind == "hooks on every module":
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
        run(cell, fresh_scene)
    else:
        run(cell, fresh_scene, lambda: dispatch_model(model, {"": "cpu"}, force_hooks=True))


def run(cell, scene, inside=lambda: None):
    """Generate greedily under the scene's rows; `inside` is called once they are attached."""
    with attach(scene.model, scene.rows):
        inside()
        output = scene.model.generate(scene.ids, attention_mask=scene.mask, **SIX | LOGITS)
    check_greedy(cell, scene, output)


@pytest.mark.cell("lora")
def test_a_prefix_of_the_base_model_beside_a_lora(family, cell, all_float64, make_model, make_prefix, make_ids):
    model = make_model(family, fresh=True)
    plain = make_scene(family, model, make_prefix, make_ids)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tuned = get_peft_model(model, config).double().eval()
    with attach(tuned, plain.rows):
        output = tuned.generate(input_ids=plain.ids, attention_mask=plain.mask, **SIX | LOGITS)
    merged = make_scene(family, copy.deepcopy(tuned).merge_and_unload(), make_prefix, make_ids)
    check_greedy(cell, merged, output)


@pytest.mark.cell("generate-batch")
def test_continuous_batching_is_refused_and_leaves_the_model_as_it_was(family, cell, make_model, make_prefix, make_ids):
    model, ids = make_model(family, fresh=True), make_ids(2, 5)
    with attach(model, make_prefix(model, 3)):
        expected = model(input_ids=ids).logits
        with cell.refused(InjectionError, "generate_batch: continuous batching reads no prefix; call generate"):
            model.generate_batch(ids.tolist(), max_new_tokens=3)
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert "init_continuous_batching" not in vars(model)


@pytest.mark.cell("flex")
def test_flex_attention_is_refused(any_family, cell, make_model):
    check_flex_is_refused(cell, make_model(any_family, fresh=True))


@pytest.mark.cell("foreign-cache")
@pytest.mark.parametrize("filled", FOREIGN)
def test_a_foreign_cache_is_refused(any_family, filled, cell, scene):
    model = scene.model
    before, after = before_and_after(filled, scene.rows)
    with attach(model, before):
        cache = model(input_ids=scene.ids[:, :4], use_cache=True).past_key_values
    with attach(model, after), cell.refused(InjectionError, FOREIGN[filled]):
        model(input_ids=scene.ids[:, 4:], past_key_values=cache)
