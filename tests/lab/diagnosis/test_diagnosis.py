"""A diagnosis: what is summed up is what was measured, it is written whole, and what cannot be done is one line."""

import json
import re
import shutil
from dataclasses import asdict, replace

import pytest
import torch

from prefixkit.config import Placement
from prefixkit.data import heldout_texts
from prefixkit.errors import ArtefactError, BaseMismatchError, EvaluationError
from prefixkit.evaluation.attention_mass import AttentionMass, measure_mass
from prefixkit.evaluation.attention_meter import PlacementMass, SiteMass
from prefixkit.files import read_json, write_json
from prefixkit.lab.diagnosis.findings import lines
from prefixkit.lab.diagnosis.page import render_diagnosis
from prefixkit.lab.diagnosis.record import read_diagnosis
from prefixkit.lab.diagnosis.run import diagnose_run
from prefixkit.lab.diagnosis.summary import diagnose
from prefixkit.lab.run.loaded_run import load_run
from prefixkit.lab.run.run import train_run
from prefixkit.models import load_base_model
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import BaseCard, Prefix, PrefixStates, SiteStates

from ..conftest import quiet


@pytest.fixture
def base(tiny_llama_dir):
    return load_base_model(str(tiny_llama_dir), dtype="float32")


def states_of(base, lengths, gate=None):
    dice = torch.Generator().manual_seed(3)
    geometry = inspect_model(base.model).geometry
    return PrefixStates(geometry, tuple(
        SiteStates(torch.randn(s.kv_heads, p, s.head_dim, generator=dice),
                   torch.randn(s.kv_heads, p, s.head_dim, generator=dice),
                   None if gate is None else torch.tensor(gate))
        for s, p in zip(geometry.sites, lengths, strict=True)
    ))  # fmt: skip


def made(base, lengths=(3, 2), gate=None, *, most=40, within=20, texts=None):
    """A diagnosis of a made-up measurement that falls with length: layer i gives 0.8 / n ** (i + 1) at length n."""
    prefix = Prefix.from_states(states_of(base, lengths, gate), base=BaseCard(id="tiny"))
    n = torch.arange(1, most + 1).double()
    sites = tuple(
        SiteMass(
            heads=torch.tensor([0.6, 0.005, 0.2, 0.1]) / (i + 1) if p else torch.zeros(4),
            uniform=0.25 if p else 0.0,
            by_length=0.8 / n ** (i + 1) if p else 0 * n,
            uniform_by_length=p / (p + n),
            tokens=torch.tensor([0.2, 0.02, 0.01][:p]) / (i + 1),
            key_norms=torch.tensor([0.5, 1.0, 1.5][:p]),
            value_norms=torch.tensor([0.4, 1.0, 2.0][:p]),
        )
        for i, p in enumerate(lengths)
    )
    counts = torch.full((most,), 4) if texts is None else torch.tensor(texts)
    mass = PlacementMass(Placement.DECODER_SELF, sites, tuple(range(1, most + 1)), counts, within)
    whole = AttentionMass(prefix.states.geometry, (mass,))
    return mass, diagnose(base, prefix, whole, name="tiny", source="rows.jsonl", texts=4)


def only(found):
    (place,) = found.placements
    return place


def test_points_cover_every_length_once_and_average_what_they_cover(base):
    mass, found = made(base)
    found = only(found)
    covered = [n for point in found.points for n in range(point.first, point.last + 1)]
    assert covered == list(range(1, 41))
    assert [(p.first, p.last) for p in found.points[:17]] == [(n, n) for n in range(1, 18)]
    assert 20 in {point.last for point in found.points}  # as far as training went
    for place, point in enumerate(found.points):
        span = mass.sites[1].by_length[point.first - 1 : point.last]
        assert found.layers[1].by_length[place] == pytest.approx(float(span.mean()), rel=1e-4)
        both = [float(site.by_length[point.first - 1 : point.last].mean()) for site in mass.sites]
        assert found.by_length[place] == pytest.approx(sum(both) / 2, rel=1e-4)


def test_lengths_few_texts_reach_are_left_out_and_texts_count_by_their_tokens(base):
    found = only(made(base, most=5, within=9, texts=[4, 4, 2, 2, 1])[1])
    assert [point.last for point in found.points] == [1, 2, 3, 4]
    assert [point.texts for point in found.points] == [4, 4, 2, 2]


def test_virtual_tokens_add_up_to_the_whole(base):
    found = only(made(base, (3, 0))[1])
    assert found.share == pytest.approx(0.22625)  # of the layer that has some
    assert [token.share for token in found.virtual_tokens] == pytest.approx([0.2, 0.02, 0.01])
    found = only(made(base, (3, 2))[1])
    assert [token.share for token in found.virtual_tokens] == pytest.approx([0.15, 0.015, 0.005])
    assert [token.key_norm for token in found.virtual_tokens] == [0.5, 1.0, 1.5]


def test_findings_say_what_was_found(base):
    _, found = made(base, (3, 3))
    assert lines(found) == [
        "A token of text gives the prefix 17% of its attention, less than the 25% it would give if it spread it evenly "
        "over everything in sight.",
        "Layer 0 gives the prefix most, 23% of its attention; layer 1 least, 11%.",
        "Of 8 heads, 2 ignore it (under 1%), and 1 give it more than half of their attention.",
        "Its share falls as the text grows: 80% for the first token of a text, 2.1% at token 20, as far as training "
        "went, 1.1% at token 40 (evenly spread: 7.1%).",
        "Virtual token 0 alone takes 87% of what the prefix gets; the other 2 get 2.2% of the attention together.",
        "Its value is only 0.40 times as long as the text's: much of this is probably attention that has nothing to "
        "look for and is put where little comes of it.",
        "The virtual tokens' keys are 0.50 to 1.50 times as long as the text's, their values 0.40 to 2.00 times.",
    ]


def test_findings_of_special_prefixes(base):
    _, found = made(base, (3, 0))
    assert "1 of 2 layers have no virtual tokens." in lines(found)
    assert not any(sentence.startswith("Layer ") for sentence in lines(found))
    _, found = made(base, (1, 1), [0.1, 0.5, 0.25, 1.0])
    assert lines(found)[-1] == ("The gates let 10% to 100% of the prefixed attention through; the shares contain that.")
    _, found = made(base, (1, 1), [-0.1, 0.5, 0.25, 1.5])
    assert lines(found)[-1] == (
        "4 of 8 gates lie outside 0 to 1, where a share can be negative or more than everything."
    )
    token = only(found).virtual_tokens[0]
    place = replace(only(found), virtual_tokens=tuple(replace(token, index=i) for i in range(5)))
    spread = replace(found, placements=(place,))
    assert any(
        sentence.startswith("3 of its 5 virtual tokens take half of what the prefix gets; number 0 most, 20% of it.")
        for sentence in lines(spread)
    )
    even = replace(found, placements=(replace(only(found), share=0.1801, uniform=0.1799),))
    assert lines(even)[0] == (
        "A token of text gives the prefix 18% of its attention, as much as it would give if it spread it evenly over "
        "everything in sight."
    )
    _, found = made(base, most=1, within=1)
    assert not any("as the text grows" in sentence for sentence in lines(found))
    assert not any("training went" in sentence for sentence in lines(made(base, most=8, within=20)[1]))


@pytest.mark.parametrize(
    "changes", [{}, {"lengths": (2, 0)}, {"most": 1, "within": 1}, {"gate": [-0.5, 2.0, 0.1, 1.0]}]
)
def test_the_page_says_it_all_and_loads_nothing(base, changes):
    _, found = made(base, **changes)
    found = replace(found, name="<b>bold</b>")
    page = render_diagnosis(found)
    text = re.sub(r"<[^>]+>", "", page).replace("&#39;", "'")
    assert all(line in text for line in lines(found))
    assert page.count("<svg") == 6
    assert "<b>bold" not in page
    assert "http" not in page
    assert "<script" not in page
    assert not any("nan" in path for path in re.findall(r'\bd="([^"]*)"', page))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', page)) <= set(ids)
    assert ("left empty" in page) == (changes.get("lengths") == (2, 0))


def test_a_run_is_diagnosed_on_its_own_held_out_texts(run):
    base, prefix, recipe = load_run(run.folder)
    told = []
    done = diagnose_run(run.folder, rows=5, report=lambda *now: told.append(now))
    examples = heldout_texts(recipe.data, base.tokenizer, max_tokens=125, count=5)
    (mass,) = measure_mass(base, prefix, examples, within=recipe.data.max_tokens).placements
    found, place = done.diagnosis, only(done.diagnosis)
    assert [layer.share for layer in place.layers] == pytest.approx([site.mean for site in mass.sites], rel=1e-4)
    assert sum(token.share for token in place.virtual_tokens) == pytest.approx(place.share, rel=1e-3)
    assert 0 < place.share < 1
    assert (found.texts, found.prefix_hash) == (len(examples), run.prefix.card.content_hash)
    assert told[-1] == ("diagnosing", len(examples), len(examples), "texts read")
    assert read_json(run.folder / "diagnosis.json") == json.loads(json.dumps(asdict(found)))
    assert done.page.read_text(encoding="utf-8") == render_diagnosis(found)


def test_a_diagnosed_run_can_still_be_overwritten(run, recipe):
    diagnose_run(run.folder, report=quiet)
    train_run(recipe, run.folder, overwrite=True, report=quiet)
    assert not (run.folder / "diagnosis.html").exists()


def test_an_artefact_alone_is_diagnosed_into_another_folder(run, tmp_path):
    bare, out = tmp_path / "bare", tmp_path / "out"
    bare.mkdir()
    for name in ("prefix.json", "prefix.safetensors"):
        shutil.copy(run.folder / name, bare / name)
    done = diagnose_run(bare, out=out, tokens=5, report=quiet)
    assert sorted(path.name for path in bare.iterdir()) == ["prefix.json", "prefix.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == ["diagnosis.html", "diagnosis.json"]
    assert only(done.diagnosis).points[-1].last == 5
    assert only(done.diagnosis).points[-1].texts == done.diagnosis.texts  # all of them are that long


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (126, "--tokens: prefix 3 [+] text 126 exceed the model's context of 128; give at most 125"),
        (90, r"--tokens: no held-out text of .*my reviews.jsonl has 90 tokens, the longest has \d+; give at most \d+"),
    ],
)
def test_lengths_that_cannot_be_had_are_refused_and_leave_no_file(run, tokens, message):
    with pytest.raises(EvaluationError, match=message):
        diagnose_run(run.folder, tokens=tokens, report=quiet)
    assert not list(run.folder.glob("diagnosis*"))


def test_what_no_recipe_trained_is_refused(tmp_path, base):
    with pytest.raises(ArtefactError, match="nowhere: no such folder; expected an artefact or a finished run"):
        diagnose_run(tmp_path / "nowhere", report=quiet)
    made_up = Prefix.from_states(states_of(base, (2, 2)), base=BaseCard(id="tiny")).save(tmp_path / "made")
    assert made_up.card.training is None
    with pytest.raises(ArtefactError, match="holds no recipe, so there are no held-out texts to read; diagnose a run"):
        diagnose_run(tmp_path / "made", report=quiet)


def test_a_base_model_that_is_another_by_now_is_refused(run, make_tiny_llama, tmp_path):
    other = tmp_path / "other"
    card = read_json(run.folder / "prefix.json")
    shutil.copytree(card["base"]["id"], other)
    make_tiny_llama(seed=9).save_pretrained(other)
    recipe = (run.folder / "recipe.yaml").read_text(encoding="utf-8")
    (run.folder / "recipe.yaml").write_text(recipe.replace(card["base"]["id"], str(other)), encoding="utf-8")
    with pytest.raises(BaseMismatchError, match="this artefact was trained on .* load that base model"):
        diagnose_run(run.folder, report=quiet)
    assert not list(run.folder.glob("diagnosis*"))


def test_a_written_diagnosis_can_be_read_again(base, tmp_path):
    _, found = made(base, gate=[0.1, 0.2, 0.3, 0.4])
    path = tmp_path / "diagnosis.json"
    write_json(path, asdict(found))
    assert read_diagnosis(path) == found
    path.write_text("{}", encoding="utf-8")
    for damaged in (path, tmp_path / "none.json"):
        with pytest.raises(EvaluationError, match=f"{damaged}: no diagnosis of this version; run `prefixkit diagnose`"):
            read_diagnosis(damaged)


def test_a_file_where_a_folder_is_to_go_is_refused_before_anything_slow(run, tmp_path, monkeypatch):
    (tmp_path / "taken").touch()
    monkeypatch.setattr("prefixkit.lab.diagnosis.run.load_run", lambda *_: pytest.fail("loaded the base model"))
    with pytest.raises(EvaluationError, match="--out: .*taken is a file; give a folder"):
        diagnose_run(run.folder, out=tmp_path / "taken", report=quiet)
