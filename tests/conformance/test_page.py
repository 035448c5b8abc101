"""The page in the docs is that of the committed results, and the results are those of the registry."""

import importlib.util
from pathlib import Path

import pytest

from conformance.encoder_families import ENCODER_DECODERS, ENCODERS
from conformance.families import FAMILIES, GLOBAL
from conformance.paths import PATHS
from prefixkit.errors import EvaluationError
from prefixkit.files import read_json

ROOT = Path(__file__).parents[2]
#: Paths that are not tried on every family: they do not depend on it, or do not apply.
ELSEWHERE = (
    "cache-oracle",
    "offloaded",
    "compiled-forward",
    "compiled-generate",
    "pipeline",
    "device-map",
    "lora",
    "generate-batch",
)
#: Ways to generate that are tried on every encoder-decoder.
WRITTEN = (
    *("mixed", "greedy", "beams", "sampling", "beam-sampling", "static", "no-cache", "quantised", "offloaded"),
    *("chunked", "continued", "assisted", "lookup", "guidance", "precision", "checkpointing", "foreign-cache", "flex"),
)
#: Paths of models with an encoder alone.
OF_ENCODERS = ("placements", "gradients", "encoded")


@pytest.fixture(scope="module")
def publish():
    spec = importlib.util.spec_from_file_location("publish_conformance", ROOT / "benchmarks" / "publish_conformance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_from_the_committed_results(publish):
    assert publish.PAGE.read_text(encoding="utf-8") == publish.render(read_json(publish.RESULTS))


def test_the_results_name_the_families_and_paths_of_the_registry(publish):
    families = read_json(publish.RESULTS)["families"]
    assert list(families) == [*FAMILIES, *ENCODER_DECODERS, *ENCODERS]
    assert {path for cells in families.values() for path in cells} == set(PATHS)
    for name in FAMILIES:
        assert set(PATHS) - {*ELSEWHERE, *OF_ENCODERS} <= set(families[name]), name
        assert ("cache-oracle" in families[name]) == (name in GLOBAL), name
    for name in ENCODER_DECODERS:
        assert {*WRITTEN, *OF_ENCODERS, "embeds"} <= set(families[name]), name
    for name in ENCODERS:
        assert {"mixed", "gradients", "embeds", "precision", "checkpointing", "flex"} <= set(families[name]), name
    for name in ("bert", "modernbert"):
        assert {"pipeline", "device-map", "lora", "compiled-forward"} <= set(families[name]), name


def test_what_holds_us_to_where_peft_fails_exists(publish):
    for proof in publish.RIVAL.values():
        path, _, name = proof.partition("::")
        assert proof in PATHS or f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8"), proof


def test_a_wrong_cell_is_not_published(publish):
    cell = {"family": "llama", "path": "greedy", "settings": {}, "outcome": "wrong"}
    with pytest.raises(EvaluationError, match="llama, greedy {}: wrong; not published"):
        publish.summarise({"versions": {}, "cells": [cell]})
