"""From the encoder's parameters through a whole model to its output: autograd against finite differences."""

import pytest
import torch
from torch.func import functional_call

from prefixkit.injection import attach
from prefixkit.models.inspect import inspect_model
from prefixkit.prefix import PrefixEncoder


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_the_encoder_through_a_whole_model_passes_gradcheck(depth, gated, make_model, make_ids):
    """Finite differences along a few directions at once (fast mode), for every parameter, lengths 2 and 0 and 1."""
    model, ids = make_model("gpt2"), make_ids(2, 3)  # float64 throughout; RMSNorm computes in float32
    encoder = PrefixEncoder(
        inspect_model(model).geometry, (2, 0, 1), depth=depth, width=3, gated=gated, dtype=torch.float64
    )
    dice = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=dice, dtype=torch.float64))
    names = [name for name, parameter in encoder.named_parameters() if parameter.numel()]
    values = [encoder.get_parameter(name).detach().clone().requires_grad_() for name in names]
    weights = torch.randn(2, 3, 97, generator=dice, dtype=torch.float64)

    class Wired(PrefixEncoder):
        """The encoder, its parameters given from outside."""

        def forward(self):
            return functional_call(encoder, self.given)

    wired = Wired(encoder.geometry, encoder.lengths, dtype=torch.float64)

    def run(*given):
        wired.given = dict(zip(names, given, strict=True))
        with attach(model, wired):
            return (model(input_ids=ids).logits * weights).sum()

    assert torch.autograd.gradcheck(run, values, fast_mode=True)
    gradients = torch.autograd.grad(run(*values), values, allow_unused=True)
    silent = {name for name, gradient in zip(names, gradients, strict=True) if gradient is None}
    assert not silent  # the site of length 0 has no parameter at all
