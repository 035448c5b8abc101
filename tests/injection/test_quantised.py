"""A prefix on a quantised base: what the quantised base computes, exactly; and gradients that are the true ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conformance.reference import reading
from prefixkit.errors import BaseMismatchError, UnsupportedModelError
from prefixkit.injection import attach
from prefixkit.models import fingerprint as fingerprints
from prefixkit.models.fingerprint import fingerprint, weights_hash
from prefixkit.models.inspect import inspect_model
from prefixkit.models.quantised import is_quantised
from prefixkit.prefix import BaseCard, Prefix, PrefixEncoder, PrefixStates, reproduce
from prefixkit.training.loss import has_plain_head, summed_loss

from .quantised import KINDS, WEIGHT_ONLY, cells, load, needs, plain, random_states, written_out

Make = Callable[..., Any]
#: float32 against other float32 arithmetic.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def make(family: str) -> Path:
        where = tmp_path_factory.getbasetemp() / "plain" / family
        if not where.exists():
            plain(family).save_pretrained(where)
        return where

    return make


@pytest.fixture(scope="module")
def quantise(folder: Make) -> Make:
    def make(kind: str, family: str) -> PreTrainedModel:
        needs(kind)
        model = load(folder(family), family, quantization_config=KINDS[kind]())
        assert is_quantised(model)
        return model

    return make


def inputs_of(model: PreTrainedModel, make_ids: Make, rows: int = 3) -> dict[str, Tensor]:
    ids = make_ids(rows, 6)
    mask = torch.ones_like(ids)
    mask[-1, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs | ({"decoder_input_ids": make_ids(rows, 4, seed=9)} if model.config.is_encoder_decoder else {})


def moved(inputs: dict[str, Tensor], rows: list[PrefixStates | None]) -> dict[str, Tensor]:
    """The inputs with the positions that text has behind each row's prefix, for the slow reference."""
    if "decoder_input_ids" in inputs:
        return inputs
    offsets = torch.tensor([0 if row is None else row.num_virtual_tokens for row in rows])
    return inputs | {"position_ids": torch.arange(inputs["input_ids"].shape[1])[None] + offsets[:, None]}


def prefix_of(model: PreTrainedModel, states: PrefixStates) -> Prefix:
    return Prefix.from_states(states, base=BaseCard(id="tiny", fingerprint=fingerprint(model)))


@pytest.mark.parametrize(("kind", "family"), cells(WEIGHT_ONLY))
def test_mixed_rows_equal_the_slow_reference_and_each_row_alone(
    kind: str, family: str, quantise: Make, make_ids: Make
) -> None:
    model = quantise(kind, family)
    rows = [random_states(model, 4), None, random_states(model, 2, seed=5)]
    prefixes = [None if row is None else prefix_of(model, row) for row in rows]
    inputs = inputs_of(model, make_ids)
    with reading(model, rows):
        expected = model(**moved(inputs, rows)).logits
    before = model(**inputs).logits
    source = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with attach(model, prefixes):
        torch.testing.assert_close(model(**inputs).logits[:2], expected[:2], **CLOSE)
        # What padding itself computes is never read.
        torch.testing.assert_close(model(**inputs).logits[2, -4:], expected[2, -4:], **CLOSE)
        together = model.generate(**source, **settings)
    assert torch.equal(model(**inputs).logits, before)
    assert float((before - expected)[0].abs().max()) > 1e-2
    for row, prefix in enumerate(prefixes):
        with attach(model, prefix):
            alone = model.generate(**{name: value[row : row + 1] for name, value in source.items()}, **settings)
        assert torch.equal(together[row : row + 1], alone)


def gradients(
    model: PreTrainedModel, states: PrefixStates, inputs: dict[str, Tensor], *, checkpointing: bool = False
) -> list[Tensor]:
    encoder = PrefixEncoder(states.geometry, states.lengths)
    reproduce(encoder, states)
    labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    plain_head = has_plain_head(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    with attach(model, encoder):
        summed_loss(model, inputs, labels, plain_head=plain_head).backward()
    if checkpointing:
        model.activation_checkpointing_disable()
        model.eval()
    return [pair.grad for pair in encoder.states if pair.grad is not None]


@pytest.mark.parametrize(("kind", "family"), cells(WEIGHT_ONLY))
def test_gradients_are_those_of_the_weights_written_out_and_of_the_slow_reference(
    kind: str, family: str, quantise: Make, make_ids: Make
) -> None:
    model = quantise(kind, family)
    states = random_states(model, grad=True)
    inputs = inputs_of(model, make_ids)
    inspect_model(model)
    twin = written_out(model, plain(family))
    found, expected = gradients(model, states, inputs), gradients(twin, states, inputs)
    labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    rows: list[PrefixStates | None] = [states] * len(labels)
    with reading(model, rows):
        summed_loss(model, moved(inputs, rows), labels, plain_head=False).backward()
    assert len(found) == len(states.sites)
    for gradient, other, site in zip(found, expected, states.sites, strict=True):
        assert gradient.isfinite().all()
        assert float(gradient.abs().max()) > 1e-3
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
        slow = torch.stack([site.key.grad, site.value.grad])
        torch.testing.assert_close(gradient, slow, rtol=1e-3, atol=1e-3 * float(slow.abs().max()))
    for gradient, again in zip(found, gradients(model, states, inputs, checkpointing=True), strict=True):
        if model.config.model_type != "t5" and model.config.model_type != "gpt2":  # their training mode drops out
            torch.testing.assert_close(again, gradient, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_activations_rounded_to_int8_give_what_a_filled_cache_gives(
    family: str, quantise: Make, make_ids: Make, cache_logits: Make
) -> None:
    model = quantise("bitsandbytes int8", family)
    states = random_states(model, grad=True)
    ids = make_ids(2, 7)
    weights = torch.randn(2, 7, model.config.vocab_size, generator=torch.Generator().manual_seed(3))
    expected = cache_logits(model, states, ids, None)
    (expected * weights).sum().backward()
    encoder = PrefixEncoder(states.geometry, states.lengths)
    reproduce(encoder, states)
    with attach(model, encoder):
        found = model(input_ids=ids).logits
        (found * weights).sum().backward()
    torch.testing.assert_close(found, expected, **CLOSE)
    for pair, site in zip(encoder.states, states.sites, strict=True):
        slow = torch.stack([site.key.grad, site.value.grad])
        torch.testing.assert_close(pair.grad, slow, rtol=1e-3, atol=1e-3 * float(slow.abs().max()))
        assert float(pair.grad.abs().max()) > 1e-3
    prefixes = [prefix_of(model, random_states(model, 4)), None]
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with attach(model, prefixes):
        together = model.generate(ids, **settings)
    for row, prefix in enumerate(prefixes):
        with attach(model, prefix):
            assert torch.equal(model.generate(ids[row : row + 1], **settings), together[row : row + 1])


def test_layers_that_lose_the_gradient_generate_but_do_not_train(
    quantise: Make, make_ids: Make, cache_logits: Make
) -> None:
    model = quantise("torchao int8 dynamic", "llama")
    states = random_states(model)
    ids = make_ids(2, 7)
    before = model(input_ids=ids).logits
    expected = cache_logits(model, states, ids, None)
    with attach(model, prefix_of(model, states)):
        torch.testing.assert_close(model(input_ids=ids).logits, expected, **CLOSE)
    with pytest.raises(UnsupportedModelError, match="quantised as Int8Tensor pass no gradient back, so no prefix can"):
        attach(model, PrefixEncoder(states.geometry, states.lengths))
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize(("kind", "family"), cells([*WEIGHT_ONLY, "bitsandbytes int8"]))
def test_training_lowers_the_loss_and_leaves_every_quantised_byte(
    kind: str, family: str, quantise: Make, make_ids: Make
) -> None:
    model = quantise(kind, family)
    before, identity = weights_hash(model), fingerprint(model)
    states = random_states(model)
    encoder = PrefixEncoder(states.geometry, states.lengths)
    reproduce(encoder, states)
    optimiser = torch.optim.Adam(encoder.parameters(), lr=0.1)
    inputs = inputs_of(model, make_ids)
    labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    plain_head, losses = has_plain_head(model), []
    with attach(model, encoder):
        for _ in range(8):
            loss = summed_loss(model, inputs, labels, plain_head=plain_head)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert weights_hash(model) == before
    fingerprints._known.clear()
    assert fingerprint(model) == identity


@pytest.mark.parametrize(("kind", "family"), cells(KINDS))
def test_the_fingerprint_is_the_quantised_bases_own(kind: str, family: str, quantise: Make) -> None:
    model, same, unquantised = quantise(kind, family), quantise(kind, family), plain(family)
    assert fingerprint(model) == fingerprint(same) != fingerprint(unquantised)
    assert fingerprint(model) == fingerprint(model)
    prefix = prefix_of(unquantised, random_states(unquantised))
    with pytest.raises(BaseMismatchError, match="in the precision it was trained on: quantised the same way, or not"):
        attach(model, prefix)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "twice" not in kind])
def test_a_quantised_head_is_left_to_compute_its_logits_itself(kind: str, quantise: Make, make_ids: Make) -> None:
    model = quantise(kind, "llama")
    assert has_plain_head(model)
    layer = model.model.layers[0].mlp.gate_proj  # any quantised layer that reads the same width
    model.lm_head = layer
    model.config.vocab_size = layer.out_features
    assert not has_plain_head(model)
    ids = make_ids(2, 6) % layer.out_features
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = model(**inputs).logits[:, :-1].float()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(summed_loss(model, inputs, ids, plain_head=False), expected, **CLOSE)


def test_four_bit_weights_that_were_rearranged_for_inference_are_refused(quantise: Make, make_ids: Make) -> None:
    model = quantise("bitsandbytes nf4", "llama")
    linear = model.model.layers[0].mlp.up_proj
    ids = make_ids(1, 5)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # as on a CPU that has it
            module.support_avx512bf16_for_cpu = module is linear
    with torch.no_grad():
        model(input_ids=ids)
    assert linear.weight.quant_state.packing_format_for_cpu
    for look in (inspect_model, fingerprint, weights_hash):
        with pytest.raises(UnsupportedModelError, match="rearranged its 4-bit weights .* load it again, and before"):
            look(model)


def test_an_inspected_four_bit_base_is_not_rearranged(quantise: Make, make_ids: Make) -> None:
    model = quantise("bitsandbytes nf4", "llama")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    before = weights_hash(model)
    inspect_model(model)
    with torch.no_grad():
        model(input_ids=make_ids(1, 5))
    assert not hasattr(model.model.layers[0].mlp.up_proj.weight.quant_state, "packing_format_for_cpu")
    assert weights_hash(model) == before
