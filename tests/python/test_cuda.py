"""The operators on a GPU have the CPU's bits. `device` cases run on both, so that the tests prove themselves: there a
tensor's place in memory is what changes nothing.

PYTHONPATH=python python3 -m pytest tests/python/test_cuda*.py
"""

import random

import pytest
import torch

from cases import rand_qkv
from chains import DTYPES, EPSILON, FACTOR, LAYOUTS, assert_cpu_bits, chain, differing, error, placed

ALIGNED, UNALIGNED = ("tokens", "heads", "fused"), ("padded", "unaligned", "every_second")


def by_device(device, on_cpu, on_gpu):
    """Fewer on a CPU, which is compared with itself."""
    return on_cpu if device.type == "cpu" else on_gpu


@pytest.mark.parametrize("layouts", [ALIGNED, UNALIGNED], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_dim(device, dtype, layouts):
    for head_dim in range(8, 257, by_device(device, 72, 8)):
        inputs = rand_qkv(203, head_dim=head_dim, dtype=dtype, seed=head_dim)
        assert_cpu_bits(device, inputs, (1, 4, 16), (3, 0), layouts=layouts)


WINDOWS = {
    "one_level": (1,),
    "defaults": (1, 4, 16),
    "odd": (1, 3, 15),
    "every_power_to_64": (1, 2, 4, 8, 16, 32, 64),
    "a_first_window_that_is_prime": (1, 17),
    "longer_than_a_thread_spreads": (1, 22, 44),
    "later_windows_longer_than_a_thread_sums": (1, 4, 128, 512),
    # Longer than what is added up at a time: the order of additions is a rule (src/rules/order.h).
    "a_first_window_of_67": (1, 67),
    "a_first_window_of_100": (1, 100),
    "a_first_window_of_128": (1, 128),
    "a_first_window_of_256": (1, 256, 1024),
    "a_first_window_in_pieces_of_2": (1, 514),
    "a_first_window_in_pieces_of_1": (1, 521),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_lengths_around_windows(device, name):
    windows = WINDOWS[name]
    last = windows[-1]
    lengths = {1, 2, last - 1, last, last + 1, 2 * last - 1, 2 * last, 2 * last + 1, 5 * last + windows[-2:][0] - 1}
    for tokens in sorted(lengths - {0}):
        assert_cpu_bits(device, rand_qkv(tokens, head_dim=40, dtype=torch.float32, seed=tokens), windows, (2, 0))


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("group", [1, 3, 7, 8])
def test_groups_of_heads(device, group, kv_heads):
    sizes = {"query_heads": group * kv_heads, "kv_heads": kv_heads, "batch": 2, "head_dim": 72}
    assert_cpu_bits(device, rand_qkv(333, dtype=torch.bfloat16, **sizes), (1, 4, 16), (1, 16), layouts=("tokens",) * 3)


@pytest.mark.parametrize("windows", [(1, 4, 16), (1, 3, 15), (1, 128)], ids=str)
def test_numbers_too_small_for_a_normal_float(device, windows):
    """A product that is rounded before it is added, and one that is not, differ here and nowhere else."""
    inputs = [tensor * 2.0**-124 for tensor in rand_qkv(700, head_dim=16, dtype=torch.float32)]
    assert_cpu_bits(device, inputs, windows, (5, 0))


def random_settings(seed):
    """Inputs and settings that no table thinks of."""
    rng = random.Random(seed)
    windows = [1]
    for _ in range(rng.choice([0, 1, 2, 2, 3, 6])):
        windows.append(windows[-1] * rng.choice([2, 2, 3, 4, 5, 8, 16, 67, 100]))
    around = rng.choice(windows) * rng.randint(1, 5) + rng.randint(-1, 1)
    tokens = min(5000, max(1, rng.choice([rng.randint(1, 100), rng.randint(1, 3000), around])))
    topk = rng.choice([(rng.choice([1, 2, 5, 127, 128, 129, 300]), 0), (1, rng.choice([1, 2, 16, 64]))])
    sizes = {"kv_heads": rng.randint(1, 3), "batch": rng.randint(1, 2), "head_dim": 8 * rng.randint(1, 32)}
    sizes["query_heads"] = sizes["kv_heads"] * rng.choice([1, 2, 3, 7])
    if tokens * sizes["head_dim"] * sizes["query_heads"] * sizes["batch"] > 1_000_000:
        sizes.update(kv_heads=1, query_heads=1, batch=1)
    inputs = rand_qkv(tokens, dtype=rng.choice(DTYPES), seed=seed, **sizes)
    return inputs, tuple(windows), topk, rng.random() < 0.5, [rng.choice(LAYOUTS) for _ in range(3)]


def test_settings_at_random(device):
    for seed in range(by_device(device, 12, 200)):
        inputs, windows, topk, cover_start, layouts = random_settings(seed)
        try:
            assert_cpu_bits(device, inputs, windows, topk, cover_start, layouts)
        except AssertionError as failed:
            shapes = [tuple(tensor.shape) for tensor in inputs]
            raise AssertionError(
                f"{seed=} {shapes} {inputs[0].dtype} {windows} {topk} {cover_start} {layouts}"
            ) from failed


# Scores


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_have_the_same_bits_wherever_rows_lie(device, dtype):
    query, key, _ = (tensor.to(device) for tensor in rand_qkv(300, query_heads=4, head_dim=72, dtype=dtype))
    expected = torch.ops.lighthouse.score(query, key)
    for layout in LAYOUTS:
        found = torch.ops.lighthouse.score(placed(query, layout), placed(key, layout))
        assert not differing({"score": found}, {"score": expected}), layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_are_as_good_as_the_cpus(device, dtype):
    """Their bits are not the CPU's: a norm is added up by the lanes of a warp."""
    for head_dim in (8, 40, 128, 200, 256):
        query, key, _ = rand_qkv(700, query_heads=6, kv_heads=2, head_dim=head_dim, dtype=dtype)
        found = torch.ops.lighthouse.score(query.to(device), key.to(device))
        plain = torch.ops.lighthouse.score(query, key)
        exact = torch.ops.lighthouse.score(query.double(), key.double())
        for mine, theirs, true in zip(found, plain, exact, strict=True):
            rounding = error(true.float(), true.double())
            assert error(mine, true.double()) <= FACTOR * max(error(theirs, true.double()), rounding) + EPSILON


# The choice


SPECIAL = torch.tensor([*[float(x) for x in ("nan", "inf", "-inf", "0", "-0", "1", "1", "3e38")], 1e-45, -1e-45])
SCORES = {
    "special": lambda shape, rng: SPECIAL[torch.randint(0, len(SPECIAL), shape, generator=rng)],
    "ties": lambda shape, rng: torch.randint(-2, 3, shape, generator=rng).float(),
    "constant": lambda shape, rng: torch.zeros(shape),
    "all_nan": lambda shape, rng: torch.full(shape, float("nan")),
    "random": lambda shape, rng: torch.randn(shape, generator=rng),
}
CHOICES = {
    "defaults": (3001, (1, 4, 16), (1, 64)),
    "one_stratum": (9000, (1, 4), (100, 0)),
    "a_full_stratum": (9000, (1, 4), (128, 0)),
    "many_strata": (40_000, (1, 2, 4), (1, 4)),
    "long_windows": (20_011, (1, 8, 64), (50, 0)),
    "windows_of_seven": (700, (1, 7), (5, 0)),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("name", CHOICES)
def test_the_choice(device, name, kind):
    """The rules are the same lines, so the same scores give the same choice, also where they are not aligned."""
    tokens, windows, topk = CHOICES[name]
    rng = torch.Generator().manual_seed(1)
    scores = [SCORES[kind]((2, 3, tokens), rng) for _ in range(2)]
    unaligned = [torch.cat([score.new_zeros(1), score.flatten()]).to(device)[1:].view(score.shape) for score in scores]
    for cover_start in (True, False):
        expected = torch.ops.lighthouse.select(*scores, windows, *topk, cover_start)
        for there in ([score.to(device) for score in scores], unaligned):
            found = torch.ops.lighthouse.select(*there, windows, *topk, cover_start)
            assert all(torch.equal(mine.cpu(), theirs) for mine, theirs in zip(found, expected, strict=True))


# Sizes that outgrow a launch

# tokens, windows, topk, dtype, what else
LARGE = {
    "sub_sequence_above_65535": (70_000, (1, 4, 16), (1, 1), torch.float32, {}),
    "one_stratum_of_62500_entries": (1_000_000, (1, 4, 16), (4, 0), torch.float32, {}),
    "windows_of_65536": (300_000, (1, 256, 65_536), (2, 0), torch.float32, {}),
    "a_window_that_is_prime": (30_000, (1, 67), (1, 64), torch.float32, {}),
    "eight_levels_and_many_strata": (40_000, (1, 2, 4, 8, 16, 32, 64, 128), (1, 5), torch.float32, {}),
    "more_rows_than_a_grid_is_high": (17, (1, 2, 4), (1, 0), torch.float16, {"batch": 70_000}),
    "more_heads_than_strata": (
        64,
        (1, 2, 4),
        (1, 2),
        torch.bfloat16,
        {"query_heads": 1100, "kv_heads": 1100, "batch": 8},
    ),
    "a_group_of_64": (3_000, (1, 4, 16), (1, 64), torch.bfloat16, {"query_heads": 64}),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_ones(cuda, name):
    tokens, windows, topk, dtype, sizes = LARGE[name]
    assert_cpu_bits(cuda, rand_qkv(tokens, dtype=dtype, **sizes), windows, topk, layouts=("tokens",) * 3)


def test_the_cpu_is_one_of_the_devices_compared():
    """Or the other tests compared nothing: a number that differs is counted."""
    inputs = rand_qkv(64, dtype=torch.float32)
    found = chain(*inputs, (1, 4), (3, 0))
    other = chain(inputs[0], inputs[1], inputs[2] + 1, (1, 4), (3, 0), scores=torch.ops.lighthouse.score(*inputs[:2]))
    assert differing(found, found) == {} and set(differing(found, other)) == {"gather", "gather_backward"}
