"""A recipe is understood exactly, or refused with the field's path and what to do."""

import subprocess
import sys
from pathlib import Path

import pytest

from prefixkit.config import Recipe, dump_recipe, load_recipe, parse_recipe, recipe_names
from prefixkit.config.section import Section
from prefixkit.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prefix.reparam_depth=5", r"prefix.reparam_depth: expected 0-3, got 5"),
        ("prefix.num_virtual_token=5", 'prefix.num_virtual_token: unknown key; did you mean "num_virtual_tokens"?'),
        ("train.steps=0", "train.steps: expected at least 1, got 0"),
        ("train.steps=1.5", "train.steps: expected a valid integer, got 1.5"),
        ("prefix.init.kind=tex", "prefix.init.kind: expected 'text', 'words'"),
        ("prefix.layers=[1, 1]", "prefix: layers names a layer twice"),
        ("steps", "steps: expected key=value, such as prefix.num_virtual_tokens=50"),
        ("data.split.train=0.9", "data.split: shares must sum to 1"),
        ("name.first=x", "name.first: name is a value, not a section"),
        ("name=..", "name: expected "),
        ("data.max_rows=few", "data.max_rows: expected a valid integer, got 'few'"),
        ("data.label_column=null", "data: keep_label needs label_column"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_path(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("positive-reviews", [override])
    assert str(caught.value).startswith(message.replace("\\", ""))


def test_numbers_with_exponents_are_numbers() -> None:
    assert parse_recipe("train: {learning_rate: 5e-3}").train.learning_rate == 0.005


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("data.prompt=Review:", "data", "prompt", "Review:"),
        ("data.prompt=Review #1", "data", "prompt", "Review #1"),
        ('data.prompt="Review: "', "data", "prompt", "Review: "),
        ("data.separator= -> ", "data", "separator", " -> "),
        ("data.separator=", "data", "separator", ""),
        ("data.keep_label=yes", "data", "keep_label", "yes"),
        ("evaluation.instruction=Write this: that.", "evaluation", "instruction", "Write this: that."),
        ("evaluation.instruction=null", "evaluation", "instruction", None),
        ("model.dtype=float32", "model", "dtype", "float32"),
        ("evaluation.prompts=[a, b]", "evaluation", "prompts", ["a", "b"]),
    ],
)
def test_overrides_of_text_are_taken_as_typed(override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(load_recipe("positive-reviews", [override]), section), key) == value


def test_an_empty_section_is_no_section() -> None:
    assert parse_recipe("prefix:\ntrain: {steps: 3}").train.steps == 3
    assert parse_recipe("prefix:\n", ["prefix.num_virtual_tokens=3"]).prefix.num_virtual_tokens == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prefix.init.path=runs/first"],
         "prefix.init.path: is of a start of kind prefix, and prefix.init.kind is text"),
        (["prefix.init.kind=words", "prefix.init.text=the film"],
         "prefix.init.text: is of a start of kind text, and prefix.init.kind is words"),
        (["prefix.init.std=0.5"], "prefix.init.std: is of a start of kind random, and prefix.init.kind is text"),
        (["prefix.reparam_width=64"], "prefix.reparam_width: is of the MLP, and prefix.reparam_depth is 0"),
        (["prefix.reparam_activation=gelu"], "prefix.reparam_activation: is of the MLP, and prefix.reparam_depth is 0"),
        (["prefix.layer_lengths=[5, 0]", "prefix.num_virtual_tokens=50"],
         "prefix.num_virtual_tokens: prefix.layer_lengths says how long each layer's is; leave one of the two out"),
        (["head.pooling=mean"], "head.pooling: is of labels (data.format=classes or tags), and data.format is text"),
        (["train.divergence.action=stop", "train.divergence.max_rollbacks=5"],
         "train.divergence.max_rollbacks: is of action rollback, and train.divergence.action is stop"),
    ],
)  # fmt: skip
def test_a_setting_that_nothing_would_read_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe("", overrides)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "overrides",
    [["prefix.init.kind=random", "prefix.init.std=0.5"], ["prefix.reparam_depth=1", "prefix.reparam_width=64"],
     ["prefix.init.kind=words", "prefix.init.text=null"],
     ["data.format=classes", "data.label_column=l", "head.pooling=mean"], ["train.divergence.max_rollbacks=5"]],
)  # fmt: skip
def test_a_setting_that_is_read_is_taken(overrides: list[str]) -> None:
    parse_recipe("", overrides)


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="steps: given twice in the same section; keep one"):
        parse_recipe("train:\n  steps: 1\n  steps: 2\n")


def test_what_is_no_yaml_is_refused_with_its_line() -> None:
    with pytest.raises(ConfigError, match="recipe, line 3: not valid YAML"):
        parse_recipe("train:\n  steps: [1\n")


def test_an_unknown_recipe_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match='no such recipe file; did you mean "positive-reviews"'):
        load_recipe("positive-review")


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_hold_only_what_differs_and_survive_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_recipe(dump_recipe(recipe)) == recipe
    assert parse_recipe(dump_recipe(recipe, only_changes=True)) == recipe
    assert load_recipe(f"recipes/{name}.yaml") == recipe
    written = parse_recipe((Path(__file__).parents[2] / "src/prefixkit/recipes" / f"{name}.yaml").read_text())
    assert written == recipe


def test_every_setting_is_described() -> None:
    def check(section: type[Section]) -> None:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                check(field.annotation)

    check(Recipe)


def test_settings_do_not_import_torch() -> None:
    code = "import sys, prefixkit.config; print('torch' in sys.modules or 'transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
