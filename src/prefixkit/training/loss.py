"""The loss: cross-entropy at scored positions only, without ever holding all logits.

A language model's head is frozen, so the gradient with respect to its input is known as soon as the logits are:
``(softmax(z) - onehot(y)) @ W``. `ScoredLoss` computes it chunk by chunk in the forward pass and keeps nothing
else; padding and unscored positions are never multiplied with the vocabulary.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixkit.config import Pooling
from prefixkit.data import NO_LOSS
from prefixkit.models.inspect import inspect_model
from prefixkit.models.reading import last_hidden_state, mean_state
from prefixkit.models.weights import input_device, is_plain
from prefixkit.prefix import ClassificationHead

#: Positions whose logits exist at the same time.
CHUNK = 256


class ScoredLoss(torch.autograd.Function):
    """Sum of cross-entropies of a frozen linear head, in nats."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "k e"],
        targets: Int[Tensor, "k"],
        weight: Float[Tensor, "v e"],
        bias: Float[Tensor, "v"] | None,
    ) -> Float[Tensor, ""]:
        """Return the summed loss; the gradient of `hidden` is computed on the way.

        Args:
            ctx: autograd's notebook.
            hidden: the head's input at the scored positions.
            targets: the token each position should predict.
            weight: the head's weight, frozen.
            bias: the head's bias, frozen, or None.
        """
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), CHUNK):
            part, expected = hidden[start : start + CHUNK], targets[start : start + CHUNK, None]
            logits = nn.functional.linear(part, weight, bias).to(total.dtype)  # [c, v]
            log_sum = logits.logsumexp(dim=1, keepdim=True)  # [c, 1]
            total += (log_sum - logits.gather(1, expected)).sum()
            if gradient is not None:
                slope = logits.sub_(log_sum).exp_()  # softmax, in place
                slope.scatter_add_(1, expected, torch.full_like(expected, -1, dtype=slope.dtype))
                gradient[start : start + CHUNK] = slope.to(part.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        """Scale the gradient that the forward pass left."""
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None, None


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether a model's logits are exactly its output embedding applied to its last hidden state.

    Families that scale or soft-cap logits (Gemma 2, Cohere, Granite) are not. The model is asked: its last hidden
    state is replaced by large numbers, which no soft cap lets pass.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or model.config.is_encoder_decoder:  # two stacks before the head
        return False
    if not is_plain(head.weight):  # quantised or offloaded: only the head itself can multiply with it
        return False
    stack = inspect_model(model).stack
    generator = torch.Generator().manual_seed(0)
    large = 100 * torch.randn(1, 1, head.in_features, generator=generator)
    large = large.to(head.weight.device, head.weight.dtype)

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        output[0 if isinstance(output, tuple) else "last_hidden_state"] = large
        return output

    token = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    hook = stack.register_forward_hook(replace)
    try:
        with torch.no_grad():
            return torch.equal(model(input_ids=token, use_cache=False).logits, head(large))
    except (RuntimeError, TypeError):  # a projection between stack and head, say
        return False
    finally:
        hook.remove()


def summed_loss(
    model: PreTrainedModel, batch: dict[str, Tensor], labels: Int[Tensor, "b t"], *, plain_head: bool
) -> Float[Tensor, ""]:
    """Return the summed cross-entropy of one batch, in nats.

    Args:
        model: the base model, with a prefix attached.
        batch: the model's inputs, such as input_ids and attention_mask, and an encoder-decoder's decoder_input_ids.
        labels: the tokens themselves, `NO_LOSS` where there is no loss; position t is predicted from t - 1.
        plain_head: `has_plain_head` of the model; if not, all logits are computed as the model does.
    """
    expected = labels[:, 1:]  # [b, t - 1]
    scored = expected != NO_LOSS
    if plain_head:
        hidden = inspect_model(model).stack(**batch, use_cache=False)[0][:, :-1][scored]  # [k, e]
        head = model.get_output_embeddings()
        loss: Tensor = ScoredLoss.apply(hidden, expected[scored], head.weight, head.bias)  # type: ignore[no-untyped-call]
        return loss
    logits = model(**batch, use_cache=False).logits[:, :-1][scored]  # [k, v]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, expected[scored], reduction="sum")


def labelling_loss(
    model: PreTrainedModel, head: ClassificationHead, batch: dict[str, Tensor], labels: Int[Tensor, "b t"]
) -> Float[Tensor, ""]:
    """Return the summed cross-entropy of one batch's labels, in nats.

    Args:
        model: the base model, with a prefix attached.
        head: reads its last hidden states.
        batch: the model's inputs: input_ids and attention_mask.
        labels: the number of a class where there is one, `NO_LOSS` elsewhere.
    """
    hidden, scored = last_hidden_state(model, batch), labels != NO_LOSS
    if head.pooling is Pooling.MEAN:  # one label per row, or none
        states = mean_state(hidden, batch["attention_mask"], head.weight.dtype)[scored.any(dim=1)]  # [k, e]
    else:
        states = hidden[scored]  # [k, e]
    return nn.functional.cross_entropy(head(states), labels[scored], reduction="sum")
