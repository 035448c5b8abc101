"""A soft prompt answers and learns as embeddings put before every row, and as PEFT's; then it is a prefix."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from prefixkit.config import Method, PrefixConfig
from prefixkit.errors import InjectionError
from prefixkit.injection import attach
from prefixkit.methods import SoftPrompt, new_soft_prompt
from prefixkit.models.inspect import inspect_model
from prefixkit.models.text_states import embedding_states
from prefixkit.prefix import BaseCard, Prefix, PrefixEncoder, init_mlp

Make = Callable[..., Any]
#: What makes the embeddings is the same for every family: one way by default.
ONE_OF_THEM = [
    Method.EMBEDDING,
    *(pytest.param(m, marks=pytest.mark.slow) for m in (Method.PROMPT_TUNING, Method.P_TUNING)),
]
LENGTH = 4


def make_prompt(model: PreTrainedModel, method: Method, *, depth: int = 2) -> SoftPrompt:
    config = PrefixConfig(num_virtual_tokens=LENGTH, reparam_depth=depth, reparam_width=8)
    prompt = new_soft_prompt(model, method, config, dtype=torch.float64, seed=3)
    generator = torch.Generator().manual_seed(4)
    if isinstance(prompt.source, PrefixEncoder):
        init_mlp(prompt.source, generator)
    with torch.no_grad():
        for number in prompt.parameters():
            number.add_(0.1 * torch.randn(number.shape, generator=generator, dtype=number.dtype))
    return prompt


def put_before(model: PreTrainedModel, embeddings: Tensor, ids: Tensor) -> Tensor:
    """Logits of the text, embeddings written before every row: slow and obvious."""
    text = model.get_input_embeddings()(ids)
    rows = torch.cat([embeddings.expand(len(ids), -1, -1), text], dim=1)
    mask = torch.ones(rows.shape[:2], dtype=torch.long)
    return model(inputs_embeds=rows, attention_mask=mask).logits[:, len(embeddings) :]


def graded(logits: Tensor, numbers: list[Tensor]) -> list[Tensor]:
    dice = torch.Generator().manual_seed(9)
    weights = torch.randn(logits.shape, generator=dice, dtype=logits.dtype)
    return list(torch.autograd.grad((logits * weights).sum(), numbers))


@pytest.mark.parametrize("method", ONE_OF_THEM)
@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("all_float64")
def test_it_equals_embeddings_before_every_row_with_gradients(
    global_family: str, attention: str, method: Method, make_model: Make, make_ids: Make
) -> None:
    model = make_model(global_family, attention)
    prompt, ids = make_prompt(model, method), make_ids(3, 6)
    numbers = list(prompt.parameters())
    expected = put_before(model, prompt(), ids)
    gradients = graded(expected, numbers)
    calls = []

    def count(module: Any, args: Any, output: Any) -> None:
        calls.append(tuple(output[0].shape[:2]))

    hook = inspect_model(model).stack.register_forward_hook(count)
    with attach(model, prompt):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        found = graded(logits, numbers)
    hook.remove()
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, gradients, rtol=1e-9, atol=1e-10)
    assert max(float(gradient.abs().max()) for gradient in found) > 1e-6
    assert calls == [(1, LENGTH), (3, 6)]  # the virtual tokens are read once, not once per row


@pytest.mark.parametrize("method", [Method.PROMPT_TUNING, Method.P_TUNING])
@pytest.mark.usefixtures("all_float64")
def test_it_equals_peft(method: Method, make_model: Make, make_ids: Make) -> None:
    model = make_model("gpt2", fresh=True)
    prompt, ids = make_prompt(model, method), make_ids(3, 6)
    config: Any = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)
    if method is Method.P_TUNING:
        config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, encoder_hidden_size=32)
    rival: Any = get_peft_model(copy.deepcopy(model), config).double().eval()
    theirs = rival.prompt_encoder["default"]
    theirs.load_state_dict(prompt.source.state_dict())
    mask = torch.ones_like(ids)
    expected = rival(input_ids=ids, attention_mask=mask).logits[:, LENGTH:]
    with attach(model, prompt):
        logits = model(input_ids=ids, attention_mask=mask).logits
        found = graded(logits, list(prompt.source.parameters()))
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, graded(expected, list(theirs.parameters())), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ONE_OF_THEM)
@pytest.mark.usefixtures("all_float64")
def test_once_the_model_has_read_it_it_is_a_prefix(
    global_family: str, method: Method, make_model: Make, make_ids: Make
) -> None:
    model = make_model(global_family)
    prompt, ids = make_prompt(model, method), make_ids(2, 6)
    expected = put_before(model, prompt(), ids)
    states = embedding_states(model, prompt.materialise())
    prefix = Prefix.from_states(states, base=BaseCard(id="tiny"))
    assert prefix.position_offset == LENGTH
    with attach(model, prefix):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("all_float64")
def test_gradient_checkpointing_changes_nothing(make_model: Make, make_ids: Make) -> None:
    model = make_model("gpt2", fresh=True).train()
    prompt, ids = make_prompt(model, Method.EMBEDDING), make_ids(2, 6)
    results = []
    for on in (False, True):
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with attach(model, prompt):
            results.append(graded(model(ids).logits, list(prompt.parameters())))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


def test_a_cache_goes_on_under_the_same_prompt_alone(make_model: Make, make_ids: Make) -> None:
    model = make_model("llama")
    prompt, ids = make_prompt(model, Method.PROMPT_TUNING), make_ids(2, 4)
    with attach(model, prompt):
        whole = model(ids).logits
        cache = model(ids[:, :3], use_cache=True).past_key_values
        torch.testing.assert_close(model(ids[:, 3:], past_key_values=cache).logits[:, 0], whole[:, 3])
        with torch.no_grad():
            prompt.source.embedding.weight.add_(1.0)
        with pytest.raises(InjectionError, match="past_key_values"):
            model(ids[:, 3:], past_key_values=cache)


def test_dropout_reaches_the_embeddings_in_training_alone(make_model: Make, make_ids: Make) -> None:
    model = make_model("llama")
    config = PrefixConfig(num_virtual_tokens=LENGTH, dropout=0.5)
    prompt = new_soft_prompt(model, Method.EMBEDDING, config, dtype=torch.float64, seed=0)
    with torch.no_grad():
        for number in prompt.parameters():
            number.fill_(1.0)
    assert (prompt.train()() == 0).any()
    assert torch.equal(prompt.materialise(), torch.ones(LENGTH, 32, dtype=torch.float64))
    assert prompt.training
