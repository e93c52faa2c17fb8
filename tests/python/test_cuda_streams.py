"""A GPU works beside the program: streams, threads, graphs, other devices, and errors that arrive late."""

import subprocess
import sys
import threading

import pytest
import torch

import lighthouse
from cases import rand_qkv
from chains import chain, differing, error, forward_backward, leaves


def run_alone(code):
    """In a process of its own, which may be left with a broken GPU or must not have used it before."""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.strip() == "ok", (result.stdout + result.stderr)[-800:]


def test_nothing_waits_for_the_device(cuda):
    inputs = leaves(cuda, 98_304, dtype=torch.bfloat16, query_heads=8, kv_heads=8, head_dim=128)
    grad = torch.randn_like(inputs[0])
    forward_backward(lighthouse.attention, inputs, grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = forward_backward(lighthouse.attention, inputs, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(result).all() for result in results)


def test_two_runs_give_the_same_bits(cuda):
    """With PyTorch's attention told to be deterministic: by default the order of its sums in the backward is not."""
    inputs = leaves(cuda, 5000, dtype=torch.bfloat16, head_dim=128)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (forward_backward(lighthouse.attention, inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, second))


def test_two_streams(cuda):
    batches = [leaves(cuda, 20_000, dtype=torch.bfloat16, head_dim=64, seed=seed) for seed in range(2)]
    with torch.no_grad():
        expected = [lighthouse.attention(*inputs) for inputs in batches]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in batches]
        found = []
        for _ in range(5):
            for stream, inputs in zip(streams, batches, strict=True):
                with torch.cuda.stream(stream):
                    found.append(lighthouse.attention(*inputs))
        torch.cuda.synchronize()
    for i, output in enumerate(found):
        assert torch.equal(output, expected[i % 2])


def test_a_device_that_is_not_the_current_one(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")
    other = torch.device("cuda", (cuda.index + 1) % torch.cuda.device_count())
    here, there = (forward_backward(lighthouse.attention, leaves(d, 3000, dtype=torch.float32)) for d in (cuda, other))
    assert torch.cuda.current_device() == cuda.index
    for mine, theirs in zip(there, here, strict=True):
        assert mine.device == other
        torch.testing.assert_close(mine.to(cuda), theirs)


def test_captured_in_a_cuda_graph(cuda):
    """Forward and backward, replayed on other numbers, which make another choice."""
    inputs = leaves(cuda, 4000, dtype=torch.bfloat16, head_dim=64)
    grad = torch.randn_like(inputs[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward_backward(lighthouse.attention, inputs, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward(lighthouse.attention, inputs, grad)
    for seed in (1, 2):
        with torch.no_grad():
            for tensor, other in zip(
                inputs, leaves(cuda, 4000, dtype=torch.bfloat16, head_dim=64, seed=seed), strict=True
            ):
                tensor.copy_(other)
        graph.replay()
        expected = forward_backward(lighthouse.attention, inputs, grad)
        assert torch.equal(captured[0], expected[0])
        for mine, theirs in zip(captured[1:], expected[1:], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_the_operators_in_a_graph_replayed_on_other_numbers(cuda):
    """With windows and strata for which they need a workspace."""
    windows, topk = (1, 4, 128), (3, 0)
    numbers = [
        [
            tensor.to(cuda)
            for tensor in rand_qkv(9001, query_heads=4, kv_heads=2, head_dim=72, dtype=torch.bfloat16, seed=i)
        ]
        for i in range(3)
    ]
    inputs = [tensor.clone() for tensor in numbers[0]]
    with torch.cuda.stream(torch.cuda.Stream()):
        chain(*inputs, windows, topk)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(*inputs, windows, topk)
    for others in numbers[1:]:
        for tensor, other in zip(inputs, others, strict=True):
            tensor.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert not differing(captured, chain(*others, windows, topk))


def test_operators_captured_before_they_ever_ran(cuda):
    """CUDA loads a kernel at its first launch, which is within the capture here."""
    run_alone("""
import torch, lighthouse
from lighthouse.core.plan import sub_length

ops, windows = torch.ops.lighthouse, (1, 4, 128)
order, length = [0, 1, 2, 3], sub_length(9001, windows, (3, 0))
x = torch.randn(1, 2, 9001, 64, device="cuda", dtype=torch.bfloat16)

def run():
    choice = ops.select(*ops.score(x, x), windows, 3, 0, True)
    subs = ops.gather(x, x, x, *choice, windows, length)
    output = ops.scatter(subs[0], *choice, windows)
    grad = ops.scatter_backward(output, *choice, windows, length, order)
    return *choice, *subs, output, grad, *ops.gather_backward(*subs, *choice, windows, order, order, order)

torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = run()
graph.replay()
torch.cuda.synchronize()
assert all(map(torch.equal, captured, run()))
print("ok")
""")


def test_threads_with_streams_of_their_own(cuda):
    inputs = [
        [tensor.detach() for tensor in leaves(cuda, 9001, dtype=torch.bfloat16, head_dim=64, seed=seed)]
        for seed in range(4)
    ]
    expected = [lighthouse.attention(*each) for each in inputs]
    torch.cuda.synchronize()
    wrong = []

    def work(i):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(10):
                    output = lighthouse.attention(*inputs[i])
                    torch.cuda.current_stream().synchronize()
                    if not torch.equal(output, expected[i]):
                        wrong.append(i)
        except Exception as failed:
            wrong.append(failed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_backward_on_another_thread(device):
    inputs = leaves(device, 2000, dtype=torch.bfloat16, head_dim=64)
    expected = forward_backward(lighthouse.attention, inputs)[1:]
    output, found = lighthouse.attention(*inputs), []
    thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(output.sum(), inputs)))
    thread.start()
    thread.join()
    for mine, theirs in zip(found, expected, strict=True):
        assert error(mine, theirs.double()) < 1e-2


def test_a_first_call_on_a_thread_that_never_used_the_gpu(cuda):
    """The library has a CUDA runtime of its own."""
    run_alone("""
import threading, torch, lighthouse

x, found = torch.randn(1, 2, 500, 64, device="cuda"), []
thread = threading.Thread(target=lambda: found.append(lighthouse.attention(x, x, x)))
thread.start()
thread.join()
assert torch.equal(found[0], lighthouse.attention(x, x, x))
print("ok")
""")


# Errors


def test_not_enough_memory_is_torchs_own_error(cuda):
    key = torch.empty(1, 1, 2**20, 256, dtype=torch.bfloat16, device=cuda)
    query = key.expand(1, 1024, -1, -1)  # the output alone would have 512 GiB
    with pytest.raises(torch.OutOfMemoryError):
        lighthouse.attention(query, key, key, select_topk=1.0)
    torch.cuda.empty_cache()


def test_an_earlier_failure_is_not_called_out_of_memory(cuda):
    """It surfaces in the next call that asks the device for anything, an allocation of ours among them."""
    run_alone("""
import time, torch, lighthouse

x = torch.randn(1, 2, 4000, 64, device="cuda", dtype=torch.bfloat16)
lighthouse.attention(x, x, x)
large = torch.randn(1, 64, 40_000, 64, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
torch.cuda.empty_cache()
torch.zeros(4, device="cuda")[torch.tensor([100], device="cuda")]
time.sleep(1)
try:
    for _ in range(3):
        lighthouse.attention(large, large, large)
    torch.cuda.synchronize()
    print("no error")
except torch.OutOfMemoryError as error:
    print("out of memory:", error)
except RuntimeError:
    print("ok")
""")
