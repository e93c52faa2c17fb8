"""What Lighthouse should gain on a device, from rates that were measured there at short lengths.

    time of attention = work / rate(length)                 work is 7 x heads x head_dim x length^2 operations
    time of Lighthouse = attention of S + bytes / rate(bytes)     bytes are those that its operators must move
                         + work of the local window / (LOCAL_RATE x rate of the same attention of all tokens)

Where launching from Python takes longer than the GPU's work, that is the time. docs/plan.md says how accurate the
estimates are; the tests hold them to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from lighthouse.core.method import Method
from lighthouse.core.plan import Plan
from lighthouse.speed.layer import Layer
from lighthouse.speed.rates import Checked, Rates

# From this many tokens on, the estimated speed-up was this close to the measured one in all cases that docs/plan.md
# shows. On a GPU shorter calls wait for their launches, and how long those take follows from what else the CPU does.
ERROR, ERROR_FROM = 0.2, {"cpu": 8192, "cuda": 65_536}


# The rate at which PyTorch's kernels compute a window of 256 tokens, as a part of their rate of long causal attention:
# measured at 32,768 tokens on a CPU, on CUDA at 98,304 (bench/README.md).
LOCAL_RATE = {"cpu": 0.35, "cuda": 0.25}


@dataclass(frozen=True)
class Estimate:
    """Seconds of a layer's forward and backward. `speedup` is dense over Lighthouse."""

    dense: float
    inner: float
    local: float
    movement: float
    lighthouse: float

    @property
    def speedup(self) -> float:
        return self.dense / self.lighthouse


def estimate(plan: Plan, layer: Layer, rates: Rates, *, launches: bool = True) -> Estimate:
    """The times of one layer for a sequence of `plan.tokens`; `launches=False` is for CUDA graphs."""

    def attend(length):
        return layer.work(length) / rates.attention(length)

    dense, inner = attend(plan.tokens), attend(plan.length) if plan.length else 0.0
    local = 0.0
    if plan.local_window:
        rate = LOCAL_RATE["cuda" if rates.dense_launch else "cpu"] * rates.attention(plan.tokens)
        local = layer.local_work(plan.tokens, plan.local_window) / rate
    bytes_moved = layer.moved(plan.tokens, plan.length, local=plan.local_window > 0)
    movement = bytes_moved / rates.movement(bytes_moved) if bytes_moved else 0.0
    least = (rates.dense_launch, rates.lighthouse_launch) if launches else (0.0, 0.0)
    return Estimate(max(dense, least[0]), inner, local, movement, max(inner + local + movement, least[1]))


def error_of(check: Checked, layer: Layer, rates: Rates) -> float:
    """By how much the estimate is above the measured speed-up, as a part of it."""
    return estimate(check.method.plan(check.tokens), layer, rates).speedup / check.speedup - 1


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
    dense_work = layer.work(plan.tokens)
    inner_work = layer.work(plan.length) + layer.local_work(plan.tokens, plan.local_window)
    products = 6 * product_weights * plan.tokens
    attention_work = (acting * inner_work + (layers - acting) * dense_work) / (layers * dense_work)
    work = (acting * inner_work + (layers - acting) * dense_work + products) / (layers * dense_work + products)
    speedup = None
    if rates is not None and (rates.products or not products):
        of_layer = estimate(plan, layer, rates)
        beside = products / rates.products if rates.products else 0.0
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
