"""Processes that tests may kill, forked from a server which has imported Transformers once: importing it takes longer
than a small run does.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import torch

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    ["lighthouse.cli", "lighthouse.training", "transformers.models.llama.modeling_llama", "pytest"]
)


def start(do, *args, log: Path, environment: dict[str, str] | None = None):
    """A process that does `do(*args)`; what it says goes to the end of the file `log`."""
    process = _server.Process(target=_within, args=(do, args, log, environment or {}))
    process.start()
    return process


def _within(do, args, log, environment):
    os.environ.update(environment)
    log.parent.mkdir(parents=True, exist_ok=True)
    output = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(output, 1), os.dup2(output, 2)
    torch.set_num_threads(1)
    gc.freeze()  # the Trainer collects garbage at its start, and all that was imported is no garbage
    do(*args)


def two_ranks() -> list[dict[str, str]]:
    """The environments of a run's two processes, as torchrun sets them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


class AtChange:
    """Kills the process at its `number`-th change of the run's folder: a file opened to write, renamed or removed.

    What PyTorch and safetensors write is cut off in the middle of the file, other files before their first byte.
    """

    def __init__(self, folder: Path, number: int):
        self.folder, self.number, self.changes = str(folder), number, 0

    def __call__(self):
        sys.addaudithook(self.audit)
        import safetensors.torch
        import transformers.modeling_utils

        for module, name in ((torch, "save"), (safetensors.torch, "save_file"), (transformers.modeling_utils, None)):
            setattr(module, name or "safe_save_file", self.cut_off(getattr(module, name or "safe_save_file")))

    def audit(self, event, args):
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            self.change(args[0], args[2])
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            self.change(args[0])

    def change(self, path, flags=None):
        if str(path).startswith(self.folder) or not os.path.isabs(str(path)):  # rmtree's are relative
            self.changes += 1
            if self.changes == self.number:
                if flags is not None:
                    os.open(path, flags)  # it is there and empty
                os.kill(os.getpid(), signal.SIGKILL)

    def cut_off(self, save):
        def and_kill(what, path, *args, **kwargs):
            if self.changes + 1 == self.number:
                save(what, path, *args, **kwargs)
                os.truncate(path, os.path.getsize(path) // 2)
            self.change(path)
            return save(what, path, *args, **kwargs)

        return and_kill
