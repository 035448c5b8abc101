"""What `prefixkit inspect` says of a survey."""

from dataclasses import replace

import pytest

from prefixkit.config import Attention, Placement
from prefixkit.lab.inspection import describe, to_json
from prefixkit.models.inspect import Kind
from prefixkit.models.sources import SourceKind
from prefixkit.models.survey import Stack, Survey

SELF = Stack(Placement.DECODER_SELF, 12, (16,), (4,), (64,), 6144, (0, 2, 4), (1024,))
CROSS = Stack(Placement.CROSS, 12, (16,), (16,), (64,), 24576, (), ())
SURVEY = Survey("m", SourceKind.HUB, Kind.DECODER, "llama", "LlamaForCausalLM", 1_000_000,
                (Attention.SDPA, Attention.EAGER), (SELF,), 512, 20, False)  # fmt: skip


def test_every_line_says_what_it_counts():
    lines = dict(describe(SURVEY))
    assert lines["model"] == "m can take a prefix"
    assert lines["family"] == "llama, decoder-only (LlamaForCausalLM), 1,000,000 parameters"
    assert lines["attention"] == "sdpa or eager"
    assert lines["decoder self-attention"] == "12 layers, 16 query heads on 4 KV heads of size 64"
    assert lines["one virtual token"] == "6,144 parameters: 24.6 kB in float32, 12.3 kB in bfloat16"
    assert lines["20 virtual tokens"].endswith("246 kB in bfloat16; 12% of the model")
    assert lines["context"] == "512 positions, 492 left for text after 20 virtual tokens"
    assert lines["sliding windows"] == (
        "1,024 tokens in 3 of 12 layers: the window slides over text only, the prefix stays visible"
    )
    assert lines["looked at"] == "the configuration alone; no weights were read"


def test_several_stacks_are_told_apart_and_added_up():
    lines = dict(describe(replace(SURVEY, stacks=(SELF, CROSS))))
    assert lines["decoder self-attention"].endswith("; 6,144 parameters per virtual token")
    assert lines["cross-attention"] == "12 layers, 16 heads of size 64; 24,576 parameters per virtual token"
    assert lines["one virtual token"].startswith("30,720 parameters")


@pytest.mark.parametrize(
    ("context", "sentence"),
    [(None, "no limit of positions"), (20, "20 positions: too few for 20 virtual tokens and text")],
)
def test_the_context_may_be_endless_or_too_short(context, sentence):
    assert dict(describe(replace(SURVEY, context_tokens=context)))["context"] == sentence


def test_a_model_that_had_to_be_loaded_says_so():
    assert "cannot run without them" in dict(describe(replace(SURVEY, is_loaded=True)))["looked at"]


def test_json_holds_the_numbers_derived():
    found = to_json(SURVEY)
    assert found["can_take_prefix"] is True
    assert found["prefix_bytes"] == {"float32": 491520, "bfloat16": 245760}
    assert found["positions_left"] == 492
    assert found["stacks"][0]["windowed_layers"] == (0, 2, 4)


def test_a_rotary_embedding_that_switches_is_said():
    assert "rotary angles" not in dict(describe(SURVEY))
    assert dict(describe(replace(SURVEY, rope_switch=4096)))["rotary angles"] == (
        "change for a whole batch beyond 4,096 positions (longrope): batches and cached texts must stay on one side of "
        "it, the prefix counted"
    )
