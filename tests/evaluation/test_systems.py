"""The systems: what each is asked and scored on."""

import dataclasses

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from prefixkit.data import Example
from prefixkit.evaluation import System, SystemName
from prefixkit.evaluation.systems import systems_to_compare


def test_the_instruction_is_a_baseline_only_where_there_is_one(prefix):
    names = [system.name for system in systems_to_compare(prefix, None)]
    assert names == [SystemName.PREFIX, SystemName.BASE]
    systems = systems_to_compare(prefix, "write a review .")
    assert [(system.key, system.prefix is prefix, system.instruction) for system in systems] == [
        ("", True, None),
        ("base.", False, None),
        ("instruction.", False, "write a review ."),
    ]


def test_the_instruction_stands_on_a_line_of_its_own(prefix):
    with_prefix, base, instruction = systems_to_compare(prefix, "write a review .")
    assert with_prefix.prompts(["review :"]) == base.prompts(["review :"]) == ["review :"]
    assert instruction.prompts(["review :", ""]) == ["write a review .\nreview :", "write a review .\n"]


def test_the_scored_tokens_are_the_same_behind_an_instruction(base, data, prefix):
    for system in systems_to_compare(prefix, "write a review ."):
        for before, after in zip(data.test, system.examples(base, data.test), strict=True):
            scored = [label for label in after.labels if label != -100]
            assert scored == [label for label in before.labels if label != -100]
            assert after.input_ids[-len(before.input_ids) :] == before.input_ids
            assert len(after.labels) == len(after.input_ids)
            asked = base.tokenizer(system.prompts([before.prompt])[0])["input_ids"]
            assert list(after.input_ids[: len(asked)]) == asked


def test_the_instruction_goes_behind_bos(base, tiny_llama_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    other = dataclasses.replace(base, tokenizer=tokenizer)
    system = System(SystemName.INSTRUCTION, instruction="write")
    example = Example("review :", "good", (1, *tokenizer("review : good")["input_ids"][1:]), (-100, -100, -100, 50))
    lead = tokenizer("write\n", add_special_tokens=False)["input_ids"]
    found = system.examples(other, [example])[0]
    assert found.input_ids == (1, *lead, *example.input_ids[1:])
    assert found.labels == (-100,) * (1 + len(lead)) + (-100, -100, 50)


def test_trained_parameters_are_what_was_trained(prefix):
    held = sum(site.key.numel() + site.value.numel() for site in prefix.states.sites)
    assert System(SystemName.PREFIX, prefix=prefix).trained_parameters == held == 2 * 2 * 2 * 5 * 8
    assert System(SystemName.BASE).trained_parameters == 0
