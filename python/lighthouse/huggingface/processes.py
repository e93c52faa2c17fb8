"""How many processes a launcher says it has started, by what it left in the environment."""

from __future__ import annotations

import os

# Most reliable first. Not SLURM_NTASKS: it is set in a batch script too, where one process runs.
COUNTED_BY = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def launched() -> tuple[str, int]:
    """The variable that gives the number, and the number; `("", 1)` if there is none."""
    for name in COUNTED_BY:
        number = os.environ.get(name, "")
        if number.isdecimal() and int(number) > 1:
            return name, int(number)
    return "", 1


def strangers(found: int) -> str | None:
    """What is wrong where a launcher started several processes and this one is in a group of `found`; None if nothing.

    Such processes would each train alone, on the same rows and into the same folder.
    """
    name, number = launched()
    if number == 1 or found > 1:
        return None
    return (
        f"{name}={number}: a launcher has started {number} processes, but they are not joined: each would train alone, "
        f"on the same rows and into the same folder; start them with torchrun --nproc_per_node {number}, or one "
        f"process alone with {name}=1"
    )
