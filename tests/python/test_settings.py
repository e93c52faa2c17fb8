"""Settings: what is taken, and the error for what is not."""

import math

import pytest

from lighthouse.core.method import check_pool_ratios, check_select_topk


@pytest.mark.parametrize(
    "ratios, windows",
    [
        ([], (1,)),
        ([0.5, 0.25, 0.125], (1, 2, 4, 8)),
        ((1 / 3, 1 / 9), (1, 3, 9)),
        ((0.3333, 0.1111), (1, 3, 9)),
        ((1 / 4, 1 / 16), (1, 4, 16)),
        ([2.0**-i for i in range(1, 8)], (1, 2, 4, 8, 16, 32, 64, 128)),
    ],
)
def test_ratios_that_are_one_over_a_whole_number(ratios, windows):
    assert check_pool_ratios(ratios) == windows


@pytest.mark.parametrize(
    "ratios, message",
    [
        ([0.25, 0.3], r"pool_ratios\[1\]=0.3: one over a whole number of tokens is needed; nearest: 1/3, 1/4"),
        ([0.5, 0.5], r"pool_ratios\[1\]=0.5: ratios must decrease"),
        ([0.25, 0.5], r"pool_ratios\[1\]=0.5: ratios must decrease"),
        ([0.25, 0.1], r"pool_ratios\[1\]=0.1: a window of 10 tokens is not a multiple of the one before, 4"),
        ([1.0], r"pool_ratios\[0\]=1.0: a ratio must be above 0 and below 1"),
        ([0.0], "above 0"),
        ([-0.5], "above 0"),
        ([math.nan], "above 0"),
        ([5e-324], r"at least 2\^-40"),
        ([2.0**-41], r"at least 2\^-40"),
        ([0.9999], r"pool_ratios\[0\]=0.9999: one over a whole number of tokens is needed; nearest: 1/2"),
        ([0.6], r"nearest: 1/2$"),
        ([math.inf], "above 0"),
        ([2.0**-i for i in range(1, 9)], "8 ratios: at most 7"),
    ],
)
def test_ratios_that_break_a_rule(ratios, message):
    with pytest.raises(ValueError, match=message):
        check_pool_ratios(ratios)


@pytest.mark.parametrize("ratios", [0.5, "1/4", None, [True], ["1/4"], {0.5: 1}])
def test_ratios_of_the_wrong_type(ratios):
    with pytest.raises(TypeError, match="pool_ratios"):
        check_pool_ratios(ratios)


@pytest.mark.parametrize(
    "topk, expected",
    [(1, (1, 0)), (1024, (1024, 0)), (1.0, (1, 1)), (1 / 64, (1, 64)), (0.29, (29, 100)), (1e-9, (1, 0))],
)
def test_topk(topk, expected):
    assert check_select_topk(topk) == expected


@pytest.mark.parametrize(
    "topk, error, message",
    [
        (0, ValueError, "select_topk=0: at least one parent"),
        (-3, ValueError, "at least one parent"),
        (2**41, ValueError, "2\\^40"),
        (0.0, ValueError, "above 0"),
        (-0.5, ValueError, "above 0"),
        (1.5, ValueError, "select_topk=1.5: a share of the tokens must be above 0 and at most 1"),
        (1024.0, ValueError, "for a number of parents write 1024"),
        (math.nan, ValueError, "above 0"),
        (math.inf, ValueError, "above 0"),
        (True, TypeError, "select_topk=True"),
        ("64", TypeError, "select_topk='64'"),
        (None, TypeError, "select_topk=None"),
    ],
)
def test_topk_that_breaks_a_rule(topk, error, message):
    with pytest.raises(error, match=message):
        check_select_topk(topk)
