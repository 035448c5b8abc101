"""A diagnosis of several placements: each has its points, sentences and pictures, and pictures share their scales."""

import re
from dataclasses import asdict, replace

import pytest
import torch

from conformance.encoder_families import ENCODER_DECODERS, build
from prefixkit.config import Placement
from prefixkit.evaluation.attention_mass import AttentionMass
from prefixkit.evaluation.attention_meter import PlacementMass, SiteMass
from prefixkit.files import write_json
from prefixkit.lab.diagnosis.findings import findings, lines
from prefixkit.lab.diagnosis.page import render_diagnosis
from prefixkit.lab.diagnosis.plots import dilution_plot, heat_map
from prefixkit.lab.diagnosis.record import Lengths, read_diagnosis
from prefixkit.lab.diagnosis.summary import diagnose
from prefixkit.models import Base
from prefixkit.models.inspect import inspect_model

LENGTHS, REACHED = (2, 4, 8, 10), (4, 4, 3, 2)
SHARES = {Placement.ENCODER_SELF: 0.8, Placement.DECODER_SELF: 0.4, Placement.CROSS: 0.2}


@pytest.fixture
def base(tiny_tokenizer):
    return Base("tiny", build(ENCODER_DECODERS["t5"]), tiny_tokenizer, torch.float64, "none")


def made(base, make_prefix, placements):
    """A made-up measurement: a placement has the share of `SHARES`, divided by the length beside it."""
    lengths = inspect_model(base.model).geometry.lengths(3, placements=placements)
    prefix = make_prefix(base.model, list(lengths))
    measured = []
    for placement in prefix.states.geometry.placements:
        share, causal = SHARES[placement], placement is Placement.DECODER_SELF
        shown = range(1, 11) if causal else LENGTHS
        n = torch.tensor(list(shown), dtype=torch.float64)
        site = SiteMass(
            heads=torch.tensor([share, share / 2, 0.001, share]).double(), uniform=0.25, by_length=share / n,
            uniform_by_length=3 / (3 + n), tokens=torch.tensor([share / 4, share / 4, share / 8]).double(),
            key_norms=torch.ones(3).double(), value_norms=torch.ones(3).double(),
        )  # fmt: skip
        texts = torch.full((10,), 4) if causal else torch.tensor(REACHED)
        if placement in placements:
            measured.append(PlacementMass(placement, (site, site), tuple(shown), texts, 4))
    mass = AttentionMass(prefix.states.geometry, tuple(measured))
    return diagnose(base, prefix, mass, name="tiny", source="rows.jsonl", texts=4)


def test_each_length_texts_were_cut_to_is_a_point(base, make_prefix):
    encoder, decoder, cross = made(base, make_prefix, list(Placement)).placements
    for place in (encoder, cross):
        assert place.points == tuple(Lengths(n, n, texts) for n, texts in zip(LENGTHS, REACHED, strict=True))
        assert place.by_length == pytest.approx([SHARES[place.placement] / n for n in LENGTHS], rel=1e-4)
        assert place.uniform_by_length == pytest.approx([3 / (3 + n) for n in LENGTHS], rel=1e-4)
    assert [point.last for point in decoder.points] == list(range(1, 11))


def test_findings_speak_of_each_placement(base, make_prefix):
    encoder, decoder, cross = findings(made(base, make_prefix, list(Placement)))
    assert [group.title for group in (encoder, decoder, cross)] == [
        "Encoder self-attention", "Decoder self-attention", "Cross-attention",
    ]  # fmt: skip
    assert encoder.sentences == (
        "A token of text gives the prefix 50% of its attention, more than the 25% it would give if it spread it evenly "
        "over everything in sight.",
        "Layer 0 gives the prefix most, 50% of its attention; layer 0 least, 50%.",
        "Of 8 heads, 2 ignore it (under 1%), and 4 give it more than half of their attention.",
        "Its share falls as the text grows: 40% in texts of 2 tokens, 20% in texts of 4 tokens, as far as training "
        "went, 8.0% in texts of 10 tokens (evenly spread: 23%).",
        "2 of its 3 virtual tokens take half of what the prefix gets; number 0 most, 40% of it.",
        "The virtual tokens' keys are 1.00 times as long as the text's, their values 1.00 times.",
    )
    assert decoder.sentences[3].startswith("Its share falls as the text grows: 40% for the first token of a text, 10%")
    assert cross.sentences[0].startswith("A token that is written gives the prefix 13% of its attention to the source,")
    assert cross.sentences[3] == (
        "Its share falls as the source grows: 10% beside sources of 2 tokens, 5.0% beside sources of 4 tokens, as far "
        "as training went, 2.0% beside sources of 10 tokens (evenly spread: 23%)."
    )


def test_a_placement_without_virtual_tokens_is_named(base, make_prefix):
    found = made(base, make_prefix, [Placement.CROSS])
    assert found.without == (Placement.ENCODER_SELF, Placement.DECODER_SELF)
    told = lines(found)
    assert told[0] == "Cross-attention:"
    assert told[1].startswith("  A token that is written gives")
    assert told[-4:] == [
        "Encoder self-attention:", "  It has no virtual tokens.", "Decoder self-attention:",
        "  It has no virtual tokens.",
    ]  # fmt: skip


def colours(found):
    """The colour scale of each heat map, as the numbers beside its colour bar."""
    return [re.findall(r">(\d+%)<", heat_map(found, place, name="x"))[-5:] for place in found.placements]


def test_heat_maps_share_their_colours_and_curves_their_scale(base, make_prefix):
    found = made(base, make_prefix, list(Placement))
    first, *others = colours(found)
    assert all(other == first for other in others)
    alone = replace(found, placements=found.placements[2:])
    assert colours(alone) != [first]
    curves = [dilution_plot(found, place, name="x") for place in found.placements]
    top = [re.findall(r">(\d+%)<", curve)[-1] for curve in curves]
    assert len(set(top)) == 1


@pytest.mark.parametrize("placements", [list(Placement), [Placement.CROSS], [Placement.ENCODER_SELF]], ids="+".join)
def test_the_page_shows_every_placement(base, make_prefix, placements):
    found = made(base, make_prefix, placements)
    page = render_diagnosis(found)
    text = re.sub(r"<[^>]+>", "", page).replace("&#39;", "'")
    assert all(line.strip().removesuffix(":") in text for line in lines(found))
    assert page.count("<svg") == 6 * len(placements)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', page)) <= set(ids)
    assert ("All panels have the same colours" in page) == (len(placements) > 1)
    assert ("A decoder reads its own text from left to right" in text) == (Placement.DECODER_SELF in placements)
    for name in ("by layer and head", "against text length"):
        assert page.count(f'{name}"') == 2 * len(placements)


def test_a_written_diagnosis_of_several_placements_can_be_read_again(base, make_prefix, tmp_path):
    found = made(base, make_prefix, [Placement.ENCODER_SELF, Placement.CROSS])
    write_json(tmp_path / "diagnosis.json", asdict(found))
    assert read_diagnosis(tmp_path / "diagnosis.json") == found
