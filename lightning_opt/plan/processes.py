"""Which of a run's processes this one is, as torchrun and srun tell it in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A process among those of one run.

    Attributes:
        rank: number over all nodes.
        local_rank: number on this node.
        world_size: processes over all nodes.
        launcher: who started them, ``torchrun`` or ``srun``; None for a process of its own.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    launcher: str | None = None

    @property
    def first(self) -> bool:
        """Whether this process claims the folder, writes and speaks."""
        return self.rank == 0

    def environment(self, devices: int) -> dict[str, str]:
        """What torchrun would set for this process, but for the meeting point.

        Args:
            devices: processes per node.
        """
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "GROUP_RANK": str(self.rank // devices),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(devices),
        }


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """Reads the environment: torchrun's variables, else those of a Slurm job step with several tasks."""
    if "TORCHELASTIC_RUN_ID" in environment:
        rank, local, world = (int(environment[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        return Place(rank, local, world, "torchrun")
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
        return Place(*(int(environment[name]) for name in names), "srun")
    return Place()
