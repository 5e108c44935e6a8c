"""Which of a run's processes this one is, as torchrun and srun tell it in the environment; the CPUs it may use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_opt.plan.errors import ConfigError


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
    """Reads the environment: torchrun's variables, else those of a Slurm job step with several tasks.

    Raises:
        ConfigError: one of them is missing, or no whole number.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        return Place(*(_number(environment, name) for name in names), "torchrun")
    if "SLURM_STEP_NUM_TASKS" in environment and _number(environment, "SLURM_STEP_NUM_TASKS") > 1:
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
        return Place(*(_number(environment, name) for name in names), "srun")
    return Place()


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name)
    if value is None or not value.isdecimal():
        raise ConfigError(name, value, "must be a whole number: the environment variable says which process this is")
    return int(value)


def available_cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
