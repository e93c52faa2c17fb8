"""What Lighthouse should gain on a device, from rates that were measured there at short lengths.

    time of attention = work / rate(length)                 work is 7 x heads x head_dim x length^2 operations
    time of Lighthouse = attention of S + bytes / rate(bytes)     bytes are those that its operators must move

A rate is measured at a few sizes and taken in between on a logarithmic scale; beyond the last one it stays. Where
launching from Python takes longer than the GPU's work, that is the time.

The trap is the length at which rates were measured: attention on a CPU slows down again where keys and values no longer
fit where they did. There its rate at long lengths is that of the last few queries against as many keys, which costs a
hundredth of the whole. docs/plan.md says how near the estimates are; the tests hold them to it.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from lighthouse.core.attention import attention
from lighthouse.core.devices import device_name
from lighthouse.core.inner import SubSequences, causal_sdpa
from lighthouse.core.method import DEFAULT, Method
from lighthouse.core.plan import Plan
from lighthouse.core.settings import MAX_SHARE
from lighthouse.speed.measure import captured, leaves, median_seconds, spread, timings

# From so many tokens on, the estimate of a speed-up was within this of what was measured in all cases that docs/plan.md
# shows. On a GPU shorter calls wait for their launches, and how long those take follows from what else the CPU does.
ERROR, ERROR_FROM = 0.2, {"cpu": 8192, "cuda": 32_768}
BUSY = 0.2  # a spread of timings above this is not that of a quiet machine

LONG = 98_304  # tokens from which a small kept share is warned of: "100K"
LEAST_KEPT = 0.03
LONG_TAIL = 0.1  # of the tokens that are in at level 0

# Where rates are measured, in tokens. `SLICES` are numbers of keys, for the last `SLICE` queries, on a CPU.
SQUARES = {"cpu": (512, 2048, 8192), "cuda": (768, 1536, 4096, 8192, 16_384, 32_768)}
SLICES = (32_768, 131_072)
SLICE = 768  # from here on PyTorch's kernel goes over the keys in the same blocks of queries as for long sequences
MOVED = {"cpu": (512, 2048, 8192, 32_768), "cuda": (4096, 8192, 32_768)}
LAUNCHED = 256  # tokens of a call that is nothing but launches on a GPU
SHORT = {"cpu": 1e-3, "cuda": 1e-4}  # seconds: of a shorter call the spread says nothing
PATIENCE = 6.0  # seconds: a measurement that would take longer is left out
PRODUCT = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrix product that is timed


@dataclass(frozen=True)
class Layer:
    """The attention of one layer, for a batch of one. `dtype` by its name: "bfloat16"."""

    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"

    def __post_init__(self):
        for name in ("heads", "kv_heads", "head_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: a whole number from 1 on is needed")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={self.kv_heads} with heads={self.heads}: the query heads must be a multiple of them"
            )
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r}: float32, bfloat16 or float16 is needed")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        grouped = f" over {self.kv_heads}" if self.kv_heads != self.heads else ""
        return f"{self.heads} heads{grouped} of {self.head_dim}, {self.dtype}"

    def work(self, length: int) -> int:
        """Operations of causal attention, forward and backward: seven products over half a square."""
        return 7 * self.heads * self.head_dim * length * length

    def moved(self, tokens: int, length: int) -> int:
        """Bytes that our operators must read and write, forward and backward (METHOD 2, 3, 6, 7)."""
        size = self.torch_dtype.itemsize
        query, pair = self.heads * self.head_dim * size, 2 * self.kv_heads * self.head_dim * size
        scores, choice = 8 * self.kv_heads * tokens, 5 * self.kv_heads * tokens
        score = (query + pair // 2) * tokens + scores
        select = scores + choice
        gather = (query + pair) * (tokens + length) + choice
        scatter = query * (tokens + length) + choice
        return score + select + 2 * gather + 2 * scatter

    def kept(self, tokens: int, length: int | None = None) -> int:
        """Bytes that stay between forward and backward: dense, or with a sub-sequence of `length`.

        Query, key, value, output and the softmax's sums; Lighthouse keeps these of the sub-sequence, the choice, and
        the output that the next product needs.
        """
        size = self.torch_dtype.itemsize
        row = 2 * (self.heads + self.kv_heads) * self.head_dim * size + 4 * self.heads
        if length is None:
            return row * tokens
        return row * length + (self.heads * self.head_dim * size + 5 * self.kv_heads) * tokens


LAYERS = {"cpu": Layer(4, 4, 64, "float32"), "cuda": Layer(8, 8, 128, "bfloat16")}


def default_layer(device: torch.device | str, **given) -> Layer:
    """The device's default with what is given, and not None, in its place; `heads` alone are the key heads too."""
    given = {name: value for name, value in given.items() if value is not None}
    if "heads" in given:
        given.setdefault("kv_heads", given["heads"])
    return replace(LAYERS[torch.device(device).type], **given)


@dataclass(frozen=True)
class Curve:
    """A rate per second by size, `((size, rate), ...)`: between sizes on a logarithmic scale, beyond them constant."""

    points: tuple[tuple[float, float], ...]

    def __post_init__(self):
        points = tuple(sorted((float(size), float(rate)) for size, rate in self.points))
        if not points or any(not (0 < value < math.inf) for point in points for value in point):
            raise ValueError(f"points={self.points}: at least one, with sizes and rates above 0, is needed")
        object.__setattr__(self, "points", points)

    def __call__(self, size: float) -> float:
        sizes = [point[0] for point in self.points]
        after = bisect.bisect_right(sizes, size)
        if after in (0, len(sizes)):
            return self.points[min(after, len(sizes) - 1)][1]
        (low, slow), (high, fast) = self.points[after - 1 : after + 1]
        part = math.log(size / low) / math.log(high / low)
        return slow * (fast / slow) ** part


@dataclass(frozen=True)
class Checked:
    """A speed-up of a layer that was measured, against which its estimate is held: when, and by "plan" or "bench"."""

    tokens: int
    method: Method
    speedup: float
    when: float
    by: str

    def __post_init__(self):
        self.method.plan(self.tokens)  # refuses what is none
        _check_numbers(self, "speedup", "when")

    @classmethod
    def load(cls, values: dict) -> Checked:
        """From what `values` makes."""
        rest = {name: value for name, value in values.items() if name not in DEFAULT.values()}
        return cls(method=Method.of(values), **rest)

    def values(self) -> dict:
        """As JSON has it, the method's settings among the rest."""
        rest = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "method"}
        return rest | self.method.values()

    def error(self, layer: Layer, rates: Rates) -> float:
        """By how much the estimate is above what was measured, as a part of it."""
        return estimate(self.method.plan(self.tokens), layer, rates).speedup / self.speedup - 1


@dataclass(frozen=True)
class Rates:
    """What was measured on a device for one kind of layer.

    Attributes:
        attention: operations per second of causal attention, by length.
        movement: bytes per second of all our operators together, by bytes.
        dense_launch, lighthouse_launch: seconds that launching a layer from Python takes at least; 0 on a CPU.
        products: operations per second of a matrix product.
        measured: when, in seconds since 1970; 0 where that is not known.
        spread: the largest part by which a median call was slower than the fastest, or the same call slower at one
            time than at another: what else the machine did.
        checks: speed-ups that were measured.
    """

    device: str
    attention: Curve
    movement: Curve
    dense_launch: float = 0.0
    lighthouse_launch: float = 0.0
    products: float | None = None
    measured: float = 0.0
    spread: float | None = None
    checks: tuple[Checked, ...] = ()

    def __post_init__(self):
        _check_numbers(self, "dense_launch", "lighthouse_launch", "products", "measured", "spread")

    @classmethod
    def load(cls, numbers: dict) -> Rates:
        """From what `values` makes. Raises KeyError, TypeError or ValueError where it is something else."""
        curves = {name: Curve(tuple(map(tuple, numbers[name]["points"]))) for name in ("attention", "movement")}
        checks = tuple(map(Checked.load, numbers.get("checks", ())))
        return cls(**{**numbers, **curves, "checks": checks})

    def values(self) -> dict:
        """As JSON has it."""
        return asdict(self) | {"checks": [check.values() for check in self.checks]}

    def nearest_check(self, tokens: int, method: Method) -> Checked | None:
        """The one nearest in length, of these settings where there is one, the latest of several."""

        def far(check: Checked):
            return check.method != method, abs(math.log(check.tokens / tokens)), -check.when

        return min(self.checks, key=far, default=None)


def _check_numbers(of, *names: str) -> None:
    for name in names:
        value = getattr(of, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}={value!r}: a number is needed")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value!r}: a finite number from 0 on is needed")


@dataclass(frozen=True)
class Estimate:
    """Seconds of a layer's forward and backward. `speedup` is dense over Lighthouse."""

    dense: float
    inner: float
    movement: float
    lighthouse: float

    @property
    def speedup(self) -> float:
        return self.dense / self.lighthouse


def estimate(plan: Plan, layer: Layer, rates: Rates, *, launches: bool = True) -> Estimate:
    """The times of one layer for a sequence of `plan.tokens`; `launches=False` is for CUDA graphs."""

    def attend(length):
        return layer.work(length) / rates.attention(length)

    dense, inner = attend(plan.tokens), attend(plan.length)
    bytes_moved = layer.moved(plan.tokens, plan.length)
    movement = bytes_moved / rates.movement(bytes_moved)
    least = (rates.dense_launch, rates.lighthouse_launch) if launches else (0.0, 0.0)
    return Estimate(max(dense, least[0]), inner, movement, max(inner + movement, least[1]))


@dataclass(frozen=True)
class StepEstimate:
    """Of a whole training step, Lighthouse's part of dense's: attention's operations, all operations, and the speed-up.

    With matrix products only; norms, rotations, the optimizer and the loss beyond its product are left out.
    """

    attention_work: float
    work: float
    speedup: float | None


def estimate_step(
    plan: Plan,
    layer: Layer,
    *,
    layers: int,
    dense_layers: int,
    product_weights: int = 0,
    rates: Rates | None = None,
) -> StepEstimate:
    """A step of `layers` layers, `dense_layers` of them at each end dense.

    `product_weights` is how many weights each token is multiplied with, six operations each.
    """
    acting = layers - 2 * dense_layers
    dense_work, inner_work = layer.work(plan.tokens), layer.work(plan.length)
    products = 6 * product_weights * plan.tokens
    attention_work = (acting * inner_work + (layers - acting) * dense_work) / (layers * dense_work)
    work = (acting * inner_work + (layers - acting) * dense_work + products) / (layers * dense_work + products)
    speedup = None
    if rates is not None and (rates.products or not products):
        of_layer = estimate(plan, layer, rates)
        beside = products / rates.products if products else 0.0
        mixed = acting * of_layer.lighthouse + (layers - acting) * of_layer.dense
        speedup = (layers * of_layer.dense + beside) / (mixed + beside)
    return StepEstimate(attention_work, work, speedup)


def pays_from(layer: Layer, rates: Rates, method: Method, *, most: int = 2**20) -> int | None:
    """The shortest power of two, from 256 to `most` tokens, from which on Lighthouse is estimated to be faster."""
    found = None
    tokens = most
    while tokens >= 256:
        if estimate(method.plan(tokens), layer, rates).speedup <= 1:
            break
        found, tokens = tokens, tokens // 2
    return found


def warnings(method: Method, tokens: int, *, layer: Layer | None = None, rates: Rates | None = None) -> list[str]:
    """What is doubtful in a plan: a sentence each, with the way out. Without rates nothing is said of time."""
    found, plan = [], method.plan(tokens)
    coarsest, window = plan.entries[-1], plan.windows[-1]
    if len(plan.windows) == 1:
        return ["pool_ratios is empty: this is dense attention; the default is 1/4 1/16"]
    if not coarsest:
        return [
            f"{tokens:,} tokens are fewer than the coarsest window has ({window:,}): this is dense attention; "
            f"take sequences of at least {window:,} tokens, or a coarsest ratio larger than 1/{window}"
        ]
    kept = plan.kept_share
    if tokens >= LONG and kept < LEAST_KEPT:
        needed = math.ceil(LEAST_KEPT * tokens / plan.windows[1])
        way = (
            f"select_topk={needed:,} keeps {LEAST_KEPT:.0%}"
            if needed <= coarsest
            else f"a coarsest ratio larger than 1/{window}, so that more parents can be chosen"
        )
        found.append(
            f"{kept:.2%} of the tokens are kept, under {LEAST_KEPT:.0%}: short runs with so few ended at a worse loss; "
            f"{way}"
        )
    if plan.parents > coarsest:
        share = Fraction(coarsest, tokens).limit_denominator(65_536)
        found.append(
            f"{plan.parents:,} parents per level are asked, and the coarsest level has {coarsest:,} entries: all of "
            f"them are parents and the choice is smaller than asked; take select_topk up to {coarsest:,} "
            f"({float(share):.4g} of the tokens), or a coarsest ratio larger than 1/{window}"
        )
    tail = tokens % window
    if tail >= LONG_TAIL * plan.chosen[0]:
        below = tokens - tail
        found.append(
            f"the last {tail:,} tokens, behind the last whole window of {window:,}, are always in: "
            f"{tail / plan.chosen[0]:.0%} of those kept at level 0; take {below:,} or {below + window:,} tokens"
        )
    speedup = None if rates is None or layer is None else estimate(plan, layer, rates).speedup
    slow = speedup is not None and speedup <= 1.05
    if slow or plan.length > MAX_SHARE * tokens:
        what = f"S is {plan.length / tokens:.0%} of the tokens"
        what += f", estimated at {speedup:.2f} times dense" if speedup is not None else ""
        found.append(f"dense attention is as fast ({what}); {_faster(method, plan, layer, rates)}")
    return found


def _faster(method: Method, plan: Plan, layer: Layer | None, rates: Rates | None) -> str:
    """A select_topk that pays at this length, or the length from which these settings pay."""

    def pays(tried: Plan) -> bool:
        if tried.length > MAX_SHARE * tried.tokens:
            return False
        return rates is None or layer is None or estimate(tried, layer, rates).speedup > 1.05

    parents = min(plan.parents, plan.entries[-1]) // 2
    while parents >= 1:
        if pays(replace(method, select_topk=parents).plan(plan.tokens)):
            return f"select_topk={parents:,} would be faster"
        parents //= 2
    if rates is not None and layer is not None:
        pays_at = pays_from(layer, rates, method)
        if pays_at is not None:
            return f"these settings pay from about {pays_at:,} tokens on"
    return "take longer sequences, or coarser ratios"


# Measuring


class _AsItIs(torch.autograd.Function):
    """An inner attention that does nothing: what is left of the layer is ours."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.group = query.shape[1] // key.shape[1]
        return query.view_as(query)

    @staticmethod
    def backward(ctx, grad):
        pair = grad[:, :: ctx.group]  # any gradient of the right shape
        return grad, pair, pair


def _nothing(query, key, value, **_) -> Tensor:
    return _AsItIs.apply(query, key, value)


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's own causal attention of the whole sequence: what Lighthouse is compared with."""
    return causal_sdpa(
        query, key, value, scale=None, dropout_p=0.0, layout=SubSequences(query.shape[0], query.shape[2])
    )


def measure_rates(layer: Layer, device: torch.device | str, say: Callable[[str], None] = lambda line: None) -> Rates:
    """Measures in seconds, at up to 32,768 tokens; `say` is told what is being measured."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    sizes = layer.heads, layer.kv_heads, layer.head_dim, layer.torch_dtype, device

    spreads = []

    def times_of(run, *, launches=False, **limits) -> float:
        found = timings([run], device, **limits)[0]
        if len(found) > 1 and not launches and min(found) > SHORT[device.type]:
            spreads.append(spread(found))
        return min(found)

    def call(function, tokens):
        inputs, grad = leaves(tokens, *sizes)
        return lambda: torch.autograd.grad(function(*inputs), inputs, grad)

    def seconds(function, tokens, *, launches=False):
        run = call(function, tokens)
        return times_of(captured(run) if on_gpu and not launches else run, launches=launches, repeats=7, budget=2.0)

    squares = []

    def too_long(work):
        return bool(squares) and work / max(rate for _, rate in squares) > PATIENCE

    for tokens in SQUARES[device.type]:
        if too_long(layer.work(tokens)):
            break
        say(f"dense attention of {tokens:,} tokens")
        squares.append((tokens, layer.work(tokens) / seconds(dense_attention, tokens)))
    longest, its_rate = squares[-1]
    if not on_gpu:
        # One head keeps one thread busy, and so many heads cost what fewer do.
        threads = torch.get_num_threads()
        few = replace(layer, heads=threads, kv_heads=threads) if layer.heads % threads == 0 else layer
        for keys in SLICES:
            work = 2 * few.work(1) * SLICE * keys  # all of a rectangle, where a causal square is half
            if too_long(work):
                break
            say(f"dense attention of {SLICE} queries and {keys:,} keys")
            squares.append((keys, work / times_of(_slice(few, keys, device), repeats=2, budget=2.0)))
    movement = []
    for tokens in MOVED[device.type]:
        say(f"Lighthouse without its attention, {tokens:,} tokens")
        moved = layer.moved(tokens, DEFAULT.length(tokens))
        movement.append((moved, moved / seconds(lambda *qkv: attention(*qkv, inner=_nothing), tokens)))
    say("a matrix product" + (" and launches" if on_gpu else ""))
    launch = [
        seconds(function, LAUNCHED, launches=True) if on_gpu else 0.0 for function in (dense_attention, attention)
    ]
    products = _product_rate(layer.torch_dtype, device)
    say(f"both attentions of {longest:,} tokens, against which the estimate is held")
    dense, ours = timings([call(dense_attention, longest), call(attention, longest)], device, repeats=5, budget=4.0)
    if not on_gpu:  # there launches come in between
        first = layer.work(longest) / its_rate
        spreads.append(max(min(dense), first) / min(*dense, first) - 1)
    now = time.time()
    return Rates(
        device=device_name(device),
        attention=Curve(tuple(squares)),
        movement=Curve(tuple(movement)),
        dense_launch=launch[0],
        lighthouse_launch=launch[1],
        products=products,
        measured=now,
        spread=max(spreads, default=None),
        checks=(Checked(longest, DEFAULT, median(dense) / median(ours), now, "plan"),),
    )


def _slice(layer: Layer, keys: int, device: torch.device) -> Callable:
    """A call with the last queries of a long sequence: what they cost is what the rest costs, query by query."""
    (query, _, _), grad = leaves(SLICE, layer.heads, layer.heads, layer.head_dim, layer.torch_dtype, device)
    (_, key, value), _ = leaves(keys, layer.heads, layer.heads, layer.head_dim, layer.torch_dtype, device)
    inputs = (query, key, value)

    return lambda: torch.autograd.grad(F.scaled_dot_product_attention(*inputs), inputs, grad)


def _product_rate(dtype: torch.dtype, device: torch.device) -> float:
    size = PRODUCT[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: left @ right, device, repeats=7, budget=1.0, pick=min)
