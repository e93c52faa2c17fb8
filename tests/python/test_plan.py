"""The plan: closed formulas, also for symbolic lengths, and the same as the C++ rules."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lighthouse
from lighthouse.core.method import check_pool_ratios, check_select_topk
from lighthouse.core.plan import chosen_per_level, sub_length


def test_the_default_plan_at_98304():
    plan = lighthouse.plan(98_304)
    assert plan.windows == (1, 4, 16)
    assert plan.parents == 1536
    assert plan.chosen == (6144, 6144, 6144)
    assert plan.length == 18_432
    assert plan.kept_share == pytest.approx(1 / 16)
    assert plan.attention_work == pytest.approx((18_432 / 98_304) ** 2, rel=1e-3)


def test_it_prints_readably():
    text = str(lighthouse.plan(10_000, pool_ratios=[0.5, 0.25, 0.125], select_topk=1024))
    assert text.startswith("Lighthouse plan for 10,000 tokens, 1,024 parents per level")
    for part in ("level", "window", "strata", "sub-sequence S =", "kept share", "of dense"):
        assert part in text


@pytest.mark.parametrize(
    "tokens, error, message", [(0, ValueError, "tokens=0"), (-1, ValueError, "tokens=-1"), (True, TypeError, "True")]
)
def test_bad_tokens(tokens, error, message):
    with pytest.raises(error, match=message):
        lighthouse.plan(tokens)


WINDOWS = st.lists(st.integers(2, 5), max_size=5).map(
    lambda factors: tuple(torch.cumprod(torch.tensor([1, *factors]), 0).tolist())
)
TOPK = st.one_of(
    st.integers(1, 2000).map(lambda k: (k, 0)),
    st.integers(1, 64).flatmap(lambda d: st.integers(1, d).map(lambda n: (n, d))),
)


@settings(max_examples=150, deadline=None)
@given(tokens=st.integers(1, 3000), windows=WINDOWS, topk=TOPK)
def test_python_and_cpp_agree_on_every_level(tokens, windows, topk):
    scores = torch.rand(1, 1, tokens)
    mask, prefix = torch.ops.lighthouse.select(scores, scores, windows, *topk, True)
    counts = [int((mask >> level & 1).sum()) for level in range(len(windows))]
    assert counts == chosen_per_level(tokens, windows, topk)
    last = int(prefix[0, 0, -1]) + bin(int(mask[0, 0, -1])).count("1")
    assert last == sub_length(tokens, windows, topk)


@pytest.mark.parametrize("select_topk", [7, 1 / 64, 0.29])
def test_a_symbolic_length_gives_the_same_number(select_topk):
    """Without a second compilation as long as all lengths have more, or all fewer, coarsest entries than parents."""
    windows, topk = check_pool_ratios((1 / 2, 1 / 8)), check_select_topk(select_topk)
    compiled = torch.compile(
        lambda x: x.new_empty(sub_length(x.shape[0], windows, topk)), fullgraph=True, dynamic=True, backend="eager"
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (64, 100, 777, 5000, 20_011):
            assert compiled(torch.empty(tokens)).shape[0] == sub_length(tokens, windows, topk)
