"""A study file is understood exactly, or refused with the field's path and what to do."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from prefixkit.config import ArmConfig, Size, arm_recipe, load_study, size_settings, study_names
from prefixkit.errors import ConfigError
from prefixkit.lab.study.plan import plan_study

PLAIN: dict[str, Any] = {
    "name": "mine",
    "title": "Mine",
    "question": "Which?",
    "arms": [{"name": "a", "settings": {"prefix.num_virtual_tokens": 5}}, {"name": "b"}],
}
CLAIM = {"source": "somebody", "says": "a beats b", "test": "better", "arms": ["a", "b"]}


def written(path: Path, **changes: Any) -> str:
    path = path / "mine.yaml"
    path.write_text(yaml.safe_dump({**PLAIN, **changes}), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": [1]}, 'rate: unknown key; did you mean "rates"?'),
        (
            {"arms": [{"name": "a", "setings": {}}, {"name": "b"}]},
            'arms.0.setings: unknown key; did you mean "settings"?',
        ),
        ({"claims": [CLAIM | {"mesure": "x"}]}, 'claims.0.mesure: unknown key; did you mean "measure"?'),
        ({"claims": [CLAIM | {"test": "best"}]}, "claims.0.test: expected 'better', 'ordered'"),
        ({"claims": [CLAIM | {"arms": ["a"]}]}, "claims.0: test better needs 2 arms, got 1"),
        (
            {"claims": [CLAIM | {"test": "ordered", "arms": ["a"]}]},
            "claims.0: test ordered needs at least 2 arms",
        ),
        ({"claims": [CLAIM | {"low": 0.1}]}, "claims.0: test better reads neither low nor high; leave them out"),
        ({"claims": [CLAIM | {"test": "ratio"}]}, "claims.0: test ratio needs low, high or both"),
        ({"claims": [CLAIM | {"test": "ratio", "low": 2, "high": 1}]}, "claims.0: low (2) is above high (1)"),
        ({"claims": [CLAIM | {"test": "ratio", "low": float("nan")}]}, "claims.0.low: expected a finite number"),
        (
            {"claims": [CLAIM | {"test": "ordered", "margin": 1}]},
            "claims.0: margin is for test better",
        ),
        ({"rates": [1, 1]}, "study: rates names a factor twice: [1.0, 1.0]"),
        ({"rates": [float("inf"), 1]}, "rates.0: expected a finite number"),
        (
            {"arms": [{"name": "a {}"}, {"name": "b"}]},
            "study: arm a {}: {} stands for each of `each`",
        ),
        ({"claims": [{"source": "s", "says": "x", "test": "none"}]}, "claims.0: test none needs why"),
        (
            {"claims": [CLAIM | {"arms": ["a", "c"]}]},
            'study: "c" is claimed about, but no arm is called so; arms: a, b',
        ),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, 'study: arms: two are called "a"; give each its own name'),
        ({"arms": [{"name": "a"}]}, "study: arms: there is nothing to compare, expected at least 2, got 1"),
        ({"rates": [0]}, "rates.0: expected greater than 0, got 0"),
        ({"seeds": 0}, "seeds: expected at least 1, got 0"),
        ({"title": None}, "title: is missing"),
    ],
)
def test_a_wrong_study_is_refused_with_its_path(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_an_unknown_study_is_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match='lenght: no such study file; did you mean "length"?'):
        load_study("lenght")


def test_each_stands_for_several_arms() -> None:
    arm = ArmConfig(
        name="{} tokens", each=[5, 10], settings={"prefix.num_virtual_tokens": "{}", "prefix.layers": "[{}]"}
    )
    first, second = arm.expanded()
    assert (first.name, first.x, first.settings) == (
        "5 tokens", 5.0, {"prefix.num_virtual_tokens": 5, "prefix.layers": "[5]"}
    )  # fmt: skip
    assert (second.name, second.x) == ("10 tokens", 10.0)


def test_settings_go_from_size_to_study_to_arm_to_the_command_line(tmp_path: Path) -> None:
    study = load_study(written(tmp_path, settings={"train.steps": 7, "train.batch_size": 3}))
    arm = study.arms[0]
    recipe = arm_recipe(study, arm, size=Size.TINY)
    assert recipe.data.max_tokens == size_settings(Size.TINY)["data.max_tokens"]
    assert (recipe.train.steps, recipe.train.batch_size, recipe.prefix.num_virtual_tokens) == (7, 3, 5)
    recipe = arm_recipe(study, arm, size=Size.TINY, overrides=["prefix.num_virtual_tokens=9"])
    assert recipe.prefix.num_virtual_tokens == 9


def test_a_section_written_as_one_wipes_no_other_key_of_it(tmp_path: Path) -> None:
    study = load_study(written(tmp_path, settings={"prefix": {"num_virtual_tokens": 7, "init": {"scaled": False}}}))
    recipe = arm_recipe(study, study.arms[1], size=Size.TINY)
    assert (recipe.prefix.num_virtual_tokens, recipe.prefix.init.scaled) == (7, False)
    assert recipe.prefix.init.text is not None


def test_a_wrong_setting_names_study_and_arm(tmp_path: Path) -> None:
    study = load_study(written(tmp_path, arms=[{"name": "a", "settings": {"prefix.lenght": 3}}, {"name": "b"}]))
    with pytest.raises(ConfigError, match="study mine, arm a: prefix.lenght: unknown key"):
        arm_recipe(study, study.arms[0], size=Size.TINY)


def test_an_arm_is_spared_what_its_method_does_not_read_but_not_its_own(tmp_path: Path) -> None:
    lora = {"method": "lora"}
    arms = [{"name": "a", "settings": lora}, {"name": "b", "settings": lora | {"prefix.gate": True}}]
    study = load_study(written(tmp_path, settings={"prefix.num_virtual_tokens": 7}, arms=arms))
    assert arm_recipe(study, study.arms[0], size=Size.TINY).prefix.num_virtual_tokens == 20
    with pytest.raises(ConfigError, match="study mine, arm b: prefix.gate: no prefix is trained with method lora"):
        arm_recipe(study, study.arms[1], size=Size.TINY)


def test_claims_that_name_no_measure_are_about_the_studys_own(tmp_path: Path) -> None:
    claims = [CLAIM, CLAIM | {"measure": "rouge_l"}]
    assert [each.measure for each in load_study(written(tmp_path, measure="bleu", claims=claims)).claims] == [
        "bleu",
        "rouge_l",
    ]
    assert [each.measure for each in load_study(written(tmp_path, claims=claims)).claims] == ["heldout_nll", "rouge_l"]
    measures = {claim.says: claim.measure for claim in load_study("data-to-text").claims}
    assert measures["A prefix's BLEU is behind LoRA's by no more than 0.3."] == "bleu"
    assert measures["So it does by the loss of unseen sentences."] == "heldout_nll"


@pytest.mark.parametrize("name", study_names())
@pytest.mark.parametrize("size", Size)
def test_shipped_studies_are_right(name: str, size: Size, tmp_path: Path) -> None:
    study = load_study(name)
    assert study.name == name
    arms = study.expanded_arms()
    made = {(arm_recipe(study, arm, size=size).model_dump_json(), str(arm.rates)) for arm in arms}
    assert len(made) == len(arms)
    plan_study(study, tmp_path, size=size)  # its measures exist, and have a direction where they are compared
    assert study.seeds >= 3 or not any(claim.arms for claim in study.claims) or study.subsets * study.seeds >= 3
