"""`lighthouse.select`: the choice as a user sees it."""

import pytest
import torch

import lighthouse
from cases import rand_qkv


def by_rank(selection, batch, head):
    """Places by sorting: (last token, level) in order."""
    entries = selection.entries(batch, head)
    ends = [((index + 1) * selection.windows[level] - 1, level) for level, index in entries]
    return entries, ends


@pytest.mark.parametrize("tokens", [1, 15, 100, 4097])
def test_entries_are_in_causal_order_and_as_many_as_the_plan_says(tokens):
    query, key, _ = rand_qkv(tokens, batch=2, query_heads=4, kv_heads=2, dtype=torch.float32)
    selection = lighthouse.select(query, key, pool_ratios=(1 / 4, 1 / 16), select_topk=9)
    assert selection.length == lighthouse.plan(tokens, pool_ratios=(1 / 4, 1 / 16), select_topk=9).length
    for batch in range(2):
        for head in range(2):
            entries, ends = by_rank(selection, batch, head)
            assert len(entries) == len(set(entries)) == selection.length
            assert ends == sorted(ends)
            mask, prefix = selection.mask[batch, head].tolist(), selection.prefix[batch, head].tolist()
            places = [prefix[end] + (mask[end] & ((1 << level) - 1)).bit_count() for end, level in ends]
            assert places == list(range(selection.length))


def test_each_key_head_chooses_for_itself():
    query, key, _ = rand_qkv(1000, query_heads=4, kv_heads=2, dtype=torch.float32)
    selection = lighthouse.select(query, key, select_topk=8)
    assert selection.entries(0, 0) != selection.entries(0, 1)


def test_a_group_chooses_by_its_largest_query():
    query, key, _ = rand_qkv(640, query_heads=2, kv_heads=1, dtype=torch.float32)
    query[0, 1, 400] = 50.0
    selection = lighthouse.select(query, key, select_topk=2, cover_start=False)
    assert (0, 400) in selection.entries(0, 0)


@pytest.mark.parametrize("cover_start", [True, False])
def test_the_start_is_covered_when_asked(cover_start):
    query, key, _ = rand_qkv(640, dtype=torch.float32)
    query[:, :, :16] = key[:, :, :16] = 0.0
    entries = lighthouse.select(query, key, select_topk=4, cover_start=cover_start).entries(0, 0)
    assert ((0, 0) in entries) == cover_start


def test_the_choice_is_the_oracles():
    query, key, _ = rand_qkv(2500, batch=2, query_heads=4, kv_heads=2, dtype=torch.float32)
    selection = lighthouse.select(query, key, pool_ratios=(1 / 2, 1 / 6), select_topk=300)
    scores = torch.ops.lighthouse.score(query, key)
    for batch in range(2):
        for head in range(2):
            entries = torch.ops.lighthouse.reference_select(*scores, (1, 2, 6), 300, 0, True, batch, head)
            assert selection.entries(batch, head) == [tuple(entry) for entry in entries.tolist()]


def test_bad_input_is_refused_like_in_attention():
    query, key, _ = rand_qkv(64, dtype=torch.float32)
    with pytest.raises(ValueError, match="key has dtype"):
        lighthouse.select(query, key.double())


def test_under_autocast_the_choice_is_the_one_that_attention_makes():
    query, key, _ = rand_qkv(4096, head_dim=32, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = lighthouse.select(query, key)
    assert torch.equal(cast.mask, lighthouse.select(query.bfloat16(), key.bfloat16()).mask)
    assert not torch.equal(cast.mask, lighthouse.select(query, key).mask)
