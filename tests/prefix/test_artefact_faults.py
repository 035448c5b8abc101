"""What can happen to a disk while an artefact is saved, and to its files afterwards."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefixkit.config import Placement
from prefixkit.errors import ArtefactError
from prefixkit.files import sha256_file
from prefixkit.prefix import BaseCard, Geometry, Prefix, PrefixStates, Site, SiteStates, artefact


def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> Prefix:
    dice = torch.Generator().manual_seed(seed)
    geometry = Geometry(tuple(Site(Placement.DECODER_SELF, layer, 4, 2, 3) for layer in range(2)))
    sites = tuple(
        SiteStates(*(torch.randn(2, 5, 3, generator=dice).to(dtype) for _ in range(2)), gate=torch.rand(4).to(dtype))
        for _ in range(2)
    )
    return Prefix.from_states(PrefixStates(geometry, sites), base=BaseCard(id="tiny"), position_offset=7)


@pytest.mark.parametrize("failing", ["save", "write_json", "sha256_file"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_anywhere_leaves_the_old_artefact_whole(
    failing: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = make(0).save(tmp_path)

    def fail(*arguments: object) -> None:
        for each in arguments:
            if isinstance(each, Path):
                each.write_bytes(b"half")
        raise error

    monkeypatch.setattr(artefact, failing, fail)
    with pytest.raises(ArtefactError if isinstance(error, OSError) else KeyboardInterrupt):
        make(1).save(tmp_path)
    monkeypatch.undo()
    loaded = Prefix.load(tmp_path)
    assert loaded.card == saved.card
    assert torch.equal(loaded.states.sites[0].key, make(0).states.sites[0].key)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prefix.json", "prefix.safetensors"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot save the artefact: ") as caught:
        make().save(tmp_path / "file" / "prefix")
    assert "\n" not in str(caught.value)


def test_scores_that_are_no_numbers_are_refused_and_the_old_ones_kept(tmp_path: Path) -> None:
    saved = make().with_scores({"heldout_nll": 3.5}).save(tmp_path)
    with pytest.raises(ArtefactError, match="cannot save the artefact"):
        saved.with_scores({"heldout_nll": float("nan")}).save(tmp_path)
    assert Prefix.load(tmp_path).card.scores == {"heldout_nll": 3.5}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_number_format_survives_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    prefix = make(dtype=dtype)
    prefix.save(tmp_path / "前缀 ünïcode")
    loaded = Prefix.load(tmp_path / "前缀 ünïcode")
    assert loaded.position_offset == 7
    for one, other in zip(loaded.states.sites, prefix.states.sites, strict=True):
        for part in ("key", "value", "gate"):
            assert getattr(one, part).dtype == dtype
            assert torch.equal(getattr(one, part), getattr(other, part))


@pytest.mark.parametrize("place", [0, 100, -1])
def test_one_changed_byte_is_found(place: int, tmp_path: Path) -> None:
    make().save(tmp_path)
    path = tmp_path / "prefix.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"truncated or changed, copy it again"):
        Prefix.load(tmp_path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    make().save(tmp_path)
    path = tmp_path / "prefix.safetensors"
    torch.save({name: tensor.clone() for name, tensor in load_file(path).items()}, tmp_path / "pickle")
    (tmp_path / "pickle").replace(path)
    card = json.loads((tmp_path / "prefix.json").read_text())
    (tmp_path / "prefix.json").write_text(json.dumps(card | {"content_hash": sha256_file(path)}))
    with pytest.raises(ArtefactError, match="not a readable safetensors file"):
        Prefix.load(tmp_path)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_gates_are_refused(value: float, tmp_path: Path) -> None:
    make().save(tmp_path)
    path = tmp_path / "prefix.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["decoder_self.1.gate"][2] = value
    save_file(tensors, path)
    card = json.loads((tmp_path / "prefix.json").read_text())
    (tmp_path / "prefix.json").write_text(json.dumps(card | {"content_hash": sha256_file(path)}))
    with pytest.raises(ArtefactError, match=r"decoder_self.1.gate holds NaN or infinite numbers"):
        Prefix.load(tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", "3", '{"schema_version": "1"}', "{}"])
def test_a_card_that_is_something_else_is_refused(content: str, tmp_path: Path) -> None:
    make().save(tmp_path)
    (tmp_path / "prefix.json").write_text(content)
    with pytest.raises(ArtefactError, match="schema version .*, this prefixkit reads 1; upgrade prefixkit"):
        Prefix.load(tmp_path)


def test_a_loaded_prefix_does_not_hang_on_its_file(tmp_path: Path) -> None:
    """A mapped file that another program overwrites in place would change the numbers, or end the process."""
    make().save(tmp_path)
    loaded = Prefix.load(tmp_path)
    with (tmp_path / "prefix.safetensors").open("r+b") as file:
        file.seek(-60, 2)
        file.write(b"\0" * 60)
    expected = make().states
    for one, other in zip(loaded.states.sites, expected.sites, strict=True):
        assert torch.equal(one.key, other.key)
        assert torch.equal(one.value, other.value)


def test_later_training_does_not_change_a_prefix() -> None:
    prefix = make()
    copy = Prefix.from_states(prefix.states, base=prefix.card.base)
    prefix.states.sites[0].key.add_(1)
    assert not torch.equal(copy.states.sites[0].key, prefix.states.sites[0].key)
