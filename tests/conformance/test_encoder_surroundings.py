"""What stands around an encoder: embeddings as input, low precision, pipelines, device maps, LoRA, other attentions."""

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, pipeline

from conformance.encoder_families import ENCODERS, build
from conformance.reference import reading
from conformance.unsupported import check_flex_is_refused, check_reentrant_is_refused
from prefixkit.errors import InjectionError
from prefixkit.injection import attach
from prefixkit.prefix import BaseCard, Prefix

pytestmark = pytest.mark.slow
UNITS = 16
TASKS = {
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
}


def three_rows(make_prefix, model):
    """A prefix with a layer of no length, none, and a gated one."""
    return [make_prefix(model, [3, 0, 2], seed=1), None, make_prefix(model, 4, seed=2, gated=True)]


def text(make_ids):
    """Three padded rows, as arguments."""
    ids = make_ids(3, 7)
    mask = torch.ones_like(ids)
    mask[1, -1:], mask[2, -2:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def expected_logits(model, rows, inputs):
    """What the loops give."""
    with reading(model, [row and row.states for row in rows]):
        return model(**inputs).logits


@pytest.mark.cell("embeds")
@pytest.mark.parametrize("automodel", list(TASKS.values()), ids=list(TASKS))
def test_embeddings_in_place_of_tokens(encoder, automodel, cell, all_float64, make_prefix, make_ids):
    model, inputs = build(ENCODERS[encoder], automodel), text(make_ids)
    rows = three_rows(make_prefix, model)
    expected = expected_logits(model, rows, inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with attach(model, rows):
        cell.exact(model(inputs_embeds=embeds, **inputs).logits, expected)


@pytest.mark.cell("precision")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_low_precision_stays_within_rounding_of_float64(encoder, dtype, attention, cell, make_states, make_ids):
    low = build(ENCODERS[encoder], AutoModel, attention).to(dtype)
    prefix = Prefix.from_states(make_states(low, 3).map(lambda t: t.to(dtype)), base=BaseCard(id="tiny"))
    inputs = text(make_ids)
    with attach(low, [prefix, None, prefix]):
        found = low(**inputs).last_hidden_state.double()
    exact = low.double()  # the same weights, bit for bit
    same = Prefix.from_states(prefix.states.map(Tensor.double), base=BaseCard(id="tiny"))
    with attach(exact, [same, None, same]):
        expected = exact(**inputs).last_hidden_state
    seen = inputs["attention_mask"].bool()
    error = (found - expected)[seen].norm() / expected[seen].norm()
    cell.exact(float(error) <= UNITS * torch.finfo(dtype).eps, True)


@pytest.mark.cell("checkpointing")
def test_reentrant_checkpointing_is_refused(encoder, cell, make_states, make_ids):
    model = build(ENCODERS[encoder], AutoModelForSequenceClassification)
    check_reentrant_is_refused(cell, model, make_states(model, 2), **text(make_ids))


@pytest.mark.cell("flex")
def test_flex_attention_is_refused(encoder, cell):
    check_flex_is_refused(cell, build(ENCODERS[encoder], AutoModel))


@pytest.mark.cell("pipeline")
@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_says_what_the_rows_prefixes_say(core_encoder, task, cell, make_prefix, tiny_tokenizer):
    model = build(ENCODERS[core_encoder], TASKS[task], vocab_size=len(tiny_tokenizer))
    texts, rows = ["the film was", "a", "i love this plot"], three_rows(make_prefix, model)
    classify = pipeline(task, model=model, tokenizer=copy.deepcopy(tiny_tokenizer))

    def scores(results):
        each = [[one] if isinstance(one, dict) else one for one in results]
        return [[round(float(token["score"]), 6) for token in tokens] for tokens in each]

    alone = []
    for prefix, one in zip(rows, texts, strict=True):
        with attach(model, prefix):
            logits = model(**tiny_tokenizer([one], return_tensors="pt")).logits[0].softmax(dim=-1)
        best = logits.max(dim=-1).values
        alone.append([round(score, 6) for score in best.reshape(-1).tolist()])
    with attach(model, rows):
        cell.exact(scores(classify(texts, batch_size=3)), alone)
        with pytest.raises(InjectionError, match="prefixes for 3 rows are attached, the batch has 1"):
            classify(texts[:1])


@pytest.mark.cell("device-map")
@pytest.mark.parametrize("kind", ["hooks on every module", "weights offloaded"])
def test_accelerates_hooks(core_encoder, kind, cell, all_float64, make_prefix, make_ids):
    model, inputs = build(ENCODERS[core_encoder], AutoModelForSequenceClassification), text(make_ids)
    rows = three_rows(make_prefix, model)
    expected = expected_logits(model, rows, inputs)
    if kind == "weights offloaded":
        cpu_offload(model, torch.device("cpu"))
    else:
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with attach(model, rows):
        cell.exact(model(**inputs).logits, expected)


@pytest.mark.cell("lora")
def test_a_prefix_of_the_base_model_beside_a_lora(core_encoder, cell, all_float64, make_prefix, make_ids):
    model, inputs = build(ENCODERS[core_encoder], AutoModelForSequenceClassification), text(make_ids)
    rows = three_rows(make_prefix, model)
    plain = expected_logits(model, rows, inputs)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tuned = get_peft_model(model, config).double().eval()
    with attach(tuned, rows):
        found = tuned(**inputs).logits
    merged = copy.deepcopy(tuned).merge_and_unload()
    expected = expected_logits(merged, rows, inputs)
    assert float((expected - plain).abs().max()) > 1e-4
    cell.exact(found, expected)
