"""Artefacts written by earlier releases load and mean what they meant. The fixtures are kept, never made again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fixtures import make_artefacts_of_stacks as stacks
from fixtures.make_artefacts import PREFIXES, TEXT
from prefixkit.config import validate_recipe
from prefixkit.errors import BaseMismatchError
from prefixkit.injection import attach
from prefixkit.models.fingerprint import check_base
from prefixkit.prefix import Prefix

ARTEFACTS = Path(__file__).parents[1] / "fixtures" / "artefacts" / "v1"
WITH_ENCODER = ARTEFACTS.with_name("v1-stacks")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ARTEFACTS / "base", dtype=torch.float64).eval()


@pytest.mark.parametrize("name", PREFIXES)
def test_an_artefact_of_schema_1_gives_the_logits_it_gave(name, model):
    prefix = Prefix.load(ARTEFACTS / name)  # checks the content hash
    lengths, gated, _ = PREFIXES[name]
    assert (prefix.states.lengths, prefix.states.has_gate, prefix.card.schema_version) == (lengths, gated, 1)
    expected = load_file(ARTEFACTS / "logits.safetensors")[name]
    with torch.no_grad():
        plain = model(input_ids=TEXT).logits
    with attach(model, prefix), torch.no_grad():
        torch.testing.assert_close(model(input_ids=TEXT).logits, expected, rtol=1e-10, atol=1e-10)
    assert float((plain - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("name", PREFIXES)
def test_the_fingerprint_in_the_card_is_still_accepted_as_the_bases(name, model):
    base = Prefix.load(ARTEFACTS / name).card.base
    check_base(model, base)
    other = AutoModelForCausalLM.from_pretrained(ARTEFACTS / "base", dtype=torch.float64, rms_norm_eps=0.5)
    with pytest.raises(BaseMismatchError):
        check_base(other, base)


@pytest.mark.parametrize("name", stacks.PREFIXES)
def test_an_artefact_for_a_model_with_an_encoder_gives_the_logits_it_gave(name):
    base, lengths = stacks.PREFIXES[name]
    model, prefix = stacks.load(WITH_ENCODER, base), Prefix.load(WITH_ENCODER / name)
    assert (prefix.states.lengths, prefix.card.schema_version) == (lengths, 1)
    assert (None if prefix.head is None else prefix.head.kind) == stacks.HEADS.get(name)
    assert prefix.head is None or prefix.head.labels == stacks.LABELS
    expected = load_file(WITH_ENCODER / "logits.safetensors")[name]
    found = stacks.logits(model, prefix, prefix.head)  # checks the base's fingerprint
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # these models' norms are in float32
    assert float((stacks.logits(model, None, prefix.head) - expected).abs().max()) > 1e-2


def known(read: object, written: object) -> object:
    """What is read now of the settings that were written then; others have come since."""
    if isinstance(read, dict) and isinstance(written, dict):
        return {key: known(read[key], value) for key, value in written.items()}
    return read


def test_the_recipe_in_a_card_of_schema_1_still_means_what_it_says():
    """A bare artefact is used by the recipe in its card: every setting must still be known."""
    card = Prefix.load(ARTEFACTS / "trained").card
    written = card.training.recipe
    read = validate_recipe(written).model_dump(mode="json")
    assert len(written["train"]) > 15
    assert known(read, written) == written
    assert (card.training.steps, card.training.versions["transformers"]) == (250, "5.23.0")
