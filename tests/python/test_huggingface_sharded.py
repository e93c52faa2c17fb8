"""A wrapped model sharded by FSDP2 or copied by DDP, on CPU processes: the plain model's losses, names and classes.

`fully_shard` directly: accelerate runs DDP in its place on a CPU, without a word.
"""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM, LlamaModel

from lighthouse import LighthouseWrapper
from lighthouse.huggingface.class_swap import Swapped
from small_llama import LIGHTHOUSE_LAYERS, MODELS, SETTINGS, Spy, ids, plain, wrapped

pytestmark = pytest.mark.usefixtures("one_thread")

both = pytest.mark.parametrize("model_class", MODELS)


@contextlib.contextmanager
def group(rank=0, processes=1, port_file=None):
    store = dist.HashStore() if port_file is None else dist.FileStore(str(port_file), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    try:
        yield
        dist.barrier()  # a process that leaves while another still sends to it ends with an abort now and then
    finally:
        dist.destroy_process_group()


@pytest.fixture
def one_process():
    with group():
        yield


def shard(model, embedding=False):
    """Each layer a unit and the rest one; with `embedding` the output matrix is a unit of its own too."""
    if embedding:
        fully_shard(model.get_output_embeddings() if isinstance(model, LlamaForCausalLM) else model.embed_tokens)
    for layer in model.base_model.layers:
        fully_shard(layer)
    return fully_shard(model)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@both
@pytest.mark.parametrize("embedding", [False, True], ids=["one_unit", "output_layer_apart"])
def test_sharded_it_trains_as_alone(model_class, embedding, one_process):
    spy = Spy()
    alone, model = wrapped(model_class), wrapped(model_class, spy=spy)
    keys = list(model.state_dict())
    shard(model, embedding)
    assert isinstance(model, FSDPModule) and type(model).__name__ == f"FSDP{model_class.__name__}"
    assert list(model.state_dict()) == keys
    for enabled in (True, False, True):
        for m in (alone, model):
            m.lighthouse(enabled)
            m.zero_grad()
            m.loss = m({"input_ids": ids()}).loss
            m.loss.backward()
        torch.testing.assert_close(model.loss, alone.loss)
        for (name, p), (_, q) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
            torch.testing.assert_close(full(p.grad), q.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert spy.calls == 2 * LIGHTHOUSE_LAYERS


@both
def test_unwrapping_leaves_the_sharded_plain_model(model_class, one_process):
    model, never = wrapped(model_class), plain(model_class)
    shard(model, embedding=True)
    shard(never, embedding=True)
    model({"input_ids": ids()}).loss.backward()
    assert model.unwrap() is model
    assert type(model) is type(never) and isinstance(model, FSDPModule)
    for (name, module), (_, other) in zip(model.named_modules(), never.named_modules(), strict=True):
        assert type(module) is type(other), name
        assert not isinstance(module, Swapped), name
    assert torch.equal(model(ids())[0], never(ids())[0])


@both
def test_a_model_sharded_first_can_be_wrapped(model_class, one_process):
    spy = Spy()
    model = shard(plain(model_class))
    plain_class = type(model)
    LighthouseWrapper(model, inner=spy, **SETTINGS)
    assert isinstance(model, FSDPModule)
    loss = model({"input_ids": ids()}).loss
    loss.backward()
    assert spy.calls == LIGHTHOUSE_LAYERS
    torch.testing.assert_close(loss, wrapped(model_class)({"input_ids": ids()}).loss)
    assert type(model.unwrap()) is plain_class
    assert type(model.get_input_embeddings()).__name__ == "Embedding"


def test_compiled_and_sharded(one_process):
    model = wrapped(config={"num_hidden_layers": 1})
    expected = model({"input_ids": ids()}).loss
    shard(model)
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled({"input_ids": ids()}).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)


def test_ddp(one_process):
    spy = Spy()
    model = wrapped(spy=spy)
    parallel = DistributedDataParallel(model)
    parallel({"input_ids": ids()}).loss.backward()
    parallel.module.lighthouse(False)
    parallel(ids(), labels=ids()).loss.backward()
    assert spy.calls == LIGHTHOUSE_LAYERS
    with pytest.raises(TypeError, match="DistributedDataParallel around a LlamaForCausalLM"):
        LighthouseWrapper(parallel)
    assert model.unwrap() is parallel.module


def two_processes(rank, folder):
    torch.set_num_threads(1)
    with group(rank, 2, folder / "store"):
        for model_class in (LlamaModel, LlamaForCausalLM):
            model = shard(wrapped(model_class), embedding=True)
            optimizer = torch.optim.SGD(model.parameters(), 0.5)
            for enabled in (True, False):
                model.lighthouse(enabled)({"input_ids": ids(seed=10 + rank)}).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            state = {name: full(value) for name, value in model.unwrap().state_dict().items()}
            if rank == 0:
                torch.save(state, folder / f"{model_class.__name__}.pt")


def test_two_processes_train_as_one(tmp_path):
    torch.multiprocessing.spawn(two_processes, (tmp_path,), nprocs=2)
    for model_class in MODELS:
        model = wrapped(model_class)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for enabled in (True, False):
            model.lighthouse(enabled)({"input_ids": torch.cat([ids(seed=10), ids(seed=11)])}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found = torch.load(tmp_path / f"{model_class.__name__}.pt")
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")
