"""Wrapped models on a GPU; these tests alone need Transformers."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F

from chains import FACTOR, error

pytest.importorskip("transformers", reason="Transformers is needed")
from small_llama import TOKENS, Spy, ids, wrapped  # noqa: E402


@pytest.mark.parametrize(("mode", "dtype"), [("default", torch.float32), ("reduce-overhead", torch.bfloat16)])
def test_a_wrapped_llama_compiled(cuda, mode, dtype):
    """Every token is another: equal ones have equal scores, and rounding then decides which of them is chosen."""
    changes = {"num_hidden_layers": 1, "hidden_size": 128, "max_position_embeddings": 4096, "vocab_size": 4096}
    model = wrapped(config=changes, select_topk=1 / 16).to(cuda, dtype)
    exact = wrapped(config=changes, select_topk=1 / 16).to(cuda)
    torch._dynamo.utils.counters.clear()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, **({"backend": counter} if mode == "default" else {"mode": mode}))

    def gradients(call, module, tokens, steps=1):
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            module.zero_grad()
            batch = torch.randperm(4096, generator=torch.Generator().manual_seed(1))[None, :tokens].to(cuda)
            if mode == "default":
                torch._dynamo.mark_dynamic(batch, 1)
            loss = call({"input_ids": batch}).loss
            loss.backward()
        return [loss.detach().clone(), *(parameter.grad.clone() for parameter in module.parameters())]

    for tokens in (1024, 1536, 1000) if mode == "default" else (1024,):
        expected = gradients(exact, exact, tokens)
        found, plain = gradients(compiled, model, tokens, steps=3), gradients(model, model, tokens)
        for mine, eager, true in zip(found, plain, expected, strict=True):
            assert error(mine, true.double()) <= FACTOR * error(eager, true.double()) + 1e-3
    if mode == "default":
        assert counter.frame_count == 1, "compiled once, whatever the length"
    else:
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_the_wrapper_runs_dense_where_it_does_not_pay(cuda):
    spy = Spy()
    model = wrapped(spy=spy, min_tokens=None).to(cuda)
    model({"input_ids": ids().to(cuda)}).loss.backward()
    assert spy.calls == 0
    model = wrapped(spy=spy, min_tokens=TOKENS).to(cuda)
    model({"input_ids": ids().to(cuda)}).loss.backward()
    assert spy.calls == 2
    assert F.softmax(model.eval()(ids().to(cuda)).logits, -1).isfinite().all()
