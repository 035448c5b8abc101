"""Attention mass: means over tokens, heads and texts equal those of one text at a time, added up in loops."""

import copy
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from statistics import mean

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM, MistralConfig

from prefixkit.data import Example
from prefixkit.errors import EvaluationError
from prefixkit.evaluation import attention_readers
from prefixkit.evaluation.attention_mass import measure_mass
from prefixkit.injection import attach
from prefixkit.injection.recording import recording
from prefixkit.models import Base
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import BaseCard, Prefix, PrefixStates, SiteStates

TOKENS = (9, 4, 7, 1)


def tiny_mistral(tokenizer):
    """Every layer's text sees three tokens."""
    config = MistralConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, sliding_window=3,
                           initializer_range=0.2)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.fixture(params=["llama", "gpt2", "window"])
def reader(request, make_tiny_llama, make_tiny_gpt2, tiny_tokenizer):
    makers = {"llama": lambda: make_tiny_llama().double(), "gpt2": lambda: make_tiny_gpt2().double(),
              "window": lambda: tiny_mistral(tiny_tokenizer)}  # fmt: skip
    return Base("tiny", makers[request.param](), tiny_tokenizer, torch.float64, "none")


def make_prefix(base, lengths=(5, 2), gated=False):
    dice = torch.Generator().manual_seed(1)
    geometry = inspect_model(base.model).geometry

    def numbers(*shape):
        return 2 * torch.randn(*shape, generator=dice).double()

    sites = tuple(
        SiteStates(numbers(site.kv_heads, p, site.head_dim), numbers(site.kv_heads, p, site.head_dim),
                   numbers(site.query_heads) if gated else None)
        for site, p in zip(geometry.sites, lengths, strict=True)
    )  # fmt: skip
    return Prefix.from_states(PrefixStates(geometry, sites), base=BaseCard(id="tiny"))


def texts(*lengths):
    dice = torch.Generator().manual_seed(2)
    rows = [tuple(torch.randint(4, 90, (length,), generator=dice).tolist()) for length in lengths]
    return [Example("", "", ids, ids) for ids in rows]


def read_alone(base, prefix, example):
    """The readings of one text, unpadded, in one piece, by site."""
    readings = {}
    layers = inspect_model(base.model).attention
    told = recording(layers, lambda reading: readings.update({reading.site: reading}))
    with torch.no_grad(), attach(base.model, prefix), told:
        base.model(input_ids=torch.tensor([example.input_ids]))
    return readings


@pytest.mark.parametrize("gated", [False, True])
def test_means_equal_loops_over_texts_read_alone(reader, gated):
    prefix, examples, within = make_prefix(reader, gated=gated), texts(*TOKENS), 5
    (found,) = measure_mass(reader, prefix, examples, within=within, batch_size=3).placements
    alone = [read_alone(reader, prefix, example) for example in examples]
    assert found.texts.tolist() == [4, 3, 3, 3, 2, 2, 2, 1, 1]
    assert (found.placement, found.lengths, found.within) == ("decoder_self", tuple(range(1, 10)), 5)
    for i, site in enumerate(found.sites):
        shares = [readings[i].shares[0] for readings in alone]  # [h, t, p] per text
        early = torch.cat([share[:, :within] for share in shares], dim=1)  # [h, tokens, p]
        assert site.heads.tolist() == pytest.approx(early.sum(2).mean(1).tolist(), abs=1e-12)
        assert site.mean == pytest.approx(float(early.sum(2).mean()), abs=1e-12)
        assert site.tokens.tolist() == pytest.approx(early.mean((0, 1)).tolist(), abs=1e-12)
        for n in range(9):
            here = [float(share[:, n].sum(1).mean()) for share in shares if share.shape[1] > n]
            assert float(site.by_length[n]) == pytest.approx(mean(here), abs=1e-12)
            seen = min(n + 1, 3) if reader.model.config.model_type == "mistral" else n + 1
            p = prefix.states.lengths[i]
            assert float(site.uniform_by_length[n]) == pytest.approx(p / (p + seen), abs=1e-12)
        counts = [4, 3, 3, 3, 2]
        expected = sum(c * float(u) for c, u in zip(counts, site.uniform_by_length[:5], strict=True)) / sum(counts)
        assert site.uniform == pytest.approx(expected, abs=1e-12)
        for part in ("key", "value"):
            text = torch.cat([getattr(r[i], f"{part}_norms")[0, :within] for r in alone]).mean()
            own = getattr(prefix.states.sites[i], part).norm(dim=2).mean(0) / text
            assert getattr(site, f"{part}_norms").tolist() == pytest.approx(own.tolist(), abs=1e-12)


def test_pieces_give_what_the_whole_gives(reader):
    prefix, examples = make_prefix(reader), texts(*TOKENS)
    (whole,) = measure_mass(reader, prefix, examples, within=6).placements
    (pieces,) = measure_mass(reader, prefix, examples, within=6, chunk_tokens=2).placements
    assert torch.equal(whole.texts, pieces.texts)
    for one, other in zip(whole.sites, pieces.sites, strict=True):
        for field in ("heads", "by_length", "uniform_by_length", "tokens", "key_norms", "value_norms"):
            torch.testing.assert_close(getattr(one, field), getattr(other, field), atol=1e-10, rtol=0)


def test_a_layer_without_virtual_tokens_gets_nothing(reader):
    (found,) = measure_mass(reader, make_prefix(reader, (3, 0)), texts(4), within=9).placements
    assert found.sites[0].mean > 0.01
    empty = found.sites[1]
    assert (empty.mean, empty.uniform, empty.tokens.tolist()) == (0, 0, [])
    assert empty.by_length.tolist() == [0] * 4


def test_the_model_is_left_as_it_was(base, prefix):
    ids = torch.tensor([[4, 5, 6]])
    before = base.model(input_ids=ids).logits
    measure_mass(base, prefix, texts(3), within=3)
    assert base.model.config._attn_implementation == "sdpa"
    assert torch.equal(base.model(input_ids=ids).logits, before)


def test_an_offloaded_base_is_read_like_one_in_memory(base, prefix, tmp_path):
    (expected,) = measure_mass(base, prefix, texts(5, 3), within=4).placements
    model = copy.deepcopy(base.model)
    dispatch_model(
        model,
        {
            "model.embed_tokens": "disk",
            "model.layers": "disk",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "cpu",
        },
        offload_dir=str(tmp_path),
        main_device="cpu",
    )
    (found,) = measure_mass(replace(base, model=model), prefix, texts(5, 3), within=4).placements
    for one, other in zip(expected.sites, found.sites, strict=True):
        assert torch.equal(one.heads, other.heads)


def test_progress_is_told(base, prefix):
    told = []
    measure_mass(base, prefix, texts(3, 3, 3), within=3, batch_size=2, on_progress=lambda *now: told.append(now))
    assert told == [(2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "no text to read; give at least one with a token"),
        (texts(124), "prefix 5 [+] text 124 tokens exceed the model's context of 128; give shorter texts"),
    ],
)
def test_texts_that_cannot_be_read_are_refused(base, prefix, examples, message):
    with pytest.raises(EvaluationError, match=message):
        measure_mass(base, prefix, examples, within=3)


def test_a_weight_that_is_no_number_is_named(base):
    prefix = make_prefix(base)
    prefix.states.sites[1].key[0, 0, 0] = float("nan")
    with pytest.raises(EvaluationError, match="decoder_self.1: an attention weight is no finite number"):
        measure_mass(base, prefix, texts(3), within=3)


def test_a_prefix_without_virtual_tokens_is_refused(base):
    with pytest.raises(EvaluationError, match="the prefix has no virtual tokens, so nothing is there to look at"):
        measure_mass(base, make_prefix(base, (0, 0)), texts(3), within=3)


def test_a_layer_nobody_heard_of_is_not_taken_for_one_without_attention(base, prefix, monkeypatch):
    @contextmanager
    def deaf(layers, take):
        with nullcontext():
            yield

    monkeypatch.setattr(attention_readers, "recording", deaf)
    with pytest.raises(EvaluationError, match="decoder_self.0: read the prefix 0 times in 1 forward passes"):
        measure_mass(base, prefix, texts(3), within=3)
