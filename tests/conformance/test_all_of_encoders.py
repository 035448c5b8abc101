"""Every encoder-decoder and masked language model transformers has, as a tiny one: exact, or refused by name."""

import re

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from conformance.pairs import make_pairs
from conformance.precision import KeepFloat64
from conformance.reference import reading
from conformance.scene import states_of
from conformance.test_all_of_transformers import SIZES, build_tiny, why_refused
from prefixkit.injection import attach

ENCODER_SIZES = {key: value for key, value in SIZES.items() if key != "is_decoder"} | {
    "d_ff": 48, "d_kv": 8, "num_decoder_layers": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "decoder_start_token_id": 1, "embedding_size": 32, "initializer_factor": 1.5,
}  # fmt: skip
LISTS = [(AutoModelForSeq2SeqLM, name) for name in sorted(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)]
LISTS += [(AutoModelForMaskedLM, name) for name in sorted(MODEL_FOR_MASKED_LM_MAPPING_NAMES)]
#: With random weights of this size its logits do not depend on what its attention reads, so nothing is shown.
FAILS = {"neomme": pytest.mark.xfail(strict=True, reason="its attention has no part in the tiny model's logits")}
CASES = [pytest.param(a, name, marks=FAILS.get(name, ()), id=f"{a.__name__}-{name}") for a, name in LISTS]


@pytest.mark.slow
@pytest.mark.parametrize(("automodel", "model_type"), CASES)
def test_a_model_is_exact_or_refused(automodel, model_type, make_prefix, make_ids):
    model = build_tiny(model_type, automodel, ENCODER_SIZES)
    refusal = why_refused(model)
    if refusal is not None:
        assert re.fullmatch(rf"{type(model).__name__}: [^\n]+", refusal)
        return
    pairs = make_pairs(model, make_prefix)
    inputs, seen = dict(pairs.source), torch.ones(3, 4, dtype=torch.bool)
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": make_ids(3, 4)}
    else:
        seen = inputs["attention_mask"].bool()
    with KeepFloat64():
        with reading(model, states_of(pairs.rows)):
            expected = model(**inputs).logits
        plain = model(**inputs).logits
        with attach(model, list(pairs.rows)):
            found = model(**inputs).logits
    assert float((expected - plain)[0].abs().max()) > 1e-4
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-10, atol=1e-10)
