"""What differs between releases of transformers is told apart in one place."""

import warnings

import pytest
from torch import nn
from transformers import DynamicCache

from prefixkit.compat import cache_argument, cache_of


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_found_under_the_name_of_any_release(name):
    cache = DynamicCache()  # an empty one is falsy, and a cache all the same
    assert cache_of({"input_ids": 1, name: cache}) is cache
    assert cache_of({"cache": None, "past_key_values": None, name: cache}) is cache
    assert cache_of({"input_ids": 1}) is None


def test_a_stack_is_handed_its_cache_under_the_name_it_has_there():
    class Now(nn.Module):
        def forward(self, input_ids, cache=None): ...

    class Before(nn.Module):
        def forward(self, input_ids, past_key_values=None): ...

    assert cache_argument(Now(), 1) == {"cache": 1}
    assert cache_argument(Before(), 1) == {"past_key_values": 1}


@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning, PendingDeprecationWarning])
def test_what_is_deprecated_fails_a_test(kind):
    with pytest.raises(kind, match="old"):
        warnings.warn_explicit("old", kind, "modeling.py", 1, module="transformers.modeling_utils")
