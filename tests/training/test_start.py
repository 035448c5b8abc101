"""The prefix starts where the recipe says."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixkit.config import Method, PrefixConfig
from prefixkit.errors import BaseMismatchError, ConfigError, DataError
from prefixkit.injection import attach
from prefixkit.models import load_base_model
from prefixkit.models.fingerprint import fingerprint
from prefixkit.models.text_states import text_states
from prefixkit.prefix import BaseCard, Prefix
from prefixkit.training import build_encoder
from prefixkit.training.model import PrefixModel
from prefixkit.training.start import build_soft_prompt


def config(**values: Any) -> PrefixConfig:
    return PrefixConfig.model_validate({"num_virtual_tokens": 4, **values})


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_a_prefix_started_from_text_is_that_text(tiny_llama_dir: Any, depth: int) -> None:
    base = load_base_model(str(tiny_llama_dir), dtype="float64")
    encoder = build_encoder(
        base,
        config(reparam_depth=depth, reparam_width=8, init={"text": "i loved this film"}),
        seed=0,
        texts=[],
    )
    text = base.tokenizer("i loved this film", return_tensors="pt", add_special_tokens=False).input_ids
    more = base.tokenizer("the story was great", return_tensors="pt", add_special_tokens=False).input_ids
    expected = base.model(torch.cat([text, more], dim=1)).logits[:, text.shape[1] :]
    with attach(base.model, encoder):
        found = base.model(more).logits
    # Depth 0 copies; an MLP is solved for, and checked, only to TOLERANCE of the states' size.
    torch.testing.assert_close(found, expected, atol=1e-10 if depth == 0 else 2e-5, rtol=0)


@pytest.mark.parametrize("depth", [0, 2])
def test_a_scaled_prefix_starts_at_the_same_place_in_units_of_its_layers(tiny_llama_dir: Any, depth: int) -> None:
    base = load_base_model(str(tiny_llama_dir), dtype="float64")
    with torch.no_grad():
        base.model.model.layers[1].self_attn.v_proj.weight.mul_(100)
    text, width = "i loved this film", {"reparam_depth": depth, "reparam_width": 8}
    plain, scaled = (
        build_encoder(base, config(**width, init={"text": text, "scaled": on}), seed=0, texts=[])
        for on in (False, True)
    )
    assert (plain.units == 1).all()
    assert scaled.units[1, 1] > 32 * scaled.units[0, 1]
    for unit, site, same in zip(scaled.units, scaled.materialise().sites, plain.materialise().sites, strict=True):
        for size, part, expected in ((unit[0], site.key, same.key), (unit[1], site.value, same.value)):
            assert 0.5**0.5 <= part.square().mean().sqrt() / size <= 2**0.5
            torch.testing.assert_close(part, expected, atol=0 if depth == 0 else 1e-6, rtol=0)


@pytest.mark.parametrize(
    ("init", "apart"),
    [({"kind": "zero"}, 1), ({"kind": "random"}, 4), ({"text": "i loved this film"}, 4), ({"path": "of two"}, 2)],
)
def test_virtual_tokens_that_can_only_learn_the_same_are_told_of(
    tiny_llama_dir: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    init: dict[str, Any],
    apart: int,
) -> None:
    monkeypatch.setattr(logging.getLogger("prefixkit"), "propagate", True)  # a test of commands may have said no
    base = load_base_model(str(tiny_llama_dir), dtype="float32")
    if "path" in init:  # half as long as what starts from it
        text = base.tokenizer("loved film", return_tensors="pt", add_special_tokens=False)["input_ids"][0]
        card = BaseCard(id=base.id, fingerprint=fingerprint(base.model))
        Prefix.from_states(text_states(base.model, text), base=card, position_offset=4).save(tmp_path)
        init = {"kind": "prefix", "path": str(tmp_path)}
    encoder = build_encoder(base, config(init=init), seed=0, texts=[])
    assert [len(site.key[0]) for site in encoder().sites] == [4, 4]
    optimiser = torch.optim.Adam(encoder.parameters(), lr=0.1)
    ids = torch.arange(12).view(2, 6)
    for _ in range(3):
        with attach(base.model, encoder):
            base.model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    key = encoder.materialise().sites[1].key[0]  # [p, d]
    assert len(torch.unique(key, dim=0)) == apart
    message = f"only {apart} of 4 virtual tokens will learn apart"
    assert (message in caplog.text) == (apart < 4)


def test_a_short_text_is_repeated_and_a_missing_one_taken_from_the_training_texts(
    tiny_llama_dir: Any,
) -> None:
    base = load_base_model(str(tiny_llama_dir), dtype="float32")
    repeated = build_encoder(base, config(init={"text": "film great"}), seed=0, texts=[]).materialise()
    spelled = build_encoder(base, config(init={"text": "film great film great"}), seed=0, texts=[]).materialise()
    from_data = build_encoder(base, config(), seed=0, texts=["film great film great plot"]).materialise()
    assert torch.equal(repeated.sites[1].key, spelled.sites[1].key)
    assert torch.equal(repeated.sites[1].key, from_data.sites[1].key)


@pytest.mark.parametrize("kind", ["words", "random"])
def test_the_seed_decides_a_random_start(tiny_llama_dir: Any, kind: str) -> None:
    base = load_base_model(str(tiny_llama_dir), dtype="float32")
    one, same, other = (
        build_encoder(base, config(init={"kind": kind}), seed=seed, texts=[]).materialise().sites[0].key
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("family", ["tiny_llama_dir", "tiny_gpt2_dir"])
def test_a_gated_prefix_starts_as_the_base_model_itself(request: pytest.FixtureRequest, family: str) -> None:
    """With absolute positions too, which would tell a text that begins after a prefix."""
    base = load_base_model(str(request.getfixturevalue(family)), dtype="float64")
    ids = torch.randint(4, 30, (2, 6), generator=torch.Generator().manual_seed(0))
    before = base.model(ids).logits
    encoder = build_encoder(base, config(gate=True), seed=0, texts=["i loved it"])
    with attach(base.model, encoder):
        found = base.model(ids).logits
        found.square().sum().backward()
    torch.testing.assert_close(found, before, atol=1e-12, rtol=0)
    assert Prefix.from_states(encoder.materialise(), base=BaseCard(id="x")).position_offset == 0
    assert encoder.gates is not None
    assert all(gate.grad.abs().sum() > 0 for gate in encoder.gates)


def test_a_prefix_starts_from_another_one_of_the_same_base(tiny_llama_dir: Any, tmp_path: Any) -> None:
    base = load_base_model(str(tiny_llama_dir), dtype="float32")
    first = build_encoder(base, config(init={"text": "film great"}), seed=0, texts=[]).materialise()
    Prefix.from_states(first, base=BaseCard(id="x", fingerprint=fingerprint(base.model))).save(tmp_path / "one")
    start = {"kind": "prefix", "path": str(tmp_path / "one")}
    again = build_encoder(base, config(init=start), seed=0, texts=[]).materialise()
    assert all(torch.equal(a.key, b.key) and torch.equal(a.value, b.value)
               for a, b in zip(first.sites, again.sites, strict=True))  # fmt: skip
    Prefix.from_states(first, base=BaseCard(id="x", fingerprint="f" * 64)).save(tmp_path / "foreign")
    start = {"kind": "prefix", "path": str(tmp_path / "foreign")}
    with pytest.raises(BaseMismatchError, match="this artefact was trained on x"):
        build_encoder(base, config(init=start), seed=0, texts=[])


def test_a_prefix_does_not_start_from_one_whose_text_begins_elsewhere(tiny_llama_dir: Any, tmp_path: Any) -> None:
    base = load_base_model(str(tiny_llama_dir), dtype="float64")
    encoder = build_encoder(base, PrefixConfig(num_virtual_tokens=4), seed=1, texts=["the film"])
    card = BaseCard(id="tiny", fingerprint=fingerprint(base.model))
    Prefix.from_states(encoder.materialise(), base=card, position_offset=0).save(tmp_path / "first")
    init = {"kind": "prefix", "path": str(tmp_path / "first")}
    with pytest.raises(
        ConfigError, match=r"first: its text begins at position 0, this recipe's at 4; set prefix.posit"
    ):
        build_encoder(base, PrefixConfig.model_validate({"num_virtual_tokens": 4, "init": init}), seed=1, texts=[])
    same = PrefixConfig.model_validate({"num_virtual_tokens": 4, "position_offset": 0, "init": init})
    assert build_encoder(base, same, seed=1, texts=[]).materialise().equals(encoder.materialise())


def test_only_what_has_numbers_waits_for_a_gradient(tiny_llama_dir: Any) -> None:
    """Several processes would wait for that of a layer without virtual tokens, which never comes."""
    base = load_base_model(str(tiny_llama_dir), dtype="float64")
    encoder = build_encoder(base, PrefixConfig(num_virtual_tokens=4, layers=[0], gate=True), seed=1, texts=["the film"])
    assert all(number.requires_grad == (number.numel() > 0) for number in encoder.parameters())
    assert sum(number.requires_grad for number in encoder.parameters()) == 2


def test_a_text_start_longer_than_the_context_is_refused(tiny_gpt2_dir: Any) -> None:
    base = load_base_model(str(tiny_gpt2_dir), dtype="float32")
    limit = base.context_tokens
    assert limit is not None
    with pytest.raises(DataError, match=rf"a start of {limit + 1} tokens of text exceeds the model's context"):
        build_encoder(base, config(num_virtual_tokens=limit + 1), seed=0, texts=["film"])


def test_a_layer_the_model_does_not_have_is_named(tiny_llama_dir: Any) -> None:
    base = load_base_model(str(tiny_llama_dir), dtype="float32")
    with pytest.raises(ConfigError, match=r"prefix.layers: expected layers 0-1 of this model, got 7"):
        build_encoder(base, config(layers=[0, 7]), seed=0, texts=["x"])


def test_no_text_to_start_from_is_said(tiny_llama_dir: Any) -> None:
    base = load_base_model(str(tiny_llama_dir), dtype="float32")
    with pytest.raises(ConfigError, match="there are no training texts to start from; write a text"):
        build_encoder(base, config(), seed=0, texts=[])


def test_a_soft_prompts_checkpoint_from_before_its_units_moved_goes_on(tiny_llama_dir: Any) -> None:
    base = load_base_model(str(tiny_llama_dir), dtype="float32")
    scaled = config(init={"text": "i loved this film", "scaled": True})
    prompt = build_soft_prompt(base, Method.EMBEDDING, scaled, seed=0, texts=[])
    model = PrefixModel(base.model, prompt, None)
    state = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    older = {"units": 2 * state["source.units"]} | {name: t for name, t in state.items() if name != "source.units"}
    before = prompt.materialise()
    model.load_trained_state(older)
    torch.testing.assert_close(prompt.materialise(), 2 * before)
    model.close()
