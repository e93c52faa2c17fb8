"""Settings: what is taken, the error for what is not, and that what is written down is read back."""

import inspect
import json
import math
from itertools import accumulate
from operator import mul

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

import lighthouse
from lighthouse import Method
from lighthouse.cli import bench, plan
from lighthouse.cli import inspect as cli_inspect
from lighthouse.core.method import check_pool_ratios, check_select_topk
from lighthouse.core.settings import RECOMMENDED


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
        ([0.3], r"pool_ratios\[0\]=0.3: one over a whole number of tokens is needed; nearest: 1/3, 1/4$"),
        # Only what may follow the one before is near.
        ([0.25, 0.3], r"pool_ratios\[1\]=0.3: one over a whole number of tokens is needed; nearest: 1/8$"),
        ([0.5, 0.3], r"pool_ratios\[1\]=0.3: one over a whole number of tokens is needed; nearest: 1/4$"),
        ([0.5, 0.15], r"pool_ratios\[1\]=0.15: one over a whole number of tokens is needed; nearest: 1/6, 1/8$"),
        ([0.25, 0.2], r"a window of 5 tokens is not a multiple of the one before, 4; nearest: 1/8$"),
        ([0.5, 0.5], r"pool_ratios\[1\]=0.5: ratios must decrease"),
        ([0.25, 0.5], r"pool_ratios\[1\]=0.5: ratios must decrease"),
        ([0.25, 0.1], r"pool_ratios\[1\]=0.1: a window of 10 tokens is not .* the one before, 4; nearest: 1/8, 1/12$"),
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
        (-3, ValueError, "0 to 2\\^40 parents per level"),
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


RATIOS = st.lists(st.integers(2, 12), max_size=7).map(
    lambda factors: tuple(1 / window for window in accumulate(factors, mul))
)
DECIMALS = st.sampled_from([(0.3333, 0.1111), (0.25, 0.062499), (0.5001,)])  # within 1e-3 of one over a whole number
TOPK = st.one_of(
    st.integers(1, 2**40),
    st.floats(0, 1, exclude_min=True),
    st.integers(1, 65_536).flatmap(lambda d: st.integers(1, d).map(lambda n: n / d)),
)
VALUES = {"pool_ratios": st.one_of(RATIOS, DECIMALS), "select_topk": TOPK, "local_window": st.integers(0, 2**31)}


def any_of(setting):
    """Values of a setting that a method may have: a new switch needs no line here."""
    return st.booleans() if isinstance(setting.default, bool) else VALUES[setting.name]


METHODS = st.builds(Method, **{setting.name: any_of(setting) for setting in Method.settings()})


def command_line(parser, method, *required):
    """Of the texts of a method the arguments of a command, parsed."""
    words = [word for name, text in method.texts().items() for word in (f"--{name}", *text.split())]
    return parser.parse_args([*required, *words])


PARSERS = {
    "plan": (plan._parser(),),
    "bench": (bench._parser(),),
    "inspect": (cli_inspect._parser(), "model", "--text=t"),
}
ROADS = {
    "texts": Method.texts,
    "yaml": lambda method: yaml.safe_load(yaml.safe_dump(method.written())),
    "json": lambda method: json.loads(json.dumps(method.values())),
} | {name: lambda method, its=its: command_line(its[0], method, *its[1:]) for name, its in PARSERS.items()}


@pytest.mark.parametrize("road", ROADS)
@settings(max_examples=60, deadline=None)
@given(method=METHODS)
@example(method=Method((), 1))
@example(method=Method(select_topk=1.0, cover_start=False))
@example(method=Method(select_topk=5e-324))
@example(method=Method(select_topk=0, local_window=256))
def test_a_method_that_is_written_down_is_read_back(road, method):
    found = Method.of(ROADS[road](method))
    assert found == method and (found.windows, found.topk) == (method.windows, method.topk)
    assert type(found.select_topk) is type(method.select_topk)  # one parent is not all tokens


OF_THE_CHOICE = {setting.name for setting in Method.settings()} - {"local_window"}


@pytest.mark.parametrize(
    "public, usual",
    [(lighthouse.attention, Method()), (lighthouse.select, None), (lighthouse.LighthouseWrapper, RECOMMENDED)],
)
def test_what_users_call_takes_every_setting_with_its_default(public, usual):
    taken = inspect.signature(public).parameters
    names = OF_THE_CHOICE if usual is None else Method().values()
    for name in names:
        assert name in taken and taken[name].default == getattr(usual or Method(), name), name


@pytest.mark.parametrize("command", PARSERS)
def test_a_switch_without_a_value_is_on(command):
    parser, *required = PARSERS[command]
    for words, on in (("--cover_start", True), ("--cover_start FALSE", False), ("", True)):
        assert Method.of(parser.parse_args([*required, *words.split()])).cover_start is on


def test_one_parent_and_all_tokens_are_two_methods():
    assert Method(select_topk=1) != Method(select_topk=1.0) and Method((1 / 4,), 1 / 64) == Method([0.25], 0.015625)
