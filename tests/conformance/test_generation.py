"""Every way to generate, over a mixed and padded batch: tokens, and the logits they were chosen from, row by row."""

import copy

import pytest
import torch

from conformance import reference
from conformance.families import build_model
from conformance.scene import END, LOGITS, PADDINGS, SIX, Scene, check_greedy, check_steps, greedy, padding, states_of
from prefixkit.errors import InjectionError
from prefixkit.injection import attach

slow = pytest.mark.slow


def generate(scene, **settings):
    """Generate for the whole batch under its rows' prefixes."""
    with attach(scene.model, scene.rows):
        return scene.model.generate(scene.ids, attention_mask=scene.mask, **SIX | settings)


@pytest.mark.cell("greedy")
def test_greedy(cell, scene):
    check_greedy(cell, scene, generate(scene, **LOGITS))


@slow
@pytest.mark.every_family
@pytest.mark.cell("no-cache")
def test_without_a_cache(cell, scene):
    check_greedy(cell, scene, generate(scene, use_cache=False, **LOGITS))


@slow
@pytest.mark.every_family
@pytest.mark.cell("static")
def test_with_a_static_cache(cell, scene):
    check_greedy(cell, scene, generate(scene, cache_implementation="static", **LOGITS))


@slow
@pytest.mark.every_family
@pytest.mark.cell("chunked")
@pytest.mark.parametrize("chunk", [1, 4])
def test_with_a_prompt_read_in_chunks(cell, chunk, scene):
    check_greedy(cell, scene, generate(scene, prefill_chunk_size=chunk, **LOGITS))


@slow
@pytest.mark.every_family
@pytest.mark.cell("embeds")
def test_from_embeddings(cell, scene):
    embeds = scene.model.get_input_embeddings()(scene.ids)
    if scene.family.model_type == "ctrl":
        with attach(scene.model, scene.rows), cell.refused(ValueError, "doesn't have its forwarding implemented"):
            scene.model.generate(inputs_embeds=embeds, attention_mask=scene.mask, **SIX)
        return
    with attach(scene.model, scene.rows):
        output = scene.model.generate(inputs_embeds=embeds, attention_mask=scene.mask, **SIX | LOGITS)
    check_greedy(cell, scene, output)


@slow
@pytest.mark.every_family
@pytest.mark.cell("continued")
@pytest.mark.parametrize("copied", [False, True])
def test_going_on_from_a_returned_cache(cell, copied, scene):
    three = {"max_new_tokens": 3, "min_new_tokens": 3}
    first = generate(scene, **LOGITS | three)
    cache = copy.deepcopy(first.past_key_values) if copied else first.past_key_values
    mask = torch.cat([scene.mask, scene.mask.new_ones(3, 3)], dim=1)
    with attach(scene.model, scene.rows):
        second = scene.model.generate(
            first.sequences, attention_mask=mask, past_key_values=cache, **SIX | LOGITS | three
        )
    second.logits = first.logits + second.logits
    check_greedy(cell, scene, second)


@pytest.mark.every_family
@pytest.mark.cell("beams")
@pytest.mark.parametrize("returned", [pytest.param(1, marks=slow), 3])
def test_beams(cell, returned, scene):
    settings = {
        "num_beams": 3,
        "num_return_sequences": returned,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    output = generate(scene, **settings)
    for row, prefix in enumerate(scene.rows):
        text = scene.alone(row)
        with attach(scene.model, prefix):
            alone = scene.model.generate(text, attention_mask=torch.ones_like(text), **SIX | settings)
        mine = slice(row * returned, (row + 1) * returned)
        cell.exact(output.sequences[mine, -6:], alone.sequences[:, -6:])
        check_scores(cell, scene, row, output.sequences[mine, -6:], output.sequences_scores[mine])


def check_scores(cell, scene, row, continuations, scores):
    """What beam search says a continuation scores is its mean log-probability under the loops."""
    cell.exact(scores.double(), torch.stack([scene.score(row, continuation) for continuation in continuations]))


@slow
@pytest.mark.every_family
@pytest.mark.cell("beam-sampling")
def test_beam_sampling(cell, scene):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        output = generate(scene, num_beams=3, do_sample=True, top_k=0, num_return_sequences=2,
                          return_dict_in_generate=True, output_scores=True)  # fmt: skip
    for row in range(3):
        mine = slice(row * 2, row * 2 + 2)
        check_scores(cell, scene, row, output.sequences[mine, -6:], output.sequences_scores[mine])


@slow
@pytest.mark.every_family
@pytest.mark.cell("sampling")
@pytest.mark.parametrize("returned", [1, 2])
def test_sampling(cell, returned, scene):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        output = generate(scene, do_sample=True, temperature=0.7, num_return_sequences=returned, **LOGITS)
    assert (output.sequences[:, -6:] != END).all()
    for place, continuation in enumerate(output.sequences[:, -6:]):
        check_steps(cell, scene, place // returned, continuation, [step[place] for step in output.logits])


@slow
@pytest.mark.every_family
@pytest.mark.cell("assisted")
@pytest.mark.parametrize("assistant", ["another model", "itself"])
def test_assisted(cell, assistant, any_family, scene):
    helper = scene.model if assistant == "itself" else build_model(any_family, seed=5)
    check_one_row(cell, scene, assistant_model=helper)


@slow
@pytest.mark.every_family
@pytest.mark.cell("lookup")
def test_prompt_lookup(cell, scene):
    repeated = Scene(scene.family, scene.model, scene.rows, scene.ids[:, [0, 1, 2, 0, 1, 2, 0, 1, 2]], scene.mask)
    check_one_row(cell, repeated, prompt_lookup_num_tokens=3)


def check_one_row(cell, scene, **settings):
    """Ways that take one row at a time: under one prefix, and under a list of one."""
    text = scene.alone(0)
    for prefix in (scene.rows[0], [scene.rows[0]]):
        with attach(scene.model, prefix):
            output = scene.model.generate(text, attention_mask=torch.ones_like(text), **SIX | LOGITS | settings)
        continuation = output.sequences[0, text.shape[1] :]
        check_steps(cell, scene, 0, continuation, [step[0] for step in output.logits])
        cell.exact(continuation, greedy(scene.steps(0, continuation)))


@slow
@pytest.mark.every_family
@pytest.mark.cell("guidance")
def test_guidance_reads_the_prefix_on_both_sides(cell, scene, make_ids):
    negative = make_ids(3, 4, seed=7)
    output = generate(
        scene, guidance_scale=1.5, negative_prompt_ids=negative, output_scores=True,
        negative_prompt_attention_mask=torch.ones_like(negative), **LOGITS,
    )  # fmt: skip
    for row in range(3):
        continuation = output.sequences[row, -6:]
        check_steps(cell, scene, row, continuation, [step[row] for step in output.logits])
        wanted = torch.log_softmax(scene.steps(row, continuation), dim=-1)
        unwanted = torch.log_softmax(scene.logits(row, torch.cat([negative[row], continuation]))[3:-1], dim=-1)
        expected = unwanted + 1.5 * (wanted - unwanted)
        expected[:, END] = -torch.inf
        cell.exact(torch.stack([step[row] for step in output.scores]), expected)


@slow
@pytest.mark.every_family
@pytest.mark.cell("quantised")
def test_with_a_quantised_cache(cell, scene, make_prefix):
    """A quantised cache is not exact by itself: the loops read the same one, under prefixes that move no position."""
    rows = [make_prefix(scene.model, 3, seed=1, offset=0), None, make_prefix(scene.model, 2, seed=2, offset=0)]
    settings = LOGITS | {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    if scene.family.window is not None:
        kinds = "`QuantizedCache` is only supported for models with only full attention layers"
        with attach(scene.model, rows), cell.refused(ValueError, kinds):
            scene.model.generate(scene.ids, attention_mask=scene.mask, **SIX | settings)
        return
    with reference.reading(scene.model, states_of(rows)):
        expected = scene.model.generate(scene.ids, attention_mask=scene.mask, **SIX | settings)
    with attach(scene.model, rows):
        output = scene.model.generate(scene.ids, attention_mask=scene.mask, **SIX | settings)
    cell.exact(output.sequences, expected.sequences)
    cell.exact(torch.stack(output.logits), torch.stack(expected.logits))


@pytest.mark.cell("offloaded")
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_needs_a_device_to_come_from(cell, kind, family, make_model, make_prefix, make_ids):
    model, ids = make_model(family), make_ids(2, 5)
    if not torch.cuda.is_available():
        missing = f"cache_implementation: '{kind}' moves keys and values between a CUDA device and the CPU, and torch f"
        with attach(model, make_prefix(model, 3)), cell.refused(InjectionError, missing):
            model.generate(ids, cache_implementation=kind, **SIX)
        return
    model, ids = make_model(family, fresh=True).to("cuda"), ids.to("cuda")
    with attach(model, make_prefix(model, 3)):
        cell.exact(model.generate(ids, cache_implementation=kind, **SIX), model.generate(ids, **SIX))


@slow
@pytest.mark.cell("greedy")
@pytest.mark.parametrize("padded", PADDINGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_of_any_padding(cell, family, attention, padded, all_float64, make_model, make_prefix, make_ids):
    """The loops generate the same batch, under prefixes that move no position; right padding is read as it stands."""
    model, ids = make_model(family, attention), make_ids(3, 9)
    rows = [make_prefix(model, 3, seed=1, offset=0), None, make_prefix(model, [2, 0, 1], seed=2, offset=0, gated=True)]
    settings = SIX | LOGITS | {"attention_mask": padding(padded, 3, 9)}
    with reference.reading(model, states_of(rows)):
        expected = model.generate(ids, **settings)
    with attach(model, rows):
        output = model.generate(ids, **settings)
    cell.exact(output.sequences, expected.sequences)
    cell.exact(torch.stack(output.logits), torch.stack(expected.logits))
