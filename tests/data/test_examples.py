"""What the model reads, and where it has loss."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from prefixkit.config import DataConfig, Format
from prefixkit.data import NO_LOSS, Example, Message, Row, ask, build_examples
from prefixkit.data.clean import clean_row
from prefixkit.errors import DataError

TEXT = "I loved this film, it was wonderful"
TALK = (
    Message("system", "Hello there"),
    Message("user", "What is your name?"),
    Message("assistant", "My name is Ada."),
    Message("user", "was it good?"),
    Message("assistant", "it was good"),
    Message("user", "Hello"),
)
STABLE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{%- generation -%}{{ m.content }}{{ eos_token }}{%- endgeneration -%}"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
UNSTABLE = "{{ messages | length }} turns{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def config(**settings: Any) -> DataConfig:
    return DataConfig(**({"max_tokens": 512} | settings))


def one(row: Row, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Example:
    (example,) = build_examples([row], config(**settings), tokenizer).examples
    return example


def learned(example: Example) -> list[int]:
    assert len(example.labels) == len(example.input_ids)
    pairs = zip(example.input_ids, example.labels, strict=True)
    assert all(label in (NO_LOSS, token) for token, label in pairs)
    return [label for label in example.labels if label != NO_LOSS]


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize("prompt", ["Review:", "Review: ", "Review:\n", "The mov"])
def test_example_begins_with_the_prompts_own_ids_without_loss(
    any_tokenizer: PreTrainedTokenizerFast, prompt: str
) -> None:
    example = one(Row(1, text=TEXT), any_tokenizer, prompt=prompt)
    begin = any_tokenizer(prompt)["input_ids"]
    assert list(example.input_ids[: len(begin)]) == begin
    assert set(example.labels[: len(begin)]) == {NO_LOSS}
    assert learned(example) == list(example.input_ids[len(begin) :])
    assert (example.prompt, example.text) == (prompt, TEXT)


def test_prompt_and_text_are_joined_by_one_space(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    for prompt, joined in (("Review:", f"Review: {TEXT}"), ("Review:\n", f"Review:\n{TEXT}"), ("", TEXT)):
        example = one(Row(1, text=TEXT), bytes_tokenizer, prompt=prompt)
        assert bytes_tokenizer.decode(example.input_ids) == f"{joined}<eos>"


def test_text_that_fits_ends_in_eos_with_loss_and_a_cut_one_does_not(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    whole = one(Row(1, text=TEXT), bytes_tokenizer)
    assert whole.labels[-1] == bytes_tokenizer.eos_token_id
    length = len(whole.input_ids)
    exact = build_examples([Row(1, text=TEXT)], config(max_tokens=length), bytes_tokenizer)
    assert exact.examples == (whole,)
    assert exact.truncated == 0
    cut = build_examples([Row(1, text=TEXT)], config(max_tokens=length - 1), bytes_tokenizer)
    assert cut.examples[0].input_ids == whole.input_ids[:-1]
    assert cut.truncated == 1


def test_first_token_has_loss_only_behind_a_bos(
    bytes_tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = one(Row(1, text=TEXT), bytes_tokenizer)
    assert plain.labels == (NO_LOSS, *plain.input_ids[1:])
    begun = one(Row(1, text=TEXT), bos_tokenizer)
    assert begun.input_ids[0] == bos_tokenizer.bos_token_id
    assert begun.labels == (NO_LOSS, *begun.input_ids[1:])
    assert begun.loss_tokens == plain.loss_tokens + 1


def test_pair_has_loss_on_its_target_only(any_tokenizer: PreTrainedTokenizerFast) -> None:
    row = Row(1, input="What is this film", target="a good one")
    example = one(row, any_tokenizer, format=Format.INPUT_TARGET)
    begin = any_tokenizer("What is this film\n")["input_ids"]
    assert example.prompt == "What is this film\n"
    assert list(example.input_ids[: len(begin)]) == begin
    assert learned(example) == list(example.input_ids[len(begin) :])
    assert learned(example)[-1] == any_tokenizer.eos_token_id
    assert "good" in any_tokenizer.decode(learned(example))


def test_what_answers_an_input_is_its_whole_target(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    cut = one(Row(1, input="Hello", target=TEXT), bytes_tokenizer, format=Format.INPUT_TARGET, max_tokens=9)
    assert cut.answer == TEXT


def test_longer_row_is_an_error_when_nothing_may_be_cut(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    length = len(one(Row(7, text=TEXT), bytes_tokenizer).input_ids)
    with pytest.raises(DataError) as caught:
        one(Row(7, text=TEXT), bytes_tokenizer, max_tokens=8, truncate=False)
    assert str(caught.value) == (
        f"row 7: {length} tokens, more than data.max_tokens (8); raise it, or set data.truncate to true "
        "to cut longer rows"
    )


def test_row_whose_learned_part_is_cut_away_is_counted_out(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [Row(1, input=TEXT, target="good"), Row(2, input="I", target="good")]
    built = build_examples(rows, config(format=Format.INPUT_TARGET, max_tokens=6), bytes_tokenizer)
    assert [example.prompt for example in built.examples] == ["I\n"]
    assert built.without_loss == 1


@pytest.mark.parametrize("template", [STABLE, MARKED])
@pytest.mark.parametrize("name", ["bytes_tokenizer", "bos_tokenizer"])
def test_conversation_has_loss_on_the_assistants_turns_only(
    request: pytest.FixtureRequest, name: str, template: str
) -> None:
    tokenizer = with_template(request.getfixturevalue(name), template)
    example = one(Row(1, messages=TALK), tokenizer, format=Format.MESSAGES)
    assert example.answer == "it was good"  # what follows the prompt, of two replies that are learned
    assert tokenizer.decode(learned(example)) == "My name is Ada.<eos>it was good<eos>"
    assert example.text == "My name is Ada.\nit was good"
    assert example.prompt.endswith("was it good?<eos>\n<assistant>")
    begin = tokenizer(example.prompt)["input_ids"]
    assert list(example.input_ids[: len(begin)]) == begin
    assert list(example.input_ids).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", [STABLE, MARKED])
def test_a_conversation_has_the_tokenizers_bos_where_its_template_writes_none(
    bos_tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    """As TinyLlama's: what generation reads of the prompt is what the example begins with."""
    tokenizer = with_template(bos_tokenizer, template.removeprefix("{{ bos_token }}"))
    example = one(Row(1, messages=TALK), tokenizer, format=Format.MESSAGES)
    begin = tokenizer(example.prompt)["input_ids"]
    assert begin[0] == tokenizer.bos_token_id
    assert list(example.input_ids[: len(begin)]) == begin
    assert tokenizer.decode(learned(example)) == "My name is Ada.<eos>it was good<eos>"


@pytest.mark.parametrize("template", [STABLE, MARKED])
def test_a_template_that_writes_the_date_writes_the_same_one_every_day(
    bytes_tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    """As Llama 3's does: data would be others the next day, and a prefix meet a system prompt it never saw."""
    tokenizer = with_template(bytes_tokenizer, "{{ strftime_now('%d %b %Y %H:%M:%S.%f') }}" + template)
    example = one(Row(1, messages=TALK), tokenizer, format=Format.MESSAGES)
    assert example.prompt.startswith("26 Jul 2024 00:00:00.000000")
    assert ask("Hello", config(format=Format.MESSAGES), tokenizer).startswith("26 Jul 2024 00:00:00.000000")


@pytest.mark.parametrize("format_", [Format.INPUT_TARGET, Format.MESSAGES])
@pytest.mark.parametrize("cleans", [True, False])
def test_what_a_person_asks_is_cleaned_as_the_data_were(
    bos_tokenizer: PreTrainedTokenizerFast, format_: Format, cleans: bool
) -> None:
    tokenizer = with_template(bos_tokenizer, STABLE)
    given = "it was<br />\n good &amp;  wonderful"
    settings = config(format=format_, clean_html=cleans)
    row = Row(1, input=given, target="good")
    if format_ is Format.MESSAGES:
        row = Row(1, messages=(Message("user", given), Message("assistant", "good")))
    (example,) = build_examples([clean_row(row) if cleans else row], settings, tokenizer).examples
    assert ask(given, settings, tokenizer) == example.prompt
    assert ("it was good & wonderful" in example.prompt) == cleans


def test_both_ways_of_finding_turns_agree(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    talk = Row(1, messages=TALK)
    stable = one(talk, with_template(bytes_tokenizer, STABLE), format=Format.MESSAGES)
    marked = one(talk, with_template(bytes_tokenizer, MARKED), format=Format.MESSAGES)
    assert stable == marked


def test_unstable_template_is_refused(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError) as caught:
        one(Row(3, messages=TALK), with_template(bytes_tokenizer, UNSTABLE), format=Format.MESSAGES)
    assert str(caught.value) == (
        "row 3: the chat template is not prefix-stable: with message 3 it changes what stands before; "
        "mark the assistant's turns in it with {% generation %}, or use format input_target"
    )


@pytest.mark.parametrize("mark", ["", "{% generation %}{% endgeneration %}"])
def test_refusal_of_the_template_is_passed_on(bytes_tokenizer: PreTrainedTokenizerFast, mark: str) -> None:
    template = mark + "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"^row 2: the chat template refuses this conversation: roles must alternate$"):
        one(Row(2, messages=TALK), with_template(bytes_tokenizer, template), format=Format.MESSAGES)


@pytest.mark.parametrize("call", ["strftime_now(day)", "strftime_now('%d' ~ '%b')", 'strftime_now(format="%d")'])
def test_a_template_whose_date_cannot_be_held_is_refused(bytes_tokenizer: PreTrainedTokenizerFast, call: str) -> None:
    tokenizer = with_template(bytes_tokenizer, "{% set day = '%d' %}{{ " + call + " }}" + STABLE)
    with pytest.raises(
        DataError, match="writes the date in a format that is not spelled out, so a prefix would meet oth"
    ):
        one(Row(1, messages=TALK), tokenizer, format=Format.MESSAGES)


def test_a_tokenizer_with_templates_of_which_none_is_the_default_is_refused(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    several = copy.deepcopy(bytes_tokenizer)
    several.chat_template = {"rag": STABLE, "tools": STABLE}  # type: ignore[assignment]
    with pytest.raises(
        DataError, match="has 2 chat templates, and none of them is called default; set tokenizer.chat_"
    ):
        one(Row(1, messages=TALK), several, format=Format.MESSAGES)


def test_tokenizer_without_template_is_refused(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError) as caught:
        one(Row(1, messages=TALK), bytes_tokenizer, format=Format.MESSAGES)
    assert str(caught.value) == (
        "data.format: messages needs a chat template, and the tokenizer of this base model has none; use an "
        "instruction-tuned model, or format text or input_target"
    )


def test_conversation_opened_by_the_assistant_is_learned(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    talk: Sequence[Message] = (Message("assistant", "Hello"), Message("user", "good"))
    row = Row(1, messages=tuple(talk))
    example = one(row, with_template(bytes_tokenizer, STABLE), format=Format.MESSAGES)
    assert bytes_tokenizer.decode(learned(example)).endswith("Hello<eos>")
    assert example.prompt == ""
