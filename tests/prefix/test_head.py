"""A head says of a hidden state what plain arithmetic says, and its artefact holds it whole or is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefixkit.config import Placement, Pooling
from prefixkit.errors import ArtefactError
from prefixkit.files import sha256_file
from prefixkit.prefix import (
    BaseCard,
    ClassificationHead,
    Geometry,
    Head,
    HeadKind,
    Prefix,
    PrefixStates,
    Site,
    SiteStates,
)

LABELS = ("yes", "no", "it depends")  # not in the order of the alphabet
SIZE = 4


def numbers(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_head(*, seed: int = 0, dtype: torch.dtype = torch.float64, **options: Any) -> ClassificationHead:
    """A head whose bias, which starts at zero, is not zero."""
    dice = torch.Generator().manual_seed(seed)
    head = ClassificationHead(HeadKind.SEQUENCE, LABELS, SIZE, generator=dice, dtype=dtype, **options)
    with torch.no_grad():
        head.bias.add_(torch.randn(len(LABELS), generator=dice, dtype=dtype))
    return head


def make_prefix(head: Head | None) -> Prefix:
    geometry = Geometry((Site(Placement.ENCODER_SELF, 0, 4, 4, 3),))
    states = PrefixStates(geometry, (SiteStates(numbers(4, 2, 3, seed=2), numbers(4, 2, 3, seed=3)),))
    return Prefix.from_states(states, base=BaseCard(id="tiny"), head=head)


def test_it_starts_small_from_its_own_dice_and_without_a_preference() -> None:
    def start(seed: int) -> ClassificationHead:
        dice = torch.Generator().manual_seed(seed)
        return ClassificationHead(HeadKind.TOKEN, LABELS, 4000, generator=dice)

    head = start(0)
    assert torch.equal(head.bias, torch.zeros(3))
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.05)  # 12,000 draws: 8 standard deviations
    assert torch.equal(head.weight, start(0).weight)
    assert not torch.equal(head.weight, start(1).weight)
    assert head.num_parameters() == 3 * 4000 + 3


def test_logits_are_the_weighted_sums() -> None:
    head, hidden = make_head(), numbers(5, SIZE)
    expected = torch.tensor(
        [
            [sum(h * w for h, w in zip(row, weights, strict=True)) + bias
             for weights, bias in zip(head.weight.tolist(), head.bias.tolist(), strict=True)]
            for row in hidden.tolist()
        ],
        dtype=torch.float64,
    )  # fmt: skip
    assert torch.allclose(head(hidden), expected, rtol=0, atol=1e-14)
    trained = head.materialise()
    assert torch.allclose(trained(hidden), expected, rtol=0, atol=1e-14)
    assert torch.allclose(trained(hidden[None, :, None]), expected[None, :, None], rtol=0, atol=1e-14)


def test_gradients_are_those_of_the_weighted_sums() -> None:
    head, hidden, slope = make_head(), numbers(5, SIZE).requires_grad_(), numbers(5, 3, seed=2)
    (head(hidden) * slope).sum().backward()
    assert head.weight.grad is not None
    assert head.bias.grad is not None
    assert hidden.grad is not None
    assert torch.allclose(head.weight.grad, torch.einsum("kc,ke->ce", slope, hidden), rtol=0, atol=1e-14)
    assert torch.allclose(head.bias.grad, slope.sum(0), rtol=0, atol=1e-14)
    assert torch.allclose(hidden.grad, torch.einsum("kc,ce->ke", slope, head.weight), rtol=0, atol=1e-14)


def test_numbers_are_dropped_only_while_training_and_the_rest_scaled_up() -> None:
    head, hidden = make_head(dropout=0.75), numbers(200, SIZE)
    with torch.no_grad():
        head.weight.copy_(torch.eye(3, SIZE))
        head.bias.zero_()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        said = head(hidden)
    is_kept = said != 0
    assert is_kept.double().mean().item() == pytest.approx(0.25, abs=0.07)  # 600 draws: 4 standard deviations
    assert torch.equal(said, torch.where(is_kept, 4 * hidden[:, :3], 0))
    assert torch.equal(head.eval()(hidden), hidden[:, :3])
    assert torch.equal(head.materialise()(hidden), hidden[:, :3])


def test_later_steps_do_not_change_a_materialised_head() -> None:
    head, hidden = make_head(), numbers(5, SIZE)
    trained, before = head.materialise(), head(hidden).detach()
    with torch.no_grad():
        head.weight.add_(1)
        head.bias.add_(1)
    assert torch.equal(trained(hidden), before)
    assert not trained(hidden).requires_grad
    assert (trained.kind, trained.labels) == (HeadKind.SEQUENCE, LABELS)


def test_logits_are_in_the_heads_number_format_not_the_models() -> None:
    head, hidden = make_head(dtype=torch.float32), numbers(5, SIZE, dtype=torch.bfloat16)
    expected = hidden.float() @ head.weight.T + head.bias
    for said in (head(hidden), head.materialise()(hidden)):
        assert said.dtype == torch.float32
        assert torch.allclose(said, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", HeadKind)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_head_is_loaded_as_it_was_saved(kind: HeadKind, dtype: torch.dtype, tmp_path: Path) -> None:
    head = Head(kind, LABELS, numbers(3, SIZE, dtype=dtype), numbers(3, dtype=dtype))
    saved = make_prefix(head).save(tmp_path / "préfixe")
    loaded = Prefix.load(tmp_path / "préfixe")
    assert loaded.card == saved.card
    assert loaded.head is not None
    assert (loaded.head.kind, loaded.head.labels) == (kind, LABELS)
    for one, other in ((loaded.head.weight, head.weight), (loaded.head.bias, head.bias)):
        assert one.dtype == dtype
        assert torch.equal(one, other)
    assert torch.equal(loaded.states.sites[0].key, saved.states.sites[0].key)


def test_a_prefix_without_a_head_is_written_as_before_there_were_heads(tmp_path: Path) -> None:
    prefix = make_prefix(None)
    assert "head" not in prefix.card.to_json()
    assert make_prefix(make_head().materialise()).card.to_json()["head"] == {
        "kind": "sequence", "labels": ["yes", "no", "it depends"], "hidden_size": 4,
        "pooling": "token"}  # fmt: skip
    prefix.save(tmp_path)
    assert "head" not in json.loads((tmp_path / "prefix.json").read_text())
    assert Prefix.load(tmp_path).head is None


def rewrite(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors and make the card's hash agree."""

    def harm(folder: Path) -> None:
        path = folder / "prefix.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)
        card = json.loads((folder / "prefix.json").read_text())
        (folder / "prefix.json").write_text(json.dumps(card | {"content_hash": sha256_file(path)}))

    return harm


def edit(**changes: Any) -> Callable[[Path], None]:
    """Change what the card says of the head."""

    def harm(folder: Path) -> None:
        card = json.loads((folder / "prefix.json").read_text())
        (folder / "prefix.json").write_text(json.dumps(card | {"head": card["head"] | changes}))

    return harm


def forget(folder: Path) -> None:
    card = json.loads((folder / "prefix.json").read_text())
    del card["head"]
    (folder / "prefix.json").write_text(json.dumps(card))


TENSORS, CARD = "prefix.safetensors", "prefix.json"
FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no weight": (rewrite(lambda t: t.pop("head.weight")), TENSORS, "tensor head.weight is missing"),
    "no bias": (rewrite(lambda t: t.pop("head.bias")), TENSORS, "tensor head.bias is missing"),
    "another width": (
        rewrite(lambda t: t.update({"head.weight": torch.zeros(3, 5)})), TENSORS,
        "head.weight: expected shape [3, 4], got [3, 5]"),
    "a bias too many": (
        rewrite(lambda t: t.update({"head.bias": torch.zeros(4)})), TENSORS,
        "head.bias: expected shape [3], got [4]"),
    "not a number": (
        rewrite(lambda t: t["head.weight"][1].fill_(torch.nan)), TENSORS, "head.weight holds NaN or infinite numbers"),
    "infinite": (
        rewrite(lambda t: t["head.bias"][:1].fill_(torch.inf)), TENSORS, "head.bias holds NaN or infinite numbers"),
    "no card entry": (forget, TENSORS, "unexpected tensor head.bias"),
    "a label too many": (
        edit(labels=["a", "b", "c", "d"]), TENSORS, "head.weight: expected shape [4, 4], got [3, 4]"),
    "one label": (
        edit(labels=["a"]), CARD, "head.labels: Tuple should have at least 2 items after validation, not 1"),
    "an unknown kind": (edit(kind="page"), CARD, "head.kind: Input should be 'sequence' or 'token'"),
    "an unknown key": (edit(colour="red"), CARD, "head.colour: Extra inputs are not permitted"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_head_is_refused_with_the_reason(fault: str, tmp_path: Path) -> None:
    make_prefix(make_head().materialise()).save(tmp_path)
    harm, file, reason = FAULTS[fault]
    harm(tmp_path)
    with pytest.raises(ArtefactError) as caught:
        Prefix.load(tmp_path)
    assert str(caught.value) == f"{tmp_path / file}: {reason}"


@pytest.mark.parametrize("labels", [("a",), ("a", "a"), ("a", "b", "c")])
def test_labels_must_be_two_or_more_and_different_and_one_per_logit(labels: tuple[str, ...]) -> None:
    expected = 2 if len(labels) > 1 else 1
    with pytest.raises(ArtefactError) as caught:
        Head(HeadKind.SEQUENCE, labels, torch.zeros(expected, 4), torch.zeros(expected))
    assert str(caught.value) == (
        f"head.labels: expected {expected} different labels, two or more, got {', '.join(labels)}"
    )


def test_a_head_for_words_has_no_mean() -> None:
    with pytest.raises(
        ArtefactError, match=r"^head.pooling: a head for words reads each word's own token, not the mean"
    ):
        Head(HeadKind.TOKEN, ("a", "b"), torch.zeros(2, 4), torch.zeros(2), Pooling.MEAN)


def test_autocast_does_not_round_the_heads_own_arithmetic() -> None:
    head, hidden = make_head(), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    head = head.float()
    expected = head(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(hidden), expected)


@pytest.mark.parametrize(("weight", "bias"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_weight_and_bias_have_one_number_format(weight: torch.dtype, bias: torch.dtype) -> None:
    with pytest.raises(ArtefactError, match=r"^head: expected weight and bias in one number format, got torch\."):
        Head(HeadKind.SEQUENCE, ("a", "b"), torch.zeros(2, 3).to(weight), torch.zeros(2).to(bias))
