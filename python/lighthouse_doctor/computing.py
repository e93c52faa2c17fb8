"""The checks that compute: PyTorch's attentions and Lighthouse itself, on each device, against float64.

torch is passed in: nothing here may import it at the top.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator

from lighthouse_doctor.facts import said_by
from lighthouse_doctor.line import FAILED, NOTE, OK, REINSTALL, Line

# What is computed to see whether it works: nothing divides, heads are grouped.
TOKENS, QUERY_HEADS, KEY_HEADS, HEAD_DIM = 701, 4, 2, 64
FACTOR, EPSILON = 2.0, 1e-6  # times the error that the same dtype makes in plain torch,
MOST = 1e-2  # and that cannot be more: PyTorch's own attention may be wrong


def check_backends() -> Iterator[Line]:
    """PyTorch's attentions one by one, forward and backward at an odd length against float64."""
    import torch
    from torch.nn.attention import SDPBackend

    backends = {
        "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
        "cuda": (
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        ),
    }
    for device, dtype in devices_of(torch):
        inputs, grad = inputs_of(torch, device, dtype, QUERY_HEADS)
        exact = run(attention_of(torch, SDPBackend.MATH), *in_float64(inputs, grad))
        for backend in backends[device.type]:
            yield _backend_line(torch, backend, inputs, grad, exact, str(device))


def _backend_line(torch, backend, inputs, grad, exact, device) -> Line:
    name = {"CUDNN": "cudnn", "FLASH": "flash", "EFFICIENT": "efficient", "MATH": "math"}[backend.name.split("_")[0]]
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    with warnings.catch_warnings(record=True) as said:  # PyTorch's reasons against a backend
        warnings.simplefilter("always")
        try:
            results = run(attention_of(torch, backend), inputs, grad)
            if device != "cpu":
                torch.cuda.synchronize(device)
        except Exception as error:
            reasons = " ".join(dict.fromkeys(str(warning.message).split(" (Triggered")[0] for warning in said))
            text = f"does not run in {dtype}: {reasons or said_by(error)}"
            return Line(f"sdpa {name}", NOTE, text, needed=False, device=device)
    found, allowed = largest_error(results, exact), FACTOR * MOST
    if found <= allowed:
        text = f"forward and backward right in {dtype} (error {found:.1e}, allowed {allowed:.1e})"
        return Line(f"sdpa {name}", OK, text, device=device)
    text = f"wrong in {dtype}: error {found:.1e} against float64, allowed {allowed:.1e}"
    fix = "train without it: torch.nn.attention.sdpa_kernel excludes it"
    return Line(f"sdpa {name}", FAILED, text, fix, needed=False, device=device)


def check_self_test() -> Iterator[Line]:
    """Lighthouse itself, on each device that it has code for, against the oracle in float64."""
    import torch

    from lighthouse import inner_backend
    from lighthouse.core import devices

    for device, half in devices_of(torch):
        if device.type == "cuda" and no_code(torch, devices, device.index) is not None:
            continue  # reported above
        try:
            errors = [_self_test(torch, device, dtype) for dtype in (torch.float32, half)]
            (query, key, _), _ = inputs_of(torch, device, half, KEY_HEADS)
            backend = inner_backend(query, key).name.lower()
        except Exception as error:
            fix = f"{REINSTALL}; if it remains, report it with these lines"
            yield Line("self-test", FAILED, said_by(error), fix, device=str(device))
            continue
        text = f"choice, output and gradients equal the reference ({', '.join(errors)}); inner attention: {backend}"
        if backend == "math" and device.type == "cuda":
            text += ", whose memory grows with the square of the sub-sequence"
        yield Line("self-test", OK, text, device=str(device))


def _self_test(torch, device, dtype) -> str:
    """The error found. Raises `ArithmeticError` if the reference is not met."""
    import lighthouse
    from lighthouse.core.method import POOL_RATIOS, SELECT_TOPK, check_pool_ratios, check_select_topk

    windows, topk = check_pool_ratios(POOL_RATIOS), check_select_topk(SELECT_TOPK)
    ops, name = torch.ops.lighthouse, str(dtype).removeprefix("torch.")
    inputs, grad = inputs_of(torch, device, dtype, KEY_HEADS)
    wide, wide_grad = in_float64(inputs, grad)
    query, key, _ = wide

    scores = [score.cpu() for score in ops.score(inputs[0].detach(), inputs[1].detach())]
    norms = query.norm(dim=-1).unflatten(1, (KEY_HEADS, -1)).amax(2), key.norm(dim=-1)
    if not all(torch.allclose(mine.double(), norm, rtol=1e-5) for mine, norm in zip(scores, norms, strict=True)):
        raise ArithmeticError(f"{name}: the scores differ from the norms")
    chosen = lighthouse.select(inputs[0].detach(), inputs[1].detach())
    for head in range(KEY_HEADS):
        entries = ops.reference_select(*scores, windows, *topk, True, 0, head).tolist()
        if chosen.entries(0, head) != [tuple(entry) for entry in entries]:
            raise ArithmeticError(f"{name}: it chooses different entries than the reference")

    reference = (*(tensor.detach() for tensor in wide), *scores, windows, *topk, True, 0.0)
    exact = ops.reference_attention(*reference), *ops.reference_attention_backward(*reference, wide_grad)
    repeated, _ = inputs_of(torch, device, dtype, QUERY_HEADS)
    dense = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    plain = largest_error(run(dense, repeated, grad), run(dense, *in_float64(repeated, grad)))
    allowed = FACTOR * min(plain, MOST) + EPSILON
    found = largest_error(run(lighthouse.attention, inputs, grad), exact)
    if not found <= allowed:  # NaN fails too
        raise ArithmeticError(f"{name}: error {found:.1e} against the reference, {allowed:.1e} is allowed")
    return f"{name}: error {found:.1e}"


# What the checks compute with


def devices_of(torch) -> list[tuple]:
    """Every device and the dtype that attention's backends are tried in there."""
    cuda = [(torch.device("cuda", index), torch.bfloat16) for index in range(torch.cuda.device_count())]
    return [(torch.device("cpu"), torch.bfloat16), *cuda]


def inputs_of(torch, device, dtype, key_heads):
    generator = torch.Generator().manual_seed(0)

    def rand(heads):
        tensor = torch.randn(1, TOKENS, heads, HEAD_DIM, generator=generator).to(device, dtype)
        return tensor.transpose(1, 2)

    inputs = [rand(heads).requires_grad_() for heads in (QUERY_HEADS, key_heads, key_heads)]
    return inputs, rand(QUERY_HEADS)


def in_float64(inputs, grad):
    """The same numbers in float64 on the CPU."""
    wide = [tensor.detach().cpu().double().contiguous().requires_grad_() for tensor in inputs]
    return wide, grad.cpu().double().contiguous()


def attention_of(torch, backend):
    def attention(query, key, value):
        with torch.nn.attention.sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    return attention


def run(attention, inputs, grad):
    """Output and gradients."""
    import torch

    output = attention(*inputs)
    return output.detach(), *torch.autograd.grad(output, inputs, grad)


def largest_error(results, exact) -> float:
    """Of output and gradients, relative to the exact ones; NaN if any of them is."""
    errors = []
    for mine, true in zip(results, exact, strict=True):
        errors.append(((mine.cpu().double() - true).norm() / true.norm()).item())
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def no_code(torch, devices, index) -> str | None:
    return devices.missing_for_capability(*torch.cuda.get_device_capability(index))
