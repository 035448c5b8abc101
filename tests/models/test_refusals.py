"""What transformers and the hub raise becomes one line; the hub itself is never asked."""

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModelForCausalLM, Gemma2Config

from prefixkit.errors import ModelError, UnsupportedModelError
from prefixkit.models.refusals import explain_failure
from prefixkit.models.sources import Source, SourceKind

HUB = Source("someone/model", SourceKind.HUB)
FOLDER = Source("a folder", SourceKind.FOLDER)
PACKAGED = "; packaged models need no hub: smollm2-135m, all-minilm-l6-v2"


def wrapped(cause):
    """As transformers raises it: an OSError of several lines, from what the hub's client raised."""
    try:
        raise OSError("someone/model is not a local folder\nand more lines\n") from cause
    except OSError as error:
        return error


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (GatedRepoError, "its terms must be accepted first; do so on its hub page, then run `hf auth login`"),
        (
            RepositoryNotFoundError,
            f"not a folder, not packaged, and the hub has no such model (or it is private){PACKAGED}",
        ),
        (RevisionNotFoundError, "the hub has this model, but no revision 'v9'; correct model.revision"),
        (
            LocalEntryNotFoundError,
            f"not a folder, not packaged, and the hub cannot be reached; connect once to fetch it{PACKAGED}",
        ),
    ],
)
def test_what_the_hub_says_is_one_line(monkeypatch, cause, message):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE")
    error = explain_failure(HUB, wrapped(cause.__new__(cause)), revision="v9")
    assert str(error) == f"someone/model: {message}"


def test_hub_model_whose_files_are_the_problem_is_not_blamed_on_the_hub():
    error = explain_failure(HUB, ValueError("odd\nvalue"), revision=None)
    assert str(error) == "someone/model: cannot be loaded (ValueError: odd value)"


def test_too_little_memory_names_the_way_out():
    error = explain_failure(FOLDER, MemoryError(), revision=None)
    assert str(error) == ("a folder: not enough memory to load it; take a smaller model, or model.dtype=bfloat16")


def test_anything_else_is_folded_and_clipped():
    error = explain_failure(FOLDER, RuntimeError("line\n" * 200), revision=None)
    assert type(error) is ModelError
    assert str(error).startswith("a folder: cannot be loaded (RuntimeError: line line line")
    assert str(error).endswith("...)")
    assert len(str(error)) < 220


def test_unknown_architecture_without_a_name():
    error = explain_failure(FOLDER, ValueError("Unrecognized model in x.\nShould have ..."), revision=None)
    assert type(error) is UnsupportedModelError
    assert "does not know its architecture; upgrade transformers" in str(error)


def test_a_family_with_eager_attention_only_is_not_said_to_take_no_prefix():
    tiny = Gemma2Config(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ValueError, match="scaled_dot_product_attention") as caught:
        AutoModelForCausalLM.from_config(tiny, attn_implementation="sdpa")
    error = explain_failure(FOLDER, caught.value, revision=None)
    assert type(error) is UnsupportedModelError
    assert str(error) == (
        "a folder: its family has no sdpa attention; try model.attention=eager"
        " (`prefixkit inspect` says whether it can take a prefix)"
    )
