"""An artefact is loaded whole and right, or refused with the reason."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefixkit.config import Method, Placement
from prefixkit.errors import ArtefactError
from prefixkit.files import sha256_file
from prefixkit.prefix import (
    BaseCard,
    Delta,
    Geometry,
    Head,
    HeadKind,
    Prefix,
    PrefixStates,
    Site,
    SiteStates,
    TrainingCard,
    artefact,
)


@pytest.fixture
def prefix() -> Prefix:
    geometry = Geometry(tuple(Site(Placement.DECODER_SELF, layer, 4, 2, 3) for layer in range(3)))
    dice = torch.Generator().manual_seed(0)
    sites = tuple(
        SiteStates(*(torch.randn(2, p, 3, generator=dice) for _ in range(2)), gate=torch.rand(4) if p == 2 else None)
        for p in (4, 0, 2)
    )
    return Prefix.from_states(PrefixStates(geometry, sites), base=BaseCard(id="tiny"), licence="mine")


def test_what_is_saved_is_what_is_loaded(prefix: Prefix, tmp_path: Path) -> None:
    folder = tmp_path / "un dossier à moi"
    saved = prefix.save(folder)
    (folder / "training").mkdir()
    loaded = Prefix.load(folder)
    assert loaded.card == saved.card
    assert loaded.position_offset == 0  # gated: it starts as the base model
    for one, other in zip(loaded.states.sites, prefix.states.sites, strict=True):
        assert torch.equal(one.key, other.key)
        assert torch.equal(one.value, other.value)
        assert (one.gate is None) == (other.gate is None)
    assert sorted(path.name for path in folder.iterdir()) == ["prefix.json", "prefix.safetensors", "training"]
    assert prefix.save(tmp_path / "again").card.content_hash == saved.card.content_hash


def training_of(numbers: int) -> TrainingCard:
    return TrainingCard(
        recipe={}, seed=0, steps=1, data_hash="", trained_parameters=numbers, base_weights_hash="", versions={}
    )


def test_the_numbers_of_an_artefact_are_those_in_its_file(prefix: Prefix, tmp_path: Path) -> None:
    delta = Delta(Method.LORA, {"rank": 1}, {"layers.0.A": torch.ones(1, 3), "layers.0.B": torch.ones(5, 1)})
    head = Head(HeadKind.SEQUENCE, ("bad", "good"), torch.ones(2, 7), torch.ones(2))
    whole = Prefix.from_states(prefix.states, base=prefix.card.base, head=head, deltas=[delta])
    whole.save(tmp_path)
    held = sum(tensor.numel() for tensor in load_file(tmp_path / "prefix.safetensors").values())
    assert whole.num_parameters == held == 2 * 2 * 3 * (4 + 2) + 4 + (3 + 5) + (2 * 7 + 2)
    assert whole.trained_parameters == held
    trained = whole.card.model_copy(update={"training": training_of(1000)})
    assert dataclasses.replace(whole, card=trained).trained_parameters == 1000


def test_what_lost_a_part_says_so_and_is_not_taken_for_what_was_trained(prefix: Prefix, tmp_path: Path) -> None:
    deltas = [Delta(kind, {}, {"layers.0.A": torch.ones(1, 3)}) for kind in (Method.LORA, Method.BITFIT)]
    whole = Prefix.from_states(prefix.states, base=prefix.card.base, deltas=deltas, training=training_of(1000))
    assert "turned_off" not in whole.card.to_json()
    assert whole.without() is whole
    alone = whole.without("bitfit").without("lora").save(tmp_path)
    assert alone.card.turned_off == ("bitfit", "lora")
    again = Prefix.load(tmp_path)
    assert again.card == alone.card
    assert again.card.training == whole.card.training  # how it came about, its data's cleaning included
    assert again.trained_parameters == again.num_parameters == prefix.num_parameters
    assert whole.without("prefix", "lora").card.turned_off == ("prefix", "lora")


def test_loaded_prefixes_are_compact(prefix: Prefix, tmp_path: Path) -> None:
    prefix.save(tmp_path)
    one, other = Prefix.load(tmp_path), Prefix.load(tmp_path)
    parts = [part for site in one.states.sites for part in (site.key, site.value, site.gate) if part is not None]
    filled = [part for part in parts if part.numel()]
    assert len({part.untyped_storage().data_ptr() for part in filled}) == 1
    assert filled[0].untyped_storage().nbytes() == sum(part.nbytes for part in filled)
    assert one.card.sites is other.card.sites
    assert one.states.geometry is other.states.geometry
    one.states.sites[0].key.zero_()
    assert not torch.equal(one.states.sites[0].key, other.states.sites[0].key)
    assert other.save(tmp_path / "again").card.content_hash == one.card.content_hash


def test_a_loaded_prefix_is_pickled_without_repeating_itself(prefix: Prefix, tmp_path: Path) -> None:
    prefix.save(tmp_path)
    loaded = Prefix.load(tmp_path)
    content = pickle.dumps(loaded)
    assert len(content) < 1.05 * len(pickle.dumps(prefix))
    again = pickle.loads(content)
    assert again.card == loaded.card
    for one, other in zip(again.states.sites, loaded.states.sites, strict=True):
        assert torch.equal(one.key, other.key)
        assert torch.equal(one.value, other.value)
        assert one.key.data_ptr() != other.key.data_ptr() or one.length == 0


def test_large_numbers_are_finite(prefix: Prefix, tmp_path: Path) -> None:
    prefix.save(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors["decoder_self.2.value"].fill_(3e38))
    assert float(Prefix.load(tmp_path).states.sites[2].value.max()) == pytest.approx(3e38)


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors and make the card agree."""
    path = folder / "prefix.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    card = json.loads((folder / "prefix.json").read_text())
    card["content_hash"] = sha256_file(path)
    (folder / "prefix.json").write_text(json.dumps(card))


def edit(folder: Path, **changes: object) -> None:
    card = json.loads((folder / "prefix.json").read_text())
    (folder / "prefix.json").write_text(json.dumps(card | changes))


DAMAGES: dict[str, tuple[Any, str]] = {
    "no folder": (lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(), "no such folder; expected an artefact"),
    "no card": (lambda f: (f / "prefix.json").unlink(), "has no prefix.json"),
    "no tensors": (lambda f: (f / "prefix.safetensors").unlink(), "has prefix.json but no prefix.safetensors"),
    "truncated": (
        lambda f: (f / "prefix.safetensors").write_bytes((f / "prefix.safetensors").read_bytes()[:-9]),
        "content hash .* is not the card's .* truncated or changed",
    ),
    "broken card": (lambda f: (f / "prefix.json").write_text("{"), "not readable as JSON"),
    "newer schema": (lambda f: edit(f, schema_version=9), "schema version 9, this prefixkit reads 1; upgrade"),
    "unknown key": (lambda f: edit(f, colour="red"), "colour: Extra inputs are not permitted"),
    "missing tensor": (
        lambda f: rewrite(f, lambda t: t.pop("decoder_self.0.key")), "tensor decoder_self.0.key is missing"),
    "extra tensor": (
        lambda f: rewrite(f, lambda t: t.update(other=torch.zeros(1))), "unexpected tensor other"),
    "wrong shape": (
        lambda f: rewrite(f, lambda t: t.update({"decoder_self.0.key": torch.zeros(2, 5, 3)})),
        r"decoder_self.0.key: expected shape \[2, 4, 3\], got \[2, 5, 3\]"),
    "not a number": (
        lambda f: rewrite(f, lambda t: t["decoder_self.2.value"].fill_(torch.nan)),
        "decoder_self.2.value holds NaN or infinite numbers"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_artefact_is_refused_with_the_reason(prefix: Prefix, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "prefix"
    prefix.save(folder)
    harm, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises(ArtefactError, match=message):
        Prefix.load(folder)


def test_a_save_that_fails_leaves_the_old_artefact(
    prefix: Prefix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = prefix.save(tmp_path)

    def full(tensors: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artefact, "save", full)
    with pytest.raises(ArtefactError, match="cannot save the artefact: .*No space left on device"):
        prefix.save(tmp_path)
    assert Prefix.load(tmp_path).card == saved.card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prefix.json", "prefix.safetensors"]
