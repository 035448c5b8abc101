"""What PEFT's format cannot say, and what is not a checkpoint of a prefix, is refused by name."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from prefixkit.config import Placement
from prefixkit.errors import ArtefactError, BaseMismatchError, ExportError
from prefixkit.export import adapter, check_target, from_peft, to_peft
from prefixkit.prefix import Geometry, Head, HeadKind, Prefix, PrefixStates, Site, SiteStates

MakeModel = Callable[..., PreTrainedModel]
MakePrefix = Callable[..., Prefix]


@pytest.fixture
def model(make_model: MakeModel) -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture
def checkpoint(model: PreTrainedModel, make_prefix: MakePrefix, tmp_path: Path) -> Path:
    """A sound checkpoint, to be spoilt."""
    to_peft(make_prefix(model), tmp_path / "sound", model)
    return tmp_path / "sound"


def with_states(prefix: Prefix, change: Callable[[int, SiteStates], SiteStates], **options: Any) -> Prefix:
    sites = tuple(change(layer, site) for layer, site in enumerate(prefix.states.sites))
    return Prefix.from_states(PrefixStates(prefix.states.geometry, sites), base=prefix.card.base, **options)


def cut(lengths: tuple[int, ...]) -> Callable[[int, SiteStates], SiteStates]:
    return lambda layer, site: SiteStates(site.key[:, : lengths[layer]], site.value[:, : lengths[layer]])


HEAD = Head(HeadKind.SEQUENCE, ("a", "b"), torch.zeros(2, 32), torch.zeros(2))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda p: with_states(p, cut((5, 3, 5))),
            "PEFT's format cannot say layers of differing length: layer 1 has 3 virtual tokens, others 5",
        ),
        (
            lambda p: with_states(p, cut((0, 5, 5))),
            "PEFT's format cannot say layers without a prefix: layer 0 has 0 virtual tokens, others 5",
        ),
        (
            lambda p: with_states(p, lambda _, s: replace(s, gate=torch.full((4,), 0.3)), position_offset=5),
            "PEFT's format cannot say gates; train with prefix.gate=false to export to it",
        ),
        (
            lambda p: with_states(p, lambda _, s: s, position_offset=0),
            "position_offset 0: its text always starts right after the prefix, at 5",
        ),
        (
            lambda p: with_states(p, lambda _, s: SiteStates(s.key.double() / 3, s.value.double())),
            "its float64 numbers are rounded to float32 when PEFT loads them",
        ),
        (
            lambda p: with_states(p, lambda _, s: s, head=HEAD),
            "PEFT's format cannot say a head that labels a text from the token behind it: transformers' own take the",
        ),
    ],
)
def test_what_the_format_cannot_say_is_refused_and_nothing_is_written(
    spoil: Callable[[Prefix], Prefix], message: str, model: PreTrainedModel, make_prefix: MakePrefix, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=re.escape(message)):
        to_peft(spoil(make_prefix(model)), tmp_path / "out", model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (
            (Site(Placement.DECODER_SELF, 0, 4, 2, 8), Site(Placement.CROSS, 0, 4, 2, 8)),
            "PEFT's format cannot say cross prefixes, nor layers of their own for an .*; only decoder-only models",
        ),
        ((Site(Placement.ENCODER_SELF, 0, 4, 2, 8),), "PEFT's format cannot say encoder_self prefixes"),
        (
            (Site(Placement.DECODER_SELF, 0, 4, 2, 8), Site(Placement.DECODER_SELF, 1, 4, 1, 8)),
            "PEFT's format cannot say layers whose KV heads differ in number or size",
        ),
    ],
)
def test_geometries_the_format_cannot_say_are_refused(
    sites: tuple[Site, ...], message: str, model: PreTrainedModel, make_prefix: MakePrefix, tmp_path: Path
) -> None:
    geometry = Geometry(sites)
    states = PrefixStates.from_rows(geometry, torch.randn(3, geometry.numbers_per_token))
    with pytest.raises(ExportError, match=message):
        to_peft(Prefix.from_states(states, base=make_prefix(model).card.base), tmp_path, model)


def test_export_asks_for_the_prefixs_own_base_model(
    model: PreTrainedModel, make_model: MakeModel, make_prefix: MakePrefix, tmp_path: Path
) -> None:
    prefix = make_prefix(model)
    with pytest.raises(BaseMismatchError, match="this artefact was trained on org/tiny"):
        to_peft(prefix, tmp_path, make_model("llama", seed=1))
    with pytest.raises(ExportError, match="the artefact of org/tiny has another geometry than this model; give its b"):
        to_peft(prefix, tmp_path, make_model("gpt2"))
    assert not any(tmp_path.iterdir())


def test_models_whose_window_hides_pefts_prefix_are_refused_both_ways(
    checkpoint: Path, make_model: MakeModel, make_prefix: MakePrefix, tmp_path: Path
) -> None:
    windowed = make_model("mistral", sliding_window=63)
    message = (
        "MistralForCausalLM has a sliding window of 63 tokens: PEFT's prefix disappears behind it while prefixkit's "
        "stays in sight, so their answers would differ"
    )
    with pytest.raises(ExportError, match=message):
        to_peft(make_prefix(windowed), tmp_path / "out", windowed)
    with pytest.raises(ArtefactError, match=message):
        from_peft(checkpoint, windowed)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("peft_type", "LORA", "expected PREFIX_TUNING, got LORA; load it with peft; LoRA and its kin work beside"),
        ("peft_type", "PROMPT_TUNING", "peft_type: expected PREFIX_TUNING, got PROMPT_TUNING"),
        ("peft_type", "CARTRIDGE", "peft_type: expected PREFIX_TUNING, got CARTRIDGE"),
        ("peft_type", None, "peft_type: expected PREFIX_TUNING, got None; is it PEFT's?"),
        ("task_type", "SEQ_2_SEQ_LM", "got SEQ_2_SEQ_LM; in an encoder-decoder PEFT lets layers share their halves"),
        (
            "task_type",
            "SEQ_CLS",
            "expected the weights of one linear layer, score or classifier, as its",
        ),
        ("task_type", "QUESTION_ANS", "task_type: expected CAUSAL_LM, .*, got QUESTION_ANS; its head says where an"),
        ("task_type", None, "task_type: expected CAUSAL_LM, FEATURE_EXTRACTION, SEQ_CLS, TOKEN_CLS, got None; is it"),
        ("num_transformer_submodules", 2, "num_transformer_submodules: expected 1, got 2"),
        (
            "modules_to_save",
            ["lm_head"],
            r"modules_to_save: \['lm_head'\] were trained as well; a prefix cannot hold them",
        ),
        ("modules_to_save", "score", "modules_to_save: expected a list of names, got 'score'"),
        ("modules_to_save", True, "modules_to_save: expected a list of names, got True"),
        ("num_transformer_submodules", "1", "num_transformer_submodules: expected 1, got '1'"),
        ("rotate_keys", True, "rotate_keys: unknown, written by a PEFT newer than 0.21; it may change what"),
        ("num_virtual_tokens", None, "num_virtual_tokens: expected a number of at least 1, got None"),
        ("num_virtual_tokens", True, "num_virtual_tokens: expected a number of at least 1, got True"),
        ("num_virtual_tokens", 4, r"per virtual token, 4 as adapter_config.json says, got shape \[5, 96\]"),
        ("num_layers", 0, "num_layers: expected a number of at least 1, got 0"),
        ("num_layers", 12, "num_layers: the checkpoint has 12, this model 3; load org/tiny"),
        ("token_dim", 32, "token_dim: the checkpoint has 32, this model 16; load org/tiny"),
        ("num_attention_heads", 4, "num_attention_heads: the checkpoint has 4, this model 2; load org/tiny"),
        ("base_model_name_or_path", 3, "base_model_name_or_path: expected text, got 3"),
        ("revision", ["main"], r"revision: expected text, got \['main'\]"),
    ],
)
def test_a_configuration_that_is_no_prefix_of_this_model_is_refused(
    key: str, value: object, message: str, checkpoint: Path, model: PreTrainedModel
) -> None:
    path = checkpoint / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ArtefactError, match=message) as caught:
        from_peft(checkpoint, model)
    assert "\n" not in str(caught.value)


def test_unknown_keys_that_say_nothing_are_let_through(checkpoint: Path, model: PreTrainedModel) -> None:
    path = checkpoint / "adapter_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"future": None, "feature": False, "init_weights": "zero"})
    )
    assert from_peft(checkpoint, model).states.num_virtual_tokens == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {"base_model.lora_A.weight": t},
            "tensor prompt_embeddings is missing; is this a prefix-tuning checkpoint?",
        ),
        (
            lambda t: {"prompt_embeddings": t, "base_model.lm_head.weight": t.clone()},
            "also holds base_model.lm_head.weight, a weight of the base model",
        ),
        (
            lambda t: {"prompt_embeddings": t[:, :-2].clone()},
            "the checkpoint has 94 numbers per virtual token, this model takes 96",
        ),
        (
            lambda t: {"prompt_embeddings": t.flatten()},
            "expected one row per virtual token, 5 as adapter_config.json says, got shape",
        ),
        (lambda t: {"prompt_embeddings": t.log()}, "prompt_embeddings holds NaN, infinite numbers"),
        (lambda t: {"prompt_embeddings": t / 0}, "prompt_embeddings holds NaN, infinite numbers"),
        (lambda t: {"prompt_embeddings": t.long()}, "prompt_embeddings holds NaN, infinite numbers, or none at all"),
        (
            lambda t: {"prompt_embeddings": t.double() / 3},
            "its float64 numbers are rounded to float32 when PEFT loads them",
        ),
    ],
)
def test_tensors_that_are_no_prefix_of_this_model_are_refused(
    change: Callable[[torch.Tensor], dict[str, torch.Tensor]], message: str, checkpoint: Path, model: PreTrainedModel
) -> None:
    path = checkpoint / "adapter_model.safetensors"
    save_file(change(load_file(path)["prompt_embeddings"]), path)
    with pytest.raises(ArtefactError, match=message):
        from_peft(checkpoint, model)


def test_sizes_the_configuration_leaves_out_are_checked_against_the_numbers(
    checkpoint: Path, make_model: MakeModel
) -> None:
    path = checkpoint / "adapter_config.json"
    sizes = {"num_layers": None, "token_dim": None, "num_attention_heads": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | sizes))
    with pytest.raises(
        ArtefactError, match=r"has 96 numbers per virtual token, this model takes 192 \(3 layers, key and"
    ):
        from_peft(checkpoint, make_model("gpt2"))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(keep: int, checkpoint: Path, model: PreTrainedModel) -> None:
    path = checkpoint / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ArtefactError, match="adapter_model.safetensors: not a readable safetensors file: .*copy it again"
    ):
        from_peft(checkpoint, model)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not readable as JSON"), ("[1]", "expected a JSON object, got list"), ("\udcff", "not readable as JSON")],
)
def test_a_damaged_configuration_is_refused(
    content: str, message: str, checkpoint: Path, model: PreTrainedModel
) -> None:
    (checkpoint / "adapter_config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArtefactError, match=message):
        from_peft(checkpoint, model)


def test_what_is_missing_is_named(
    checkpoint: Path, model: PreTrainedModel, make_prefix: MakePrefix, tmp_path: Path
) -> None:
    with pytest.raises(
        ArtefactError, match="nowhere: no such folder; a checkpoint on the hub must be downloaded first"
    ):
        from_peft(tmp_path / "nowhere", model)
    with pytest.raises(ArtefactError, match="has no adapter_config.json, but its folder sound has one; give that"):
        from_peft(tmp_path, model)
    make_prefix(model).save(tmp_path / "own")
    with pytest.raises(ArtefactError, match="has no adapter_config.json; it is a prefixkit artefact already"):
        from_peft(tmp_path / "own", model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtefactError, match="expected a folder that PEFT's save_pretrained wrote"):
        from_peft(tmp_path / "empty", model)
    (checkpoint / "adapter_model.safetensors").unlink()
    with pytest.raises(ArtefactError, match="has adapter_config.json but no adapter_model.safetensors; copy the whole"):
        from_peft(checkpoint, model)


def test_a_pickle_is_not_read_but_its_conversion_is_told_and_works(checkpoint: Path, model: PreTrainedModel) -> None:
    sound = from_peft(checkpoint, model)
    tensors = checkpoint / "adapter_model.safetensors"
    torch.save(load_file(tensors), checkpoint / "adapter_model.bin")
    tensors.unlink()
    with pytest.raises(
        ArtefactError, match="adapter_model.bin: a pickle, which can run code when it is read"
    ) as caught:
        from_peft(checkpoint, model)
    found = re.search(r'python -c "(.*)"$', str(caught.value))
    assert found
    subprocess.run([sys.executable, "-c", found[1]], cwd=checkpoint, check=True)
    assert torch.equal(from_peft(checkpoint, model).states.to_rows(), sound.states.to_rows())


@pytest.mark.parametrize("failing", ["write_json", "atomic_path"])
def test_a_full_disk_leaves_the_earlier_export_whole(
    failing: str, checkpoint: Path, model: PreTrainedModel, make_prefix: MakePrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter, failing, fail)
    prefix = with_states(make_prefix(model), lambda _, s: SiteStates(s.key + 1, s.value))
    with pytest.raises(ExportError, match="sound: cannot be written to: No space left on device"):
        to_peft(prefix, checkpoint, model)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_a_folder_is_overwritten_only_when_asked_and_only_if_nothing_else_is_in_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    names = ("adapter_model.safetensors", "adapter_config.json")
    check_target(tmp_path / "new", names, overwrite=False)
    with pytest.raises(
        ExportError, match="sound: exists already; replace it with --overwrite, or choose another folder"
    ):
        check_target(checkpoint, names, overwrite=False)
    check_target(checkpoint, names, overwrite=True)
    (checkpoint / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match="sound: holds thesis.txt, which is not ours to overwrite; choose another"):
        check_target(checkpoint, names, overwrite=True)
    with pytest.raises(ExportError, match="thesis.txt: is a file; choose a folder"):
        check_target(checkpoint / "thesis.txt", names, overwrite=True)
