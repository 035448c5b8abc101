"""Every refusal of a recipe, word for word, and what YAML is understood as."""

from pathlib import Path
from typing import Any

import pytest

from prefixkit.config import InitKind, Placement, Recipe, Schedule, dump_recipe, load_recipe, parse_recipe, recipe_text
from prefixkit.errors import ConfigError

REFUSALS = {
    "data: {learn_also: [b]}": "data: learn_also needs keep_label; without it the rows of every label are learned",
    "data: {label_column: l, keep_label: a, learn_also: [a]}":
        "data: learn_also names keep_label, a; leave it out there",
    "data: {train_rows: 9, likeliest: 0.5}":
        "data: likeliest would choose among the train_rows that were drawn; set it to 1, or leave train_rows out",
    "data: {train_rows: 0}": "data.train_rows: expected at least 1, got 0",
    "data: {stream: true, train_rows: 9}":
        "data: stream reads rows as they come, train_rows needs all of them; leave one of them out",
    "prefix: {reparam_depth: -1}": "prefix.reparam_depth: expected 0-3, got -1",
    "prefix: {dropout: 1.0}": "prefix.dropout: expected at least 0 and less than 1, got 1.0",
    "prefix: {num_virtual_tokens: 0}": "prefix.num_virtual_tokens: expected 1-4096, got 0",
    "prefix: {num_virtual_tokens: '20'}": "prefix.num_virtual_tokens: expected a valid integer, got '20'",
    "prefix: {num_virtual_tokens: true}": "prefix.num_virtual_tokens: expected a valid integer, got True",
    "prefix: {gate: 1}": "prefix.gate: expected a valid boolean, got 1",
    "prefix: {layers: [0, 0]}": "prefix: layers names a layer twice: [0, 0]",
    "prefix: {layers: [0], layer_lengths: [1]}":
        "prefix: give layers or layer_lengths, not both (a length of 0 leaves a layer out)",
    "prefix: {layer_lengths: [0, 0]}": "prefix: layer_lengths is 0 everywhere: nothing would be trained",
    "prefix: {placement: [middle]}":
        "prefix.placement.0: expected 'decoder_self', 'encoder_self' or 'cross', got 'middle'",
    "prefix: {init: {kind: prefix}}": "prefix.init: kind prefix needs path, the run or artefact folder to start from",
    "prefix: {init: {text: '  '}}": "prefix.init: text is empty; write a sentence or leave it out",
    "prefix: {init: {kind: random, scaled: true}}":
        "prefix.init: scaled needs a start that has sizes, kind text, words or prefix; random has none",
    "prefix: {init: {kind: zero, scaled: true}}":
        "prefix.init: scaled needs a start that has sizes, kind text, words or prefix; zero has none",
    "prefix: {init: {std: 0}}": "prefix.init.std: expected more than 0, got 0",
    "prefix: {init: {txt: a}}": 'prefix.init.txt: unknown key; did you mean "text"?',
    "prefix: {zzz: 1}": "prefix.zzz: unknown key; see `prefixkit recipes show` for the known ones",
    "prefx: {}": 'prefx: unknown key; did you mean "prefix"?',
    "data: {clearest: 0.5}": "data: clearest needs keep_label, the label that is to be clear",
    "data: {keep_label: a}": "data: keep_label needs label_column, the column it is compared with",
    "data: {max_words: 3, min_words: 5}": "data: max_words (3) is below min_words (5)",
    "data: {split: {train: 0.5}}": "data.split: shares must sum to 1, got 1.05",
    "data: {split: {test: 0}}": "data.split.test: expected more than 0 and less than 1, got 0",
    "data: {format: poem}": "data.format: expected 'text', 'input_target', 'messages', 'classes' or 'tags', got 'poem'",
    "data: {format: classes}": "data: format classes needs label_column, the column of what is learned",
    "data: {format: tags, prompt: a}": "data: format tags needs label_column, the column of what is learned",
    "data: {format: classes, label_column: y, keep_label: a}":
        "data: format classes learns to tell all labels apart; leave keep_label out",
    "data: {format: tags, label_column: y, prompt: 'Review:'}":
        "data: format tags reads the text as it is; leave prompt out",
    "head: {learning_rate: 0}": "head.learning_rate: expected more than 0, got 0",
    "head: {dropout: 1}": "head.dropout: expected at least 0 and less than 1, got 1",
    "model: {attention: flash}": "model.attention: expected 'sdpa', 'eager' or 'fastest', got 'flash'",
    "train: {learning_rate: fast}": "train.learning_rate: expected a valid number, got 'fast'",
    "train: {warmup: 1}": "train.warmup: expected at least 0 and less than 1, got 1",
    "train: {steps: null}": "train.steps: expected a valid integer, got None",
    "train: {recomputed_layers: 4}": "train: recomputed_layers needs gradient_checkpointing, which recomputes them",
    "train: {gradient_checkpointing: true, recomputed_layers: 0}":
        "train.recomputed_layers: expected at least 1, got 0",
    "{data: {format: classes, label_column: y}, evaluation: {latency_tokens: 5}}":
        "recipe: evaluation.latency_tokens: where labels are learned no token is written; leave it out",
    "evaluation: {latency_tokens: -1}": "evaluation.latency_tokens: expected at least 0, got -1",
    "generation: {top_p: 0}": "generation.top_p: expected more than 0 and at most 1, got 0",
    "evaluation: {prompts: [1]}": "evaluation.prompts.0: expected a valid string, got 1",
    "evaluation: {metrics: [blue]}":
        "evaluation.metrics.0: expected 'bleu', 'chrf', 'rouge', 'meteor' or 'nist', got 'blue'",
    "evaluation: {bootstrap: 9}": "evaluation.bootstrap: expected at least 100, got 9",
    "- a": "recipe: expected sections such as `prefix:`, got list",
    "a text": "recipe: expected sections such as `prefix:`, got str",
    "prefix: {gate: true, gate: false}": "gate: given twice in the same section; keep one",
    "train: {steps: !!python/name:os.system }": "recipe, line 1: not valid YAML: could not determine a constructor",
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSALS)
def test_a_wrong_recipe_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(text)
    message = str(caught.value)
    assert message.startswith(REFUSALS[text])
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "value"),
    [("5e-3", 5e-3), ("5E3", 5000.0), ("+1e2", 100.0), (".5e1", 5.0), ("2.e-1", 0.2), ("0.25", 0.25), ("3", 3.0)],
)
def test_numbers_are_read_as_people_write_them(text: str, value: float) -> None:
    assert parse_recipe(f"train: {{learning_rate: {text}}}").train.learning_rate == value
    assert parse_recipe("", [f"train.learning_rate={text}"]).train.learning_rate == value


@pytest.mark.parametrize("text", ["e5", "5e", "1e5x", "deep"])
def test_words_stay_words(text: str) -> None:
    assert parse_recipe(f"name: {text}").name == text


def test_an_empty_recipe_is_the_defaults() -> None:
    assert parse_recipe("") == parse_recipe("# nothing\n") == Recipe()
    assert dump_recipe(Recipe(), only_changes=True) == "{}\n"


def test_overrides_reach_every_depth_and_the_last_wins() -> None:
    recipe = parse_recipe(
        "prefix: {num_virtual_tokens: 5}",
        ["prefix.num_virtual_tokens=7", "prefix.num_virtual_tokens=9", "data.split.train=0.40", "data.split.judge=0.45",
         "prefix.layers=[0, 2]", "train.patience=null", "prefix.init.kind=words", "data.prompt=a=b", "data.source=x"],
    )  # fmt: skip
    assert recipe.prefix.num_virtual_tokens == 9
    assert recipe.data.split.train == 0.4
    assert recipe.prefix.layers == [0, 2]
    assert recipe.train.patience is None
    assert recipe.prefix.init.kind is InitKind.WORDS
    assert recipe.data.prompt == "a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("=5", "=5: expected key=value, such as prefix.num_virtual_tokens=50"),
        ("prefix.init.kind.deep=1", "prefix.init.kind.deep: prefix.init.kind is a value, not a section"),
        ("prefix.layers=[1", "prefix.layers, line 1: not valid YAML"),
        ("prefix..gate=true", "prefix.: unknown key"),
    ],
)
def test_a_wrong_override_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe("prefix: {init: {kind: words}}", [override])
    assert str(caught.value).startswith(message)


def test_a_recipe_full_of_odd_values_survives_a_round_trip() -> None:
    values: dict[str, Any] = {
        "name": "vidéo ✓ 5e-3", "description": "a: b # c\n'd' \"e\"\t",
        "prefix": {"placement": ["decoder_self"], "layer_lengths": [0, 3], "dropout": 1e-05},
        "train": {"learning_rate": 1e-300, "schedule": "cosine", "report_to": ["none", "yes"], "patience": None},
        "data": {"label_column": "on", "keep_label": True, "separator": "\n\n", "prompt": "  "},
    }  # fmt: skip
    recipe = Recipe.model_validate(values)
    assert recipe.prefix.placement == [Placement.DECODER_SELF]
    assert recipe.train.schedule is Schedule.COSINE
    for only_changes in (False, True):
        assert parse_recipe(dump_recipe(recipe, only_changes=only_changes)) == recipe
    for text in ("5e-3", "1e5", ".5e1", "+2E3", "3", "0x1f", "yes", "~", "2024-01-01"):
        named = Recipe.model_validate({"name": text, "data": {"prompt": text, "text_column": text}})
        assert parse_recipe(dump_recipe(named)) == named


@pytest.mark.parametrize(
    "setting",
    ["train.max_grad_norm", "train.divergence.norm_ratio", "train.learning_rate", "generation.temperature",
     "prefix.init.std"],
)  # fmt: skip
@pytest.mark.parametrize("value", [".inf", ".nan"])
def test_what_json_cannot_say_is_refused_before_training(setting: str, value: str) -> None:
    """A run that ended in it could neither be recorded nor gone on with."""
    with pytest.raises(ConfigError, match=f"^{setting}: ") as caught:
        parse_recipe("prefix: {init: {kind: random}}", [f"{setting}={value}"])
    assert "finite" in str(caught.value)


@pytest.mark.parametrize("keep", ["'1'", "1", "true", "positive"])
def test_a_label_keeps_the_type_it_was_written_in(keep: str) -> None:
    label = parse_recipe(f"data: {{label_column: y, keep_label: {keep}}}").data.keep_label
    assert label == {"'1'": "1", "1": 1, "true": True, "positive": "positive"}[keep]
    assert type(label) is type({"'1'": "1", "1": 1, "true": True, "positive": "x"}[keep])


def test_a_recipe_file_is_found_by_path_and_refused_if_it_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "mein rezept ü.yaml"
    path.write_text("name: ü\n", encoding="utf-8")
    assert load_recipe(str(path), ["train.seed=0"]).name == "ü"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a UTF-8 text file; a recipe is YAML"):
        recipe_text(str(path))
    with pytest.raises(ConfigError, match="nothing/like/this: no such recipe file; see `prefixkit recipes list`"):
        recipe_text("nothing/like/this")


@pytest.mark.parametrize("name", ["", "a/b", "a\\b", "x" * 121])
def test_a_name_that_is_no_folder_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="^name: expected|^name: String should"):
        Recipe_from(name)


def Recipe_from(name: str) -> Recipe:
    return parse_recipe("", [f"name={name!r}"])


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().train.steps = 3  # type: ignore[misc]
