"""One new token attends to prefix and text computed apart: the same as to both together, without copying the cache."""

import pytest
import torch

from prefixkit.injection import apart, attach, attention
from prefixkit.injection.apart import attend_apart, can_attend_apart
from prefixkit.prefix import SiteBank

B, G, R, S, P, D = 3, 2, 3, 7, 4, 8


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def shared():
    """One prefix for all rows, all of it visible."""
    return SiteBank(draw(1, G, P, D), draw(1, G, P, D), None, None)


def by_loops(query, key, value, prefix, mask, scale):
    """The definition: one row and head at a time, softmax over the keys that are seen, in float64."""
    rows = []
    for row in range(B):
        entry = row if len(prefix.key) > 1 else 0
        for head in range(G * R):
            keys, values = key[row, head // R].double(), value[row, head // R].double()
            bias = torch.zeros(S, dtype=torch.float64)
            if mask is not None:
                own = mask[row, 0, 0]
                bias = torch.where(own, 0.0, -torch.inf).double() if own.dtype == torch.bool else own.double()
            seen = torch.ones(P, dtype=torch.bool) if prefix.mask is None else prefix.mask[entry]
            both = torch.cat([prefix.key[entry, head // R].double()[seen], keys])
            scores = both @ query[row, head, 0].double() * scale + torch.cat(
                [torch.zeros(int(seen.sum())).double(), bias]
            )
            rows.append(scores.softmax(0) @ torch.cat([prefix.value[entry, head // R].double()[seen], values]))
    return torch.stack(rows).view(B, 1, G * R, D)


MASKS = {
    "none": None,
    "boolean": torch.arange(S) >= torch.tensor([0, 2, 5])[:, None, None, None],
    "nothing of a row": torch.arange(S) >= torch.tensor([S, 2, 0])[:, None, None, None],
    "nothing of a row, added": torch.where(
        torch.arange(S) >= torch.tensor([S, 0, 1])[:, None, None, None], 0.0, -torch.inf
    ).double(),
    "added": torch.where(torch.arange(S) >= torch.tensor([3, 0, 1])[:, None, None, None], 0.0, -1e30).double(),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("entries", ["one for all", "one per row", "some columns hidden", "none for a row"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_it_equals_the_loops(mask, entries, scale):
    n = 1 if entries == "one for all" else B
    hidden = None
    if entries == "some columns hidden":
        hidden = torch.tensor([[True] * 4, [True, True, False, False], [True, False, False, False]])
    if entries == "none for a row":
        hidden = torch.tensor([[True] * 4, [False] * 4, [True] * 4])
    prefix = SiteBank(draw(n, G, P, D, seed=1), draw(n, G, P, D, seed=2), hidden, None)
    query, key, value = (
        draw(B, 1, G * R, D).transpose(1, 2),
        draw(B, S, G, D, seed=3).transpose(1, 2),
        draw(B, G, S, D, seed=4),
    )
    found = attend_apart(query, key, value, prefix, mask, scale)
    expected = by_loops(query, key, value, prefix, mask, D**-0.5 if scale is None else scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_bfloat16_is_within_rounding():
    prefix = SiteBank(
        draw(1, G, P, D, dtype=torch.bfloat16), draw(1, G, P, D, dtype=torch.bfloat16, seed=2), None, None
    )
    query, key, value = (draw(B, n, t, D, dtype=torch.bfloat16, seed=n + t) for n, t in ((G * R, 1), (G, S), (G, S)))
    found = attend_apart(query, key, value, prefix, None, None)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), by_loops(query, key, value, prefix, None, D**-0.5), rtol=0, atol=0.02)


def test_far_larger_scores_on_one_side_are_no_trouble():
    prefix = SiteBank(300 * draw(1, G, P, D, seed=1), draw(1, G, P, D, seed=2), None, None)
    query, key, value = draw(B, G * R, 1, D), draw(B, G, S, D, seed=3), draw(B, G, S, D, seed=4)
    for one, other in ((prefix, key), (SiteBank(prefix.key / 300, prefix.value, None, None), 300 * key)):
        found = attend_apart(query, other, value, one, None, None)
        torch.testing.assert_close(found, by_loops(query, other, value, one, None, D**-0.5), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 2},
        {"grad": True},
        {"options": {"dropout": 0.1}},
        {"options": {"position_bias": torch.zeros(1, G * R, 1, S)}},
        {"options": {"softcap": 30.0}},
        {"options": {"cache": object()}},
        {"dtype": torch.float32},
        {"device": "meta"},
    ],
)
def test_whatever_else_there_is_goes_the_plain_way(changes):
    query = draw(B, G * R, changes.get("tokens", 1), D, dtype=changes.get("dtype", torch.float64))
    query, key = query.to(changes.get("device", "cpu")), draw(B, G, S, D)
    options = {"dropout": 0.0, "scaling": 0.3, "is_causal": False, "sliding_window": 4, "position_bias": None}
    with torch.set_grad_enabled(changes.get("grad", False)):
        assert not can_attend_apart(query, key, key, shared(), None, options | changes.get("options", {}))
    with torch.no_grad():
        assert can_attend_apart(draw(B, G * R, 1, D), key, key, shared(), None, options)
        by_token = shared().seen_by(torch.tensor([[False]] * B))  # an infix the token does not see
        assert not can_attend_apart(draw(B, G * R, 1, D), key, key, by_token, None, options)
        by_head = torch.ones(B, G * R, 1, S, dtype=torch.bool)
        assert not can_attend_apart(draw(B, G * R, 1, D), key, key, shared(), by_head, options)
        assert can_attend_apart(draw(B, G * R, 1, D), key, key, shared(), by_head[:, :1], options)


def test_short_texts_go_the_plain_way_too(monkeypatch):
    query, key = draw(B, G * R, 1, D), draw(B, G, S, D)
    with torch.no_grad():
        monkeypatch.setattr(apart, "WORTHWHILE", key.numel())
        assert can_attend_apart(query, key, key, shared(), None, {})
        monkeypatch.setattr(apart, "WORTHWHILE", key.numel() + 1)
        assert not can_attend_apart(query, key, key, shared(), None, {})


@pytest.mark.parametrize(
    "way", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}], ids=str
)
def test_generate_goes_this_way_and_writes_the_same(family, way, make_model, make_prefix, make_ids, monkeypatch):
    """Below so many numbers, and on other devices, tokens go the other way: both must be right, in every family."""
    model, ids = make_model(family), make_ids(2, 6)
    prefix, other = make_prefix(model, 3), make_prefix(model, 2)
    calls = []
    monkeypatch.setattr(attention, "attend_apart", lambda *args: calls.append(args) or attend_apart(*args))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True,
                "return_dict_in_generate": True, **way}  # fmt: skip
    texts = [prefix, [prefix, other], [None, other]]
    if "prompt_lookup_num_tokens" in way:  # one text at a time
        texts, ids = [prefix, [other]], ids[:1]
    goes_apart = model.config._attn_implementation == "sdpa"
    for rows in texts:
        with attach(model, rows):
            calls.clear()
            found = model.generate(ids, **settings)
            assert bool(calls) == goes_apart
            if not way and goes_apart:
                assert len(calls) == 5 * model.config.num_hidden_layers  # every token but the first
            with monkeypatch.context() as patch:
                patch.setattr(apart, "WORTHWHILE", float("inf"))
                calls.clear()
                together = model.generate(ids, **settings)
                assert not calls
        assert torch.equal(found.sequences, together.sequences)
        for one, two in zip(found.logits, together.logits, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
