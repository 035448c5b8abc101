"""A watch on a model notices what changes it, and does not keep it alive."""

import gc
from weakref import ref

import pytest
import torch
from torch import nn

from prefixkit.models.watch import Watch


def weight_of(model):
    return model.model.layers[1].mlp.up_proj.weight


def in_place(model):
    with torch.no_grad():
        weight_of(model)[3].mul_(2)


def merged(model):
    weight_of(model).data.mul_(2)  # no counter of torch's moves


def added_token(model):
    model.model.embed_tokens.weight.data[-1].fill_(0.5)


def moved(model):
    weight_of(model).data = weight_of(model).data.clone()


def shrunk(model):
    weight_of(model).data = weight_of(model).data[:-1]


def turned(model):
    weight_of(model).data = weight_of(model).data.T


def turned_square(model):
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.shape[0] == weight.shape[1]
    weight.data = weight.data.T


def thinned(model):
    weight_of(model).data = weight_of(model).data[::2]


def spread(model):
    weight_of(model).data = weight_of(model).data[:1].expand(len(weight_of(model)), -1)


def reshaped(model):
    weight_of(model).data = weight_of(model).data.view(weight_of(model).shape[::-1])


def other_module(model):
    old = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = nn.Linear(old.in_features, old.out_features, bias=False)


def other_weight(model):
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros_like(weight_of(model)))


def one_more_module(model):
    model.model.layers[0].extra = nn.Identity()


def one_less_layer(model):
    del model.model.layers[1]


def setting(model):
    model.config.rope_parameters["rope_theta"] *= 2


CHANGES = [
    in_place, merged, added_token, moved, shrunk, turned, turned_square, thinned, spread, reshaped,
    other_module, other_weight, one_more_module, one_less_layer, setting,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_notices_what_changes_a_model(make_tiny_llama, change, dtype):
    model = make_tiny_llama().to(dtype)
    watch = Watch(model)
    assert watch.holds(model)
    change(model)
    assert not watch.holds(model)
    assert Watch(model).holds(model)


def test_reading_a_model_changes_nothing(make_tiny_llama, make_ids):
    model = make_tiny_llama()
    watch = Watch(model)
    model.train().requires_grad_(False)
    model.eval()(input_ids=make_ids(2, 5))
    assert watch.holds(model)


def test_weights_that_lie_in_memory_piecewise_are_watched_too(make_tiny_llama):
    model = make_tiny_llama()
    weight_of(model).data = weight_of(model).data.T.contiguous().T
    watch = Watch(model)
    assert watch.holds(model)
    weight_of(model).data[0, 0] += 1
    assert not watch.holds(model)


def test_a_smaller_weight_in_the_same_place_is_never_read_behind_its_end(make_tiny_llama, monkeypatch):
    model = make_tiny_llama()
    watch = Watch(model)
    weight_of(model).data = weight_of(model).data[:4]  # what lay behind may belong to something else by now
    monkeypatch.setattr("prefixkit.models.watch._value", lambda cell: pytest.fail("read"))
    assert not watch.holds(model)


def test_modules_that_torch_compiled_are_watched_too(make_tiny_llama):
    model = make_tiny_llama()
    with pytest.warns(DeprecationWarning, match="deprecated"):
        model.model.layers[0].extra = torch.jit.script(nn.Linear(2, 2))
    assert Watch(model).holds(model)


def test_a_model_is_not_kept_alive(make_tiny_llama):
    model = make_tiny_llama()
    watch, root, inner = Watch(model), ref(model), ref(weight_of(model))
    model.model.root = [model]  # a module that knows its model
    del model
    gc.collect()
    assert root() is None
    assert inner() is None
    assert watch is not None
