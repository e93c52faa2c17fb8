"""The rates of a device: what they are, and how they are measured in under a minute.

A rate is measured at a few sizes, interpolated between them on a logarithmic scale, and constant beyond them.

Rates depend on the length: attention on a CPU slows down again where keys and values no longer fit into a cache. So on
a CPU the rate at long lengths is that of the last few queries against as many keys, which costs a hundredth of the
whole.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from lighthouse.core.attention import attention
from lighthouse.core.devices import device_name
from lighthouse.core.method import DEFAULT, Method
from lighthouse.speed.layer import Layer
from lighthouse.speed.measure import captured, median_seconds, spread, timings
from lighthouse.speed.sides import dense_attention, leaves

BUSY = 0.2  # a spread of timings above this is not that of a quiet machine

# Where rates are measured, in tokens. `SLICES` are numbers of keys, for the last `SLICE` queries, on a CPU.
SQUARES = {"cpu": (512, 2048, 8192), "cuda": (768, 1536, 4096, 8192, 16_384, 32_768)}
SLICES = (32_768, 131_072)
SLICE = 768  # from here on PyTorch's kernel goes over the keys in the same blocks of queries as for long sequences
MOVED = {"cpu": (512, 2048, 8192, 32_768), "cuda": (4096, 8192, 32_768)}
LAUNCHED = 256  # tokens of a call that is nothing but launches on a GPU
SHORT = {"cpu": 1e-3, "cuda": 1e-4}  # seconds: the spread of a shorter call means nothing
PATIENCE = 6.0  # seconds: a measurement that would take longer is left out
PRODUCT = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrix product that is timed


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
    """A measured speed-up of a layer, with which its estimate is compared: when, and by "plan" or "bench"."""

    tokens: int
    method: Method
    speedup: float
    when: float
    by: str

    def __post_init__(self):
        self.method.plan(self.tokens)  # refuses invalid values
        _check_numbers(self, "speedup", "when")

    @classmethod
    def load(cls, values: dict) -> Checked:
        """From the result of `values`."""
        rest = {name: value for name, value in values.items() if name not in DEFAULT.values()}
        return cls(method=Method.of(values), **rest)

    def values(self) -> dict:
        """As JSON has it, the method's settings among the rest."""
        rest = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "method"}
        return rest | self.method.values()


@dataclass(frozen=True)
class Rates:
    """What was measured on a device for one kind of layer.

    Attributes:
        attention: operations per second of causal attention, by length.
        movement: bytes per second of all our operators together, by bytes.
        dense_launch, lighthouse_launch: seconds that launching a layer from Python takes at least; 0 on a CPU.
        products: operations per second of a matrix product.
        measured: when, in seconds since 1970; 0 if not known.
        spread: the largest part by which a median call was slower than the fastest, or the same call slower at one
            time than at another: a measure of other load on the machine.
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
        """From the result of `values`. Raises KeyError, TypeError or ValueError for anything else."""
        curves = {name: Curve(tuple(map(tuple, numbers[name]["points"]))) for name in ("attention", "movement")}
        checks = tuple(map(Checked.load, numbers.get("checks", ())))
        return cls(**{**numbers, **curves, "checks": checks})

    def values(self) -> dict:
        """As JSON has it."""
        return asdict(self) | {"checks": [check.values() for check in self.checks]}

    def nearest_check(self, tokens: int, method: Method) -> Checked | None:
        """The one nearest in length, of these settings if there is one, the latest of several."""

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
            raise ValueError(f"{name}={value!r}: a finite number of at least 0 is needed")


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


def measure_rates(layer: Layer, device: torch.device | str, say: Callable[[str], None] = lambda line: None) -> Rates:
    """Measures in seconds, at up to 32,768 tokens; `say` is called with each measurement."""
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

    squares: list[tuple[int, float]] = []

    def too_long(work):
        return bool(squares) and work / max(rate for _, rate in squares) > PATIENCE

    for tokens in SQUARES[device.type]:
        if too_long(layer.work(tokens)):
            break
        say(f"dense attention of {tokens:,} tokens")
        squares.append((tokens, layer.work(tokens) / seconds(dense_attention, tokens)))
    longest, its_rate = squares[-1]
    if not on_gpu:
        # One head keeps one thread busy, so this many heads cost what fewer do.
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
    say(f"both attentions of {longest:,} tokens, to compare with the estimate")
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
