"""A prefix goes to PEFT and comes back; the real PEFT is the judge of both."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from prefixkit import Prefix, attach
from prefixkit.export import from_peft, to_peft
from prefixkit.models.fingerprint import fingerprint

MakeModel = Callable[..., PreTrainedModel]
MakePrefix = Callable[..., Prefix]
TOLERANCE = 1e-10  # float64: both run the same operations; so far the difference is 0.0


def logits(model: torch.nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def assert_same_text(ours: Tensor, theirs: Tensor, mask: Tensor | None) -> None:
    seen = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(ours[seen], theirs[seen], rtol=0, atol=TOLERANCE)


def greedy(model: PreTrainedModel | PeftModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False)


def test_peft_answers_with_an_exported_prefix_as_attach_does(
    peft_family: str, mask: Tensor | None, ids: Tensor, make_model: MakeModel, make_prefix: MakePrefix, tmp_path: Path
) -> None:
    model = make_model(peft_family)
    prefix = make_prefix(model)
    to_peft(prefix, tmp_path, model)
    plain = logits(model, ids, mask)
    with attach(model, prefix):
        ours, our_text = logits(model, ids, mask), greedy(model, ids, mask)
    tuned = PeftModel.from_pretrained(model, tmp_path)
    assert_same_text(ours, logits(tuned, ids, mask), mask)
    assert torch.equal(our_text, greedy(tuned, ids, mask))
    assert (ours - plain).abs().max() > 0.1  # the prefix does something


@pytest.mark.parametrize("projection", [False, True])
def test_a_checkpoint_peft_trained_answers_as_in_peft(
    peft_family: str,
    projection: bool,
    mask: Tensor | None,
    ids: Tensor,
    make_model: MakeModel,
    train_with_peft: Callable[..., tuple[PeftModel, Path]],
) -> None:
    model = make_model(peft_family)
    tuned, folder = train_with_peft(model, prefix_projection=projection, encoder_hidden_size=24)
    theirs, their_text = logits(tuned, ids, mask), greedy(tuned, ids, mask)
    prefix = from_peft(folder, model)
    assert prefix.card.base.fingerprint == fingerprint(model)
    with attach(model, prefix):
        assert_same_text(logits(model, ids, mask), theirs, mask)
        assert torch.equal(greedy(model, ids, mask), their_text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("peft_family", ["gpt2", "llama"])
def test_out_and_in_again_changes_no_bit(
    peft_family: str, dtype: torch.dtype, make_model: MakeModel, make_prefix: MakePrefix, tmp_path: Path
) -> None:
    model = make_model(peft_family)
    prefix = make_prefix(model, dtype=dtype)
    to_peft(prefix, tmp_path, model)
    back = from_peft(tmp_path, model)
    for ours, theirs in zip(prefix.states.sites, back.states.sites, strict=True):
        assert theirs.key.dtype == dtype
        assert torch.equal(ours.key, theirs.key)
        assert torch.equal(ours.value, theirs.value)
    assert back.card == prefix.card
    content = (tmp_path / "adapter_model.safetensors").read_bytes()
    to_peft(back, tmp_path / "again", model)
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == content


def test_the_files_say_what_pefts_say(
    make_model: MakeModel, train_with_peft: Callable[..., tuple[PeftModel, Path]], tmp_path: Path
) -> None:
    model = make_model("llama")
    _, folder = train_with_peft(model)
    to_peft(from_peft(folder, model, base_id="org/tiny", revision="a1b2"), tmp_path / "ours", model)
    ours, theirs = (json.loads((each / "adapter_config.json").read_text()) for each in (tmp_path / "ours", folder))
    assert ours["base_model_name_or_path"] == "org/tiny"
    assert ours["revision"] == "a1b2"
    assert ours["task_type"] == "CAUSAL_LM"
    differing = {key for key in theirs if ours.get(key) != theirs[key]}
    assert differing == {"base_model_name_or_path", "revision", "peft_version"}
    assert ours.keys() <= theirs.keys()
    names = ("adapter_model.safetensors",)
    assert all((tmp_path / "ours" / name).read_bytes() == (folder / name).read_bytes() for name in names)
    read = PeftConfig.from_pretrained(str(tmp_path / "ours"))
    assert (read.num_virtual_tokens, read.token_dim, read.num_layers, read.num_attention_heads) == (5, 16, 3, 2)


def test_names_come_from_the_checkpoint_unless_given(
    make_model: MakeModel, make_prefix: MakePrefix, tmp_path: Path
) -> None:
    model = make_model("gpt2")
    to_peft(make_prefix(model), tmp_path, model)
    assert from_peft(tmp_path, model).card.base.id == "org/tiny"
    assert from_peft(tmp_path, model).card.base.revision == "a1b2"
    given = from_peft(tmp_path, model, base_id="my/gpt2", revision="main").card.base
    assert (given.id, given.revision) == ("my/gpt2", "main")
    assert from_peft(tmp_path, model, base_id="my/gpt2").card.base.revision is None  # a1b2 is org/tiny's
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None, "revision": None}))
    assert from_peft(tmp_path, model).card.base.id == "GPT2LMHeadModel"


def test_a_window_as_long_as_the_context_hides_nothing_and_is_exchanged(
    ids: Tensor, make_model: MakeModel, make_prefix: MakePrefix, tmp_path: Path
) -> None:
    model = make_model("mistral", sliding_window=64)
    long = torch.randint(3, 97, (1, 59), generator=torch.Generator().manual_seed(4))  # 5 + 59 fill the context
    prefix = make_prefix(model)
    to_peft(prefix, tmp_path, model)
    with attach(model, from_peft(tmp_path, model)):
        ours = logits(model, long, None)
    assert_same_text(ours, logits(PeftModel.from_pretrained(model, tmp_path), long, None), None)
