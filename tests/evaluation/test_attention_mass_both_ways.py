"""Attention mass in encoders and encoder-decoders: every length equals texts cut there by hand and read one by one."""

from statistics import mean

import pytest
import torch
from tokenizers import processors
from transformers import AutoModel, PreTrainedTokenizerFast

from conformance.encoder_families import ENCODER_DECODERS, ENCODERS, build
from prefixkit.config import Placement
from prefixkit.data import Example
from prefixkit.errors import EvaluationError
from prefixkit.evaluation.attention_mass import measure_mass
from prefixkit.evaluation.attention_readers import curve_lengths
from prefixkit.injection import attach
from prefixkit.injection.recording import recording
from prefixkit.models import Base
from prefixkit.models.inspect import inspect_model

SOURCES, TARGETS, WITHIN = (11, 5, 10, 7), (3, 9, 7, 2), 6
LENGTHS, REACHED = (3, 4, 6, 8, 10), (4, 4, 3, 2, 2)
EVERYWHERE = {Placement.ENCODER_SELF: 3, Placement.DECODER_SELF: 2, Placement.CROSS: 4}


@pytest.fixture(scope="session")
def around(tiny_llama_dir):
    """A tokenizer that puts a token before and one behind every text."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_llama_dir)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return tokenizer


def base_of(model, tokenizer):
    return Base("tiny", model, tokenizer, torch.float64, "none")


def texts(lengths, closing=(2,)):
    dice = torch.Generator().manual_seed(2)
    return [(1, *torch.randint(4, 90, (n - 1 - len(closing),), generator=dice).tolist(), *closing) for n in lengths]


def pairs():
    return [Example("", "", target, target, source)
            for source, target in zip(texts(SOURCES), texts(TARGETS, closing=()), strict=True)]  # fmt: skip


def cut_by_hand(source, length):
    return source if len(source) <= length else (*source[: length - 1], 2)


def read_alone(model, prefix, source, target=None):
    """The readings of one text, by site, from one pass of the whole model."""
    readings = {}
    told = recording(inspect_model(model).attention, lambda reading: readings.update({reading.site: reading}))
    with torch.no_grad(), attach(model, prefix), told:
        inputs = {} if target is None else {"decoder_input_ids": torch.tensor([target])}
        model(input_ids=torch.tensor([source]), **inputs)
    return readings


def close(found, expected):
    found, expected = (torch.as_tensor(each, dtype=torch.float64) for each in (found, expected))
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def check_site(site, states, readings, queries=None):
    """One layer; `readings` has those of the texts cut as in training first, then those of every length."""
    seen = [[reading.shares[0, :, :queries] for reading in column] for column in readings]  # [h, t, p]
    trained = torch.cat(seen[0], dim=1)
    close(site.heads, trained.sum(2).mean(1))
    close(site.tokens, trained.mean((0, 1)))
    close(site.by_length, [float(torch.cat(column, dim=1).sum(2).mean()) for column in seen[1:]])
    p = states.length
    even = [[p / (p + int(s)) for reading in column for s in reading.visible[0, :queries]] for column in readings]
    close(site.uniform, mean(even[0]))
    close(site.uniform_by_length, [mean(column) for column in even[1:]])
    for part in ("key", "value"):
        text = torch.cat([getattr(reading, f"{part}_norms")[0] for reading in readings[0]]).mean()
        close(getattr(site, f"{part}_norms"), getattr(states, part).norm(dim=2).mean(0) / text)


def check_both_ways(found, prefix, columns, queries=None):
    """`columns`: what was told of every text, as in training first and then for every length, by site."""
    sites = prefix.states.geometry.sites
    own = [index for index, site in enumerate(sites) if site.placement is found.placement]
    assert (found.lengths, tuple(found.texts.tolist()), found.within) == (LENGTHS, REACHED, WITHIN)
    assert len(found.sites) == len(own)
    for index, site in zip(own, found.sites, strict=True):
        readings = [[told[index] for told in column] for column in columns]
        check_site(site, prefix.states.sites[index], readings, queries)


def check_causal(found, prefix, alone):
    """As in a decoder-only model, beside sources cut as in training."""
    own = [index for index, site in enumerate(prefix.states.geometry.sites) if site.placement is found.placement]
    assert (found.lengths, found.within) == (tuple(range(1, 10)), WITHIN)
    assert found.texts.tolist() == [4, 4, 3, 2, 2, 2, 2, 1, 1]
    for index, site in zip(own, found.sites, strict=True):
        shares = [told[index].shares[0] for told in alone]  # [h, t, p]
        close(site.heads, torch.cat([share[:, :WITHIN] for share in shares], dim=1).sum(2).mean(1))
        for n in range(9):
            close(site.by_length[n], mean(float(s[:, n].sum(1).mean()) for s in shares if s.shape[1] > n))
            p = prefix.states.lengths[index]
            close(site.uniform_by_length[n], p / (p + n + 1))


@pytest.mark.every_family
@pytest.mark.parametrize("gated", [False, True])
def test_an_encoder_is_read_at_every_length(encoder, gated, make_prefix, around):
    model = build(ENCODERS[encoder], AutoModel)
    prefix = make_prefix(model, [3, 2, 5], gated=gated)
    sources = texts(SOURCES)
    examples = [Example("", "", ids, ids) for ids in sources]
    (found,) = measure_mass(base_of(model, around), prefix, examples, within=WITHIN, batch_size=3).placements
    columns = [[read_alone(model, prefix, cut_by_hand(ids, n)) for ids in sources if n == WITHIN or len(ids) >= n]
               for n in (WITHIN, *LENGTHS)]  # fmt: skip
    columns[1 + LENGTHS.index(WITHIN)] = [told for told, ids in zip(columns[0], sources, strict=True) if len(ids) >= 6]
    check_both_ways(found, prefix, columns)


def columns_of(model, prefix, examples):
    trained = [read_alone(model, prefix, cut_by_hand(e.source_ids, WITHIN), e.input_ids) for e in examples]
    return [trained] + [
        [read_alone(model, prefix, cut_by_hand(e.source_ids, n), e.input_ids[:WITHIN])
         for e in examples if len(e.source_ids) >= n]
        for n in LENGTHS
    ]  # fmt: skip


@pytest.mark.every_family
@pytest.mark.parametrize("gated", [False, True])
def test_an_encoder_decoder_is_read_at_every_length(encoder_decoder, gated, make_prefix, around):
    if encoder_decoder == "whisper":  # it hears; see below
        return
    model = build(ENCODER_DECODERS[encoder_decoder])
    lengths = [EVERYWHERE[site.placement] + site.layer for site in inspect_model(model).geometry.sites]
    prefix, examples = make_prefix(model, lengths, gated=gated), pairs()
    found = measure_mass(base_of(model, around), prefix, examples, within=WITHIN, batch_size=3)
    columns = columns_of(model, prefix, examples)
    by_placement = {each.placement: each for each in found.placements}
    assert set(by_placement) == set(Placement)
    check_both_ways(by_placement[Placement.ENCODER_SELF], prefix, columns)
    check_both_ways(by_placement[Placement.CROSS], prefix, columns, queries=WITHIN)
    check_causal(by_placement[Placement.DECODER_SELF], prefix, columns[0])


@pytest.mark.parametrize("placements", [[each] for each in Placement] + [[Placement.ENCODER_SELF, Placement.CROSS]],
                         ids="+".join)  # fmt: skip
def test_a_prefix_in_some_placements_is_measured_there_alone(placements, make_prefix, around):
    model = build(ENCODER_DECODERS["bart"])
    prefix = make_prefix(model, list(inspect_model(model).geometry.lengths(3, placements=placements)))
    found = measure_mass(base_of(model, around), prefix, pairs(), within=WITHIN).placements
    assert {each.placement for each in found} == set(placements)
    columns = columns_of(model, prefix, pairs())
    for each in found:
        if each.placement is Placement.DECODER_SELF:
            check_causal(each, prefix, columns[0])
        else:
            check_both_ways(each, prefix, columns, queries=WITHIN if each.placement is Placement.CROSS else None)


def test_the_model_is_left_as_it_was(make_prefix, around):
    model = build(ENCODER_DECODERS["t5"])
    inputs = {"input_ids": torch.tensor([[4, 5, 6]]), "decoder_input_ids": torch.tensor([[0, 7]])}
    before = model(**inputs).logits
    measure_mass(base_of(model, around), make_prefix(model, 3), pairs(), within=WITHIN)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize(
    ("tokens", "within", "special", "lengths"),
    [
        ((512,) * 3, 96, 2, (3, 4, 8, 16, 32, 64, 96, 128, 256, 512)),
        ((20, 9, 9, 4), 96, 1, (2, 4, 8, 9)),  # half of the texts have 9 tokens
        ((7,), 5, 0, (1, 2, 4, 5, 7)),
        ((2,), 5, 2, (2,)),  # no text at all between the special tokens
    ],
)
def test_lengths_double_up_to_what_half_of_the_texts_reach(tokens, within, special, lengths):
    assert curve_lengths(tokens, within=within, special=special) == lengths


def test_a_model_that_hears_is_refused(make_prefix, around):
    model = build(ENCODER_DECODERS["whisper"])
    with pytest.raises(
        EvaluationError, match="tiny: attention mass is measured while a model reads text; whisper reads input_features"
    ):
        measure_mass(base_of(model, around), make_prefix(model, 2), pairs(), within=3)


def test_a_text_of_either_stack_that_does_not_fit_is_refused(make_prefix, around):
    model = build(ENCODER_DECODERS["bart"])
    (source,) = texts((65,))
    with pytest.raises(EvaluationError, match="prefix 0 [+] text 65 tokens exceed the model's context of 64"):
        measure_mass(base_of(model, around), make_prefix(model, 2), [Example("", "", (1,), (1,), source)], within=3)


def test_a_weight_that_is_no_number_is_named(make_prefix, around):
    model = build(ENCODER_DECODERS["t5"])
    prefix = make_prefix(model, 2)
    names = [site.name for site in prefix.states.geometry.sites]
    prefix.states.sites[names.index("cross.1")].key[0, 0, 0] = float("nan")
    with pytest.raises(EvaluationError, match="cross.1: an attention weight is no finite number"):
        measure_mass(base_of(model, around), prefix, pairs(), within=3)
