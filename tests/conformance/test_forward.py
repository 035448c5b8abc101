"""One forward pass of every family: logits and gradients against the loops, a filled cache, and the text itself."""

from functools import cache

import pytest
import torch

from conformance import reference
from conformance.families import FAMILIES
from conformance.scene import PADDINGS, offsets_of, padding, states_of
from prefixkit.injection import attach
from prefixkit.models.text_states import text_states
from prefixkit.prefix import BaseCard, Prefix, PrefixEncoder, reproduce

ATTENTIONS = [(name, attention) for name, family in FAMILIES.items() for attention in family.attentions]


def weighted(logits, seen):
    """A number that depends on every logit that counts."""
    weights = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return (logits * weights * seen[..., None]).sum()


@pytest.fixture(scope="session")
def expected_with_gradients(make_model, make_states, make_ids):
    """The loops' answer, once for both implementations: logits, and gradients of inputs and states."""

    @cache
    def compute(name, kind):
        model, mask = make_model(name), padding(kind, 3, 6)
        states, ids = make_states(model, [3, 0, 2], grad=True), make_ids(3, 6)
        seen = torch.ones(3, 6, dtype=torch.bool) if mask is None else mask.bool()
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = reference.logits(model, FAMILIES[name], [states] * 3, [3] * 3, embeds, mask)
        leaves = [embeds, *(part for site in states.sites if site.length for part in (site.key, site.value))]
        return logits.detach(), torch.autograd.grad(weighted(logits, seen), leaves), mask, seen, states.detach()

    return compute


@pytest.mark.every_family(padded="left")
@pytest.mark.cell("forward")
@pytest.mark.parametrize("padded", PADDINGS)
@pytest.mark.parametrize(("any_family", "attention"), ATTENTIONS)
def test_logits_and_gradients_equal_the_loops(
    any_family, attention, padded, cell, all_float64, make_model, make_ids, expected_with_gradients
):
    logits, gradients, mask, seen, states = expected_with_gradients(any_family, padded)
    model = make_model(any_family, attention)
    encoder = PrefixEncoder(states.geometry, states.lengths, dtype=torch.float64)
    reproduce(encoder, states)
    embeds = model.get_input_embeddings()(make_ids(3, 6)).detach().requires_grad_()
    with attach(model, encoder):
        found = model(inputs_embeds=embeds.clone(), attention_mask=mask, use_cache=False).logits
        weighted(found, seen).backward()
    parts = [embeds.grad, *(part for pair in encoder.states if pair.shape[2] for part in pair.grad)]
    assert min(float(part.abs().max()) for part in parts) > 1e-6
    cell.exact(found[seen], logits[seen])
    cell.exact(parts, list(gradients))


@pytest.mark.every_family(padded="left")
@pytest.mark.cell("mixed")
@pytest.mark.parametrize("padded", PADDINGS)
def test_every_row_of_a_mixed_batch_reads_its_own_prefix(any_family, padded, cell, scene):
    mask = padding(padded, 3, 9)
    seen = torch.ones(3, 9, dtype=torch.bool) if mask is None else mask.bool()
    embeds = scene.model.get_input_embeddings()(scene.ids)
    for order in ([0, 1, 2], [2, 0, 1], [2, 0, 2]):
        rows = [scene.rows[i] for i in order]
        expected = reference.logits(scene.model, scene.family, states_of(rows), offsets_of(rows), embeds, mask)
        with attach(scene.model, rows):
            found = scene.model(input_ids=scene.ids, attention_mask=mask).logits
        cell.exact(found[seen], expected[seen])


@pytest.mark.cell("text")
def test_the_states_of_a_text_equal_the_text_as_prompt(any_family, cell, scene, make_ids):
    model = scene.model
    before, after = (4, 5) if scene.family.window is None else (2, 2)  # all of it inside the window
    text, ids = make_ids(before, seed=4), make_ids(2, after)
    expected = model(input_ids=torch.cat([text.expand(2, -1), ids], dim=1)).logits[:, before:]
    plain = model(input_ids=ids).logits
    with attach(model, [Prefix.from_states(text_states(model, text), base=BaseCard(id="tiny")), None]):
        found = model(input_ids=ids).logits
    assert float((expected - plain).abs().max()) > 1e-3
    cell.exact(found, torch.stack([expected[0], plain[1]]))


@pytest.mark.cell("cache-oracle")
def test_a_filled_cache_gives_the_same(
    any_global_family, cell, all_float64, make_model, make_states, make_ids, cache_logits
):
    model, ids, mask = make_model(any_global_family), make_ids(3, 6), padding("left", 3, 6)
    states = make_states(model, 3)
    expected = cache_logits(model, states, ids, mask)
    with attach(model, Prefix.from_states(states, base=BaseCard(id="tiny"))):
        found = model(input_ids=ids, attention_mask=mask).logits
    cell.exact(found[mask.bool()], expected[mask.bool()])


@pytest.mark.cell("packed")
def test_packed_documents_equal_the_loops(any_family, cell, scene):
    model, prefix = scene.model, scene.rows[0]
    packed, positions = scene.ids[:1], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    embeds = model.get_input_embeddings()(packed)
    expected = reference.logits(
        model, scene.family, [prefix.states], [prefix.position_offset], embeds, position_ids=positions
    )
    with attach(model, prefix):
        found = model(input_ids=packed, position_ids=positions, use_cache=False).logits
    cell.exact(found, expected)
    plain = model(input_ids=packed, position_ids=positions, use_cache=False).logits[:, 4:]
    separate = model(input_ids=packed[:, 4:], use_cache=False).logits
    if float((plain - separate).abs().max()) < 1e-10:  # the family tells documents apart: so it must with a prefix
        cell.exact(found[0, 4:], scene.logits(0, packed[0, 4:]))
