"""`lighthouse pretrain` on two processes of a CPU, as torchrun starts them: copies (DDP), shards (FSDP2), DeepSpeed.

accelerate shards on accelerators alone, and on a CPU runs copies without a word; `lighthouse pretrain` refuses that.
For the test `SHARD_ON_CPU` tells accelerate that a CPU will do; what then runs is torch's `fully_shard`, on gloo.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from training_runs import CHECKPOINTING

DRIVER = """
import os, sys
from lighthouse.cli import main
if "SHARD_ON_CPU" in os.environ:
    from accelerate.state import AcceleratorState, DistributedType
    plain = AcceleratorState.__init__
    def shards(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.fsdp_plugin = fsdp_plugin or getattr(self, "fsdp_plugin", None)
        if self.fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
    AcceleratorState.__init__ = shards
    from lighthouse.training import run
    run.NOT_SHARDED_ON = ()
from lighthouse.training import run
finish = run.Run._finish
def told(self, trainer, *args):
    print("MODEL", type(trainer.model).__mro__[0].__name__, type(trainer.model_wrapped).__name__, flush=True)
    return finish(self, trainer, *args)
run.Run._finish = told
sys.exit(main(sys.argv[1:]))
"""

SMALL = (
    "pretrain --model nano --context 128 --held_out 2 --steps 4 --share 0.5 --eval_steps 2 --logging_steps 1 "
    "--pool_ratios 1/2 1/4 --select_topk 4 --use_cpu --save_steps 2 --report_to none --disable_tqdm true"
).split()


def start(tmp_path, arguments, processes=2, **environment):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(driver), *SMALL, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def losses(folder):
    points = json.loads((folder / "results.json").read_text())["held_out"]
    return [(point["step"], point["loss"]) for point in points]


def test_copies(tmp_path, text, monkeypatch):
    """Accumulation, checkpointing of activations and bfloat16 too: one sequence of each process in two turns.

    Without a GPU they are joined although nothing says that the CPU is to be used.
    """
    if not torch.accelerator.is_available():
        monkeypatch.setitem(globals(), "SMALL", [option for option in SMALL if option != "--use_cpu"])
    options = ["--gradient_accumulation_steps", "2", f"--{CHECKPOINTING}", "true", "--bf16", "true"]
    done = start(tmp_path, ["--data", str(text), "--output_dir", str(tmp_path / "run"), *options])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DistributedDataParallel" in done.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["settings"]["tokens_per_step"] == 2 * 2 * 128
    assert results["loss"] < results["held_out"][0]["loss"]


FSDP = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "FULL_STATE_DICT"}


def test_shards_have_the_losses_of_copies_and_go_on(tmp_path, text):
    """From a checkpoint in the first stage; the model at the end is whole."""
    run = ["--data", str(text), "--output_dir", str(tmp_path / "run"), "--fsdp", "full_shard"]
    run += ["--fsdp_config", json.dumps(FSDP), "--save_total_limit", "9", "--save_steps", "1"]
    done = start(tmp_path, run, SHARD_ON_CPU="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MODEL FSDPLlamaForCausalLM" in done.stdout
    copies = start(tmp_path, ["--data", str(text), "--output_dir", str(tmp_path / "copies")])
    assert copies.returncode == 0, copies.stdout + copies.stderr
    expected = losses(tmp_path / "copies")
    assert losses(tmp_path / "run") == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in expected]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert type(model) is LlamaForCausalLM and all(weight.isfinite().all() for weight in model.parameters())

    for name in ("checkpoint-2", "checkpoint-3", "checkpoint-4", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    undisturbed = losses(tmp_path / "run")
    shutil.copy(tmp_path / "run" / "config.yaml", tmp_path)
    again = start(tmp_path, ["--config", str(tmp_path / "config.yaml"), "--resume"], SHARD_ON_CPU="1")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "checkpoint-1" in again.stdout
    assert losses(tmp_path / "run") == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in undisturbed]


def test_shards_on_a_cpu_are_refused(tmp_path, text):
    done = start(tmp_path, ["--data", str(text), "--output_dir", str(tmp_path / "run"), "--fsdp", "full_shard"], 1)
    assert done.returncode == 2 and "fsdp with 1 process on a cpu device" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed(tmp_path, text):
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    settings = {"zero_optimization": {"stage": 2}, **dict.fromkeys((*automatic, "gradient_clipping"), "auto")}
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    run = ["--data", str(text), "--output_dir", str(tmp_path / "run"), "--deepspeed", str(tmp_path / "zero.json")]
    done = start(tmp_path, run, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DeepSpeedEngine" in done.stdout
    found = losses(tmp_path / "run")
    assert found[-1][1] < found[0][1]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")) is LlamaForCausalLM


def test_compiled(tmp_path, text):
    """The switch to dense compiles once more and breaks no graph."""
    options = ["--torch_compile", "true", "--torch_compile_backend", "aot_eager"]
    for name, more in (("compiled", options), ("eager", [])):
        done = start(tmp_path, ["--data", str(text), "--output_dir", str(tmp_path / name), *more], 1)
        assert done.returncode == 0, done.stdout + done.stderr
    expected = losses(tmp_path / "eager")
    assert losses(tmp_path / "compiled") == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in expected]
    assert "deprecated" not in done.stderr


def test_a_port_in_use_is_named(tmp_path, text):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        first = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = start(tmp_path, ["--data", str(text), "--output_dir", str(tmp_path / "run")], 1, **first)
    assert done.returncode == 2 and f"could not meet at 127.0.0.1:{port}" in done.stderr
    assert "--master_port" in done.stderr and "Traceback" not in done.stderr
