"""What differs between releases of transformers is told apart in one place."""

import pytest
from transformers import DynamicCache

from prefixkit.compat import cache_of


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_found_under_the_name_of_any_release(name):
    cache = DynamicCache()  # an empty one is falsy, and a cache all the same
    assert cache_of({"input_ids": 1, name: cache}) is cache
    assert cache_of({"cache": None, "past_key_values": None, name: cache}) is cache
    assert cache_of({"input_ids": 1}) is None
