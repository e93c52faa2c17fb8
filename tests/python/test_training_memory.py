"""The estimate of a step's memory: what autograd really keeps, what was measured, and what is refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from lighthouse import LighthouseWrapper  # noqa: E402
from lighthouse.core.method import Method  # noqa: E402
from lighthouse.core.settings import LighthouseSettings  # noqa: E402
from lighthouse.training import memory  # noqa: E402
from lighthouse.training.memory import GIB, DoesNotFit, check_memory, device_memory, estimate  # noqa: E402
from lighthouse.training.model import model_of, new_config  # noqa: E402

TOKENS = 1024
SETTINGS = {"min_tokens": 0, "max_share": 1.0}
PUBLISHED, BOTH, WINDOW = Method(), Method(local_window=64), Method(select_topk=0, local_window=64)


def config(layers=6, **changes):
    """Measures that all differ, so that none can stand for another."""
    found = new_config("nano", TOKENS)
    measures = {
        "num_hidden_layers": layers,
        "hidden_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 320,
    }
    for name, value in (measures | changes).items():
        setattr(found, name, value)
    return found


def kept_by_autograd(layers, rows, dtype, bf16, method, checkpointing) -> int:
    """Bytes of the storages that a forward saves for the backward, the weights' own left out."""
    model = model_of(config(layers), 0).to(dtype)
    model = LighthouseWrapper(model, dense_layers=1, **SETTINGS, **(method or BOTH).values()).train()
    model.lighthouse(method is not None)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(0, 384, (rows, TOKENS))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(input_ids=ids, labels=ids)
    return sum(storage.nbytes() for storage in storages.values())


KEPT = [
    # dtype, autocast, method or None for dense, checkpointing, rows
    ("float32_dense", torch.float32, False, None, False, 1),
    ("float32_published", torch.float32, False, PUBLISHED, False, 1),
    ("float32_with_a_window", torch.float32, False, BOTH, False, 1),
    ("float32_window_alone", torch.float32, False, WINDOW, False, 1),
    ("autocast_dense", torch.float32, True, None, False, 1),
    ("autocast_published", torch.float32, True, PUBLISHED, False, 1),
    ("autocast_with_a_window", torch.float32, True, BOTH, False, 1),
    ("bfloat16_dense", torch.bfloat16, False, None, False, 1),
    ("bfloat16_published", torch.bfloat16, False, PUBLISHED, False, 1),
    ("bfloat16_with_a_window", torch.bfloat16, False, BOTH, False, 1),
    ("two_rows", torch.float32, True, BOTH, False, 2),
    ("checkpointed", torch.float32, False, None, True, 1),
    ("checkpointed_autocast", torch.float32, True, None, True, 1),
]


@pytest.mark.parametrize("dtype, bf16, method, checkpointing, rows", [k[1:] for k in KEPT], ids=[k[0] for k in KEPT])
def test_four_more_layers_keep_what_is_estimated(dtype, bf16, method, checkpointing, rows):
    """The difference of ten layers and six, so that neither the loss nor what all layers share is in it."""

    def estimated(layers):
        found = estimate(
            config(layers),
            TOKENS,
            rows=rows,
            dtype=dtype,
            bf16=bf16,
            lighthouse=LighthouseSettings(method, dense_layers=1, **SETTINGS) if method else None,
            gradient_checkpointing=checkpointing,
        )
        return sum(found.activations.values())

    def kept(layers):
        return kept_by_autograd(layers, rows, dtype, bf16, method, checkpointing)

    assert estimated(10) - estimated(6) == pytest.approx(kept(10) - kept(6), rel=0.01)


MEASURED = {
    "dense": (None, 72.91),
    "published": (LighthouseSettings(PUBLISHED), 57.09),
    "with_a_window": (LighthouseSettings(), 74.36),
    "a_window_alone": (LighthouseSettings(WINDOW), 72.91),
}


@pytest.mark.parametrize("name", MEASURED)
def test_what_was_measured_on_an_h200(name):
    """bench/results/model-step-h200.json."""
    lighthouse, measured = MEASURED[name]
    found = estimate(new_config("paper", 98_304), 98_304, dtype=torch.bfloat16, lighthouse=lighthouse, compiled=True)
    assert 0.99 * measured <= found.peak / GIB <= measured


def peak(**changes) -> int:
    given = new_config("paper", 32_768)
    given.vocab_size = 128_256
    return estimate(given, 32_768, **changes).peak


LESS = [
    ("lighthouse", {"lighthouse": LighthouseSettings(PUBLISHED)}, {}),
    ("no_local_window", {"lighthouse": LighthouseSettings(PUBLISHED)}, {"lighthouse": LighthouseSettings()}),
    ("a_window_alone", {"lighthouse": LighthouseSettings(WINDOW)}, {"lighthouse": LighthouseSettings()}),
    ("checkpointing", {"gradient_checkpointing": True}, {}),
    ("compiled", {"compiled": True}, {}),
    ("autocast", {"bf16": True}, {}),
    ("bfloat16_weights", {"dtype": torch.bfloat16}, {"bf16": True}),
    ("a_smaller_optimizer", {"optimizer": "adafactor"}, {}),
    ("shards", {"shards": 8}, {}),
    ("no_logits", {}, {"logits": True}),
    ("one_row", {}, {"rows": 2}),
    ("one_forward_a_step", {}, {"accumulation": 4}),
]


@pytest.mark.parametrize("less, more", [c[1:] for c in LESS], ids=[c[0] for c in LESS])
def test_it_takes_less(less, more):
    assert peak(**less) < peak(**more)


def test_optimizer_states_are_counted_by_the_trainers_names():
    found = {
        name: estimate(config(), TOKENS, optimizer=name).optimizer / estimate(config(), TOKENS).weights
        for name in ("adamw_torch_fused", "adamw_8bit", "lion_32bit", "adafactor", "sgd")
    }
    assert found == {"adamw_torch_fused": 2, "adamw_8bit": 0.5, "lion_32bit": 1, "adafactor": 0, "sgd": 0}


def test_the_table():
    found = estimate(new_config("paper", 98_304), 98_304, rows=2, lighthouse=LighthouseSettings())
    lines = str(found).splitlines()
    assert lines[0] == "A Lighthouse step of 2 x 98,304 tokens, 268.2M parameters:"
    assert len(lines) == 12 and all(line.endswith(" GiB") for line in lines[1:])
    assert lines[-1].split()[:4] == ["at", "once,", "at", "least"]


def fits_in(total, monkeypatch, **changes):
    monkeypatch.setattr(memory, "device_memory", lambda device: total)
    check_memory(estimate(new_config("paper", 98_304), 98_304, **changes), "cpu")


def test_only_what_is_clearly_too_large_is_refused(monkeypatch):
    needed = estimate(new_config("paper", 98_304), 98_304).peak
    fits_in(needed, monkeypatch)
    fits_in(int(needed / 1.09), monkeypatch)
    fits_in(None, monkeypatch)
    with pytest.raises(DoesNotFit, match="out of memory: a training step needs at least .* GiB, but this machine has"):
        fits_in(int(needed / 1.11), monkeypatch)


def test_the_ways_out_are_those_left(monkeypatch):
    with pytest.raises(ValueError, match="use a shorter --context, --gradient_checkpointing true, a smaller --per_dev"):
        fits_in(GIB, monkeypatch)
    with pytest.raises(ValueError, match="use a shorter --context, a smaller --per_device_train_batch_size"):
        fits_in(GIB, monkeypatch, gradient_checkpointing=True)


def test_a_whole_model_of_no_size_fits_here():
    given = new_config("llama-8b", 1_048_576)
    with pytest.raises(DoesNotFit):
        check_memory(estimate(given, 1_048_576, rows=64), "cpu")


GROUPS = [
    # lines of /proc/self/cgroup, files with limits, what is found
    ("version_2", "0::/job/part", {"job/part/memory.max": "max", "job/memory.max": "5000"}, [5000]),
    ("version_2_in_a_container", "0::/of/the/host", {"memory.max": "7000"}, [7000]),
    ("version_1", "4:memory:/job", {"memory/job/memory.limit_in_bytes": "3000"}, [3000]),
    ("version_1_with_others", "9:cpu,memory:/\n8:pids:/", {"memory/memory.limit_in_bytes": "10"}, [10]),
    ("none", "8:pids:/", {"memory.max": "1"}, []),
]


@pytest.mark.parametrize("lines, files, limits", [g[1:] for g in GROUPS], ids=[g[0] for g in GROUPS])
def test_limits_of_control_groups(tmp_path, lines, files, limits):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text(lines + "\n")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    assert list(memory._cgroup_limits(root, own)) == limits


def test_memory_of_this_machine():
    assert 2**28 < device_memory("cpu") < 2**50 and device_memory("meta") is None
