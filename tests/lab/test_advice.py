"""Advice follows what the studies found, says which, and says where it does not know."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from made_up import arm, outcome, result
from prefixkit.cli.main import app
from prefixkit.config import Recipe, load_recipe
from prefixkit.errors import ConfigError
from prefixkit.lab.advice import Looked, advise, caveats, look_at, rules_of_thumb
from prefixkit.lab.run.loading import load_for
from prefixkit.lab.study.found import FoundArm, FoundStudy, read_found, summarise, write_found
from prefixkit.lab.study.results import ArmResult

LOOKED = Looked(rows=100, tokens=30.0, loss=4.0, words=0.5)
BEST = (0.0, 0.0, 0.0)


def found_arm(name: str, mean: float, behind: tuple[float, float, float] | None, **details: Any) -> FoundArm:
    known: dict[str, Any] = {"x": None, "settings": {}, "rates": {"train.learning_rate": 0.02}, "is_scaled": True}
    return FoundArm(name=name, mean=mean, behind=behind, **known | details)


def study(name: str, *arms: FoundArm) -> FoundStudy:
    return FoundStudy(name, "teaching", "positive-reviews", "text", 40, 3.97, arms)


LENGTHS = study(
    "length",
    found_arm("5 tokens", 3.90, (0.05, 0.03, 0.07), x=5.0),
    found_arm("10 tokens", 3.86, (0.005, -0.008, 0.018), x=10.0, rates={"train.learning_rate": 0.03}),
    found_arm("50 tokens", 3.85, BEST, x=50.0),
    found_arm("full fine-tuning", 3.80, (-0.05, -0.06, -0.04)),
)


def values(found: list[FoundStudy]) -> dict[str, object]:
    return {each.setting: each.value for each in advise(Recipe(), LOOKED, found)}


def test_the_shortest_length_that_is_not_behind_is_advised_with_its_own_rate() -> None:
    advice = {each.setting: each for each in advise(Recipe(), LOOKED, [LENGTHS])}
    length = advice["prefix.num_virtual_tokens"]
    assert (length.value, length.study) == (10, "length")
    assert length.why.endswith("does as well as the best, 50 tokens: +0.005 [-0.008, +0.018] nats per token")
    assert advice["train.learning_rate"].value == 0.03
    units = advice["prefix.init.scaled"]  # the rate would mean something else without them
    assert (units.value, units.why) == (True, "what that rate was found in: each layer's own size")


def test_a_study_that_does_not_tell_lengths_apart_advises_none() -> None:
    """Neither the least mean, which may be the longest by chance, nor the shortest, which may be behind."""
    noisy = study(
        "length", found_arm("5 tokens", 3.9, (0.016, -0.022, 0.053), x=5.0), found_arm("10", 3.88, BEST, x=10.0)
    )
    length = advise(Recipe(), LOOKED, [noisy])[0]
    assert (length.value, length.study) == (Recipe().prefix.num_virtual_tokens, None)
    assert length.why.endswith(
        "; length does not tell 5 tokens from the best, 10: +0.016 [-0.022, +0.053] nats per token"
    )


def test_what_the_recipe_does_not_read_is_not_advised() -> None:
    lengths = load_recipe("positive-reviews", ["prefix.layer_lengths=[5,5]"])
    assert "prefix.num_virtual_tokens" not in {each.setting for each in advise(lengths, LOOKED, [LENGTHS])}


def test_studies_of_texts_say_nothing_of_the_start_and_the_depth_for_labels() -> None:
    starts = study("init", found_arm("words", 3.9, BEST, settings={"prefix.init.kind": "words"}))
    for each in advise(load_recipe("review-sentiment"), LOOKED, [LENGTHS, starts]):
        assert each.study is None
        assert each.why.endswith("no published study varies it on data of this kind")


def test_through_an_mlp_the_rate_is_that_of_its_depth() -> None:
    depths = study(
        "reparameterisation",
        found_arm("no MLP", 3.9, (0.03, 0.01, 0.05), x=0.0, settings={"prefix.reparam_depth": 0}),
        found_arm(
            "depth 2", 3.87, BEST, x=2.0, settings={"prefix.reparam_depth": 2}, rates={"train.learning_rate": 0.001}
        ),
    )
    advice = {each.setting: each for each in advise(Recipe(), LOOKED, [LENGTHS, depths])}
    assert (advice["prefix.reparam_depth"].value, advice["prefix.num_virtual_tokens"].value) == (2, 10)
    rate = advice["train.learning_rate"]
    assert (rate.value, rate.study) == (0.001, "reparameterisation")
    deep = load_recipe("positive-reviews", ["prefix.reparam_depth=3"])  # as the recipe has it; no study of depths
    rate = next(each for each in advise(deep, LOOKED, [LENGTHS]) if each.setting == "train.learning_rate")
    assert (rate.value, rate.study) == (0.01, None)
    assert rate.why.endswith("no published study varies it through an MLP of depth 3")


def test_a_rate_in_units_is_not_advised_for_a_start_that_has_none() -> None:
    plain = Recipe.model_validate({"prefix": {"init": {"kind": "random"}}})
    length, rate, depth, start = advise(plain, LOOKED, [LENGTHS])
    assert (length.study, rate.study, depth.study, start.value) == ("length", None, None, "random")
    assert rate.value == plain.train.learning_rate
    assert rate.why.endswith("no published study varies it from a start of kind random")


def test_a_length_that_was_not_compared_is_not_advised_as_good() -> None:
    lengths = study("length", found_arm("5 tokens", 3.86, None, x=5.0), found_arm("50 tokens", 3.85, BEST, x=50.0))
    assert advise(Recipe(), LOOKED, [lengths])[0].study is None
    assert rules_of_thumb([study("length", found_arm("10 tokens", 3.9, None, x=10.0))])[0].endswith(
        "10 tokens, beside the best: not compared with it"
    )


def test_the_best_is_advised_where_all_others_are_behind() -> None:
    lengths = study("length", LENGTHS.arms[0], found_arm("50 tokens", 3.85, BEST, x=50.0))
    assert values([lengths])["prefix.num_virtual_tokens"] == 50


def test_the_shallowest_depth_and_the_best_start_are_advised_where_they_are_as_good() -> None:
    depths = study(
        "reparameterisation",
        found_arm("no MLP", 3.9, (0.005, -0.008, 0.018), x=0.0, settings={"prefix.reparam_depth": 0}),
        found_arm("depth 2", 3.89, BEST, x=2.0, settings={"prefix.reparam_depth": 2}),
        found_arm(
            "plain", 3.8, (-0.09, -0.1, -0.08), settings={"prefix.reparam_depth": 2, "prefix.init.orthogonal": False}
        ),
    )
    starts = study(
        "init",
        found_arm("random", 4.9, (1.0, 0.9, 1.1), settings={"prefix.init.kind": "random"}),
        found_arm("words", 3.9, BEST, settings={"prefix.init.kind": "words"}),
    )
    advice = values([depths, starts])
    assert advice["prefix.reparam_depth"] == 0
    assert advice["prefix.init.kind"] == "words"
    many = advise(Recipe(), Looked(5000, 30.0, 4.0, 0.5), [starts])[-1]
    assert many.why == "words ends at 3.900, random at 4.900 (with 64 rows; here there are 5,000)"


def test_without_a_study_the_recipe_stands_and_says_so() -> None:
    for each in advise(load_recipe("gpt2-imdb"), LOOKED, []):
        assert each.study is None
        at = " through an MLP of depth 2" if each.setting == "train.learning_rate" else " on data of this kind"
        assert each.why.removesuffix(at) == "what gpt2-imdb sets; no published study varies it"
    assert caveats(Recipe(), LOOKED, []) == ["no study is published yet: everything is a default"]


def test_what_is_unlike_the_studies_is_said() -> None:
    found = [LENGTHS]
    assert len(caveats(Recipe(), LOOKED, found)) == 1
    _, surprise, length = caveats(Recipe(), Looked(100, 200.0, 2.0, 0.5), found)
    assert surprise == (
        "the base model is less surprised by these texts (2.00 nats per token) than by the studies' (3.97)"
    )
    assert length == "a row teaches 200 tokens, the studies' rows at most 40"
    labels = load_recipe("review-sentiment")
    assert caveats(labels, replace(LOOKED, loss=None), found) == [
        "no study of lengths is about such data (data.format=classes)"
    ]
    assert advise(labels, LOOKED, found)[0].why == (
        "what review-sentiment sets; no published study varies it on data of this kind"
    )


def test_data_of_another_kind_is_advised_by_the_study_of_that_kind() -> None:
    answers = replace(
        study("tasks", found_arm("headlines, 20 tokens", 3.0, BEST, x=20.0)),
        recipe="bbc-headlines",
        format="input_target",
    )
    found, headlines = [LENGTHS, answers], load_recipe("bbc-headlines")
    length, rate, *_ = advise(headlines, LOOKED, found)
    assert (length.value, length.study) == (20, "tasks")
    assert rate.study == "tasks"
    assert "few tasks, here bbc-headlines; their rates" in caveats(headlines, LOOKED, found)[0]
    chat = load_recipe("small-talk")
    assert advise(chat, LOOKED, found)[0].study is None
    assert caveats(chat, LOOKED, found) == ["no study of lengths is about such data (data.format=messages)"]


def test_the_rules_of_thumb_are_tested_not_repeated() -> None:
    simple, content, several = rules_of_thumb([LENGTHS])
    assert simple == (
        "10-15 virtual tokens for a simple style: positive-reviews, 10 tokens, beside the best: "
        "+0.005 [-0.008, +0.018] nats per token"
    )
    assert content == "20-30 virtual tokens for complex content: not tested"
    assert several == "30+ virtual tokens for several attributes at once: not tested"
    both = found_arm("both", 3.9, (0.04, 0.02, 0.06), settings={"data.learn_also": ["negative"]})
    assert rules_of_thumb([LENGTHS, study("sharing", found_arm("alone", 3.86, BEST), both)])[2] == (
        "30+ virtual tokens for several attributes at once: positive-reviews, both: 3.900 nats per token"
    )
    assert [line.rpartition(": ")[2] for line in rules_of_thumb([])] == ["not tested"] * 3


def test_studies_are_shipped_in_short(tmp_path: Path) -> None:
    losses = {"a": (3.0, 3.1, 3.05), "b": (3.3, 3.4, 3.35)}
    arms = [arm(name, [], outcomes=[outcome({"heldout_nll": loss}) for loss in each]) for name, each in losses.items()]
    made = result(arms, [])
    (short,) = summarise(made)
    assert (short.recipe, short.format, short.tokens) == ("positive-reviews", "text", 40)
    assert short.arms[0].behind == BEST
    assert short.arms[1].behind == pytest.approx((0.3, 0.3, 0.3))
    assert not short.arms[1].is_as_good
    assert short.arms[0].is_scaled  # positive-reviews is
    write_found([made], tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())[0]["arms"][1]["mean"] == pytest.approx(3.35)
    assert all(isinstance(each, FoundStudy) for each in read_found())


def test_a_study_of_several_recipes_is_shipped_one_by_one() -> None:
    def of(name: str, recipe: str, loss: float | None, base: float | None = None) -> ArmResult:
        values = {} if loss is None else {"heldout_nll": loss}
        others = {} if base is None else {"base.heldout_nll": base}
        return replace(arm(name, [], outcomes=[outcome(values, others=others)] * 3), recipe=recipe)

    arms = [
        of("reviews", "positive-reviews", 4.0, base=4.5),
        of("headlines", "bbc-headlines", 3.0, base=3.5),
        of("reviews, more", "positive-reviews", 3.9),
        of("nothing", "small-talk", None),
    ]
    arms[1] = replace(arms[1], format="input_target", tokens=96)
    reviews, headlines = summarise(result(arms, []))
    assert [each.name for each in reviews.arms] == ["reviews", "reviews, more"]
    assert (reviews.arms[1].behind, reviews.base_loss) == (BEST, 4.5)
    assert (headlines.recipe, headlines.format, headlines.tokens) == ("bbc-headlines", "input_target", 96)
    assert headlines.base_loss == 3.5
    assert headlines.arms[0].behind == BEST


def test_arms_of_an_axis_are_held_against_its_best_and_lucky_ones_left_out() -> None:
    def of(name: str, loss: float, **details: Any) -> ArmResult:
        return arm(name, [loss - 0.001, loss, loss + 0.001], **details)

    diverged = outcome({"diverged": 1.0}, error="diverged")
    lucky = arm("20", [], outcomes=[outcome({"heldout_nll": 3.0}), diverged, diverged], x=20.0)
    once = arm("30", [3.85], x=30.0)
    (short,) = summarise(result([of("5", 4.0, x=5.0), of("10", 3.9, x=10.0), lucky, once, of("full", 3.5)], []))
    assert [each.name for each in short.arms] == ["5", "10", "30", "full"]
    assert [each.behind and round(each.behind[0], 3) for each in short.arms] == [None, None, 0.0, None]
    (short,) = summarise(result([of("5", 4.0, x=5.0), of("10", 3.9, x=10.0), lucky, of("full", 3.5)], []))
    assert [each.behind and round(each.behind[0], 3) for each in short.arms] == [0.1, 0.0, -0.4]


def test_data_is_looked_at(recipe: Recipe) -> None:
    base, data = load_for(recipe)
    looked = look_at(base, data)
    assert looked.rows == len(data.train)
    assert looked.loss is not None
    assert 0 < looked.words < 1
    assert looked.tokens == sum(example.loss_tokens for example in data.train) / len(data.train)


def test_the_command_advises_on_a_file_and_writes_a_recipe(reviews: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    options = ["--task", "style", "--data", str(reviews), "--out", str(out), f"model.base={tiny_llama_dir}"]
    done = CliRunner().invoke(app, ["advise", *options])
    assert done.exit_code == 0, done.output
    assert "prefix.num_virtual_tokens=" in done.output
    assert load_recipe(str(out)).data.source == str(reviews)
    again = CliRunner().invoke(app, ["advise", *options])
    assert str(again.exception) == f"{out}: exists already; choose another --out"


def test_advice_for_a_method_without_a_prefix_is_refused_before_anything_is_read() -> None:
    done = CliRunner().invoke(app, ["advise", "positive-reviews", "method=lora"])
    assert str(done.exception) == "advise: the studies behind it are of prefixes, and method is lora; leave method out"


def test_advice_on_nothing_is_refused() -> None:
    done = CliRunner().invoke(app, ["advise"])
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception) == "advise: name a recipe, or give --task and --data"
