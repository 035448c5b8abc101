"""Free texts come in turn; inputs are answered once each, and keep all their answers together."""

import pytest

from prefixkit.config import validate_recipe
from prefixkit.data import Example, content_hash
from prefixkit.evaluation.asking import answers_inputs, asked_of
from prefixkit.evaluation.picking import pick


def example(prompt, text, **more):
    return Example(prompt, text, (1, 2), (-100, 2), **more)


TEST = (
    example("inn\n", "It is an inn."),
    example("pub\n", "A pub."),
    example("inn\n", "An inn it is."),
    example("bar\n", "A bar."),
    example("inn\n", "There is an inn."),
)


def make_recipe(kind="input_target", **evaluation):
    return validate_recipe({"data": {"format": kind}, "evaluation": evaluation})


@pytest.mark.parametrize("kind", ["input_target", "messages"])
def test_each_input_is_asked_once_with_all_that_people_answered(kind):
    asked = asked_of(TEST, make_recipe(kind, samples=99, heldout_rows=1))
    assert sorted(asked.prompts) == ["bar\n", "inn\n", "pub\n"]
    answers = dict(zip(asked.prompts, map(sorted, asked.references), strict=True))
    assert answers == {
        "bar\n": ["A bar."],
        "pub\n": ["A pub."],
        "inn\n": ["An inn it is.", "It is an inn.", "There is an inn."],
    }
    assert [person.prompt for person in asked.people] == list(asked.prompts)


def test_which_inputs_are_asked_depends_on_what_they_say_alone():
    recipe = make_recipe(samples=2)
    assert asked_of(TEST, recipe) == asked_of(TEST[::-1], recipe)
    assert asked_of(TEST, recipe).prompts == tuple(sorted(["bar\n", "inn\n", "pub\n"], key=content_hash))[:2]


def test_of_a_conversation_the_reference_is_the_last_reply():
    talk = example("user: Hi user: Why?", "Hello\nBecause.", last_reply="Because.")
    assert asked_of([talk], make_recipe("messages")).references == (("Because.",),)


def test_free_texts_are_asked_for_in_turn_and_have_no_references():
    asked = asked_of(TEST, make_recipe("text", samples=7, heldout_rows=3))
    prompts = list(dict.fromkeys(row.prompt for row in pick(TEST, 3)))
    assert asked.prompts == tuple((prompts * 7)[:7])
    assert asked.people == tuple(pick(TEST, 7))
    assert asked.references == ()


def test_prompts_of_the_recipe_are_no_inputs_with_answers():
    recipe = make_recipe(prompts=["shop\n"], samples=2)
    asked = asked_of(TEST, recipe)
    assert (asked.prompts, asked.references) == (("shop\n", "shop\n"), ())
    assert not answers_inputs(recipe)


def test_without_samples_nothing_is_asked():
    asked = asked_of(TEST, make_recipe(samples=0))
    assert (asked.prompts, asked.people, asked.references) == ((), (), ())


def test_prompts_of_the_recipe_are_asked_as_their_like_was_in_training():
    recipe = make_recipe(prompts=["shop", "bank"], samples=3)
    assert asked_of(TEST, recipe, ask=lambda text: f"{text} ->").prompts == ("shop ->", "bank ->", "shop ->")
