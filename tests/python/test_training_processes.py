"""`lighthouse pretrain` on two processes of a CPU, as torchrun starts them: copies (DDP), shards (FSDP2), DeepSpeed.

torchrun starts one of the runs; the processes of the others are forked, since importing takes longer than a run.
accelerate shards on accelerators alone, and on a CPU runs copies without a word; `lighthouse pretrain` refuses that.
For the test `shard_on_cpu` tells accelerate that a CPU will do; what then runs is torch's `fully_shard`, on gloo.
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
from accelerate.state import AcceleratorState, DistributedType
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import forked
from lighthouse.cli import main
from lighthouse.training import checks, run
from training_runs import CHECKPOINTING, status

SMALL = (
    "pretrain --model nano --context 128 --held_out 2 --steps 4 --share 0.5 --eval_steps 2 --logging_steps 1 "
    "--pool_ratios 1/2 1/4 --select_topk 4 --use_cpu --save_steps 2 --report_to none --disable_tqdm true"
).split()


def train(arguments, do=None):
    """The command, in a process of its own; says which classes its model is of at the end."""
    finish = run.Run._finish

    def told(self, trainer, *args):
        print("MODEL", type(trainer.model).__mro__[0].__name__, type(trainer.model_wrapped).__name__, flush=True)
        return finish(self, trainer, *args)

    run.Run._finish = told
    if do is not None:
        do()
    sys.exit(main(arguments))


def shard_on_cpu():
    plain = AcceleratorState.__init__

    def shards(self, *args, fsdp_plugin=None, **kwargs):
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.fsdp_plugin = fsdp_plugin or getattr(self, "fsdp_plugin", None)
        if self.fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = shards
    checks.NOT_SHARDED_ON = ()


def start(tmp_path, arguments, do=None, ranks=None):
    """The status of the command, in a process or one for each of `ranks`, and what they said."""
    log = tmp_path / "log"
    log.unlink(missing_ok=True)
    processes = [forked.start(train, [*SMALL, *arguments], do, log=log, environment=rank) for rank in ranks or [{}]]
    return max(status(process) for process in processes), log.read_text()


def losses(folder):
    points = json.loads((folder / "results.json").read_text())["held_out"]
    return [(point["step"], point["loss"]) for point in points]


def test_copies(tmp_path, text, monkeypatch):
    """By torchrun. Accumulation, checkpointing of activations and bfloat16 too: one sequence of each in two turns.

    Without a GPU they are joined although nothing says that the CPU is to be used.
    """
    if not torch.accelerator.is_available():
        monkeypatch.setitem(globals(), "SMALL", [option for option in SMALL if option != "--use_cpu"])
    options = ["--gradient_accumulation_steps", "2", f"--{CHECKPOINTING}", "true", "--bf16", "true"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    command = [sys.executable, *launch, *SMALL, "--data", str(text), "--output_dir", str(tmp_path / "run"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
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
    ended, said = start(tmp_path, run, shard_on_cpu, forked.two_ranks())
    assert ended == 0, said
    assert "MODEL FSDPLlamaForCausalLM" in said
    copies = ["--data", str(text), "--output_dir", str(tmp_path / "copies")]
    ended, said = start(tmp_path, copies, ranks=forked.two_ranks())
    assert ended == 0, said
    expected = losses(tmp_path / "copies")
    assert losses(tmp_path / "run") == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in expected]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert type(model) is LlamaForCausalLM and all(weight.isfinite().all() for weight in model.parameters())

    for name in ("checkpoint-2", "checkpoint-3", "checkpoint-4", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    undisturbed = losses(tmp_path / "run")
    shutil.copy(tmp_path / "run" / "config.yaml", tmp_path)
    again = ["--config", str(tmp_path / "config.yaml"), "--resume"]
    ended, said = start(tmp_path, again, shard_on_cpu, forked.two_ranks())
    assert ended == 0, said
    assert "checkpoint-1" in said
    assert losses(tmp_path / "run") == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in undisturbed]


def test_shards_on_a_cpu_are_refused(tmp_path, text):
    ended, said = start(tmp_path, ["--data", str(text), "--output_dir", str(tmp_path / "run"), "--fsdp", "full_shard"])
    assert ended == 2 and "fsdp with 1 process on a cpu device" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed(tmp_path, text):
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    settings = {"zero_optimization": {"stage": 2}, **dict.fromkeys((*automatic, "gradient_clipping"), "auto")}
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    run = ["--data", str(text), "--output_dir", str(tmp_path / "run"), "--deepspeed", str(tmp_path / "zero.json")]
    ended, said = start(tmp_path, run, ranks=[{**rank, "DS_ACCELERATOR": "cpu"} for rank in forked.two_ranks()])
    assert ended == 0, said
    assert "DeepSpeedEngine" in said
    found = losses(tmp_path / "run")
    assert found[-1][1] < found[0][1]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")) is LlamaForCausalLM


@pytest.mark.slow
def test_compiled(tmp_path, text):
    """The switch to dense compiles once more and breaks no graph."""
    options = ["--torch_compile", "true", "--torch_compile_backend", "aot_eager"]
    for name, more in (("compiled", options), ("eager", [])):
        ended, said = start(tmp_path, ["--data", str(text), "--output_dir", str(tmp_path / name), *more])
        assert ended == 0 and "deprecated" not in said, said
    expected = losses(tmp_path / "eager")
    assert losses(tmp_path / "compiled") == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in expected]


def test_a_port_in_use_is_named(tmp_path, text):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        first = {**forked.two_ranks()[0], "MASTER_PORT": port}
        ended, said = start(tmp_path, ["--data", str(text), "--output_dir", str(tmp_path / "run")], ranks=[first])
    assert ended == 2 and f"could not connect at 127.0.0.1:{port}" in said
    assert "--master_port" in said and "Traceback" not in said


if __name__ == "__main__":  # as torchrun starts it
    train(sys.argv[1:])
