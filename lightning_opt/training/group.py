"""The group of a run's processes: joined before anything is built, left before scoring."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lightning_opt.plan import Place
from lightning_opt.training.precision import choose_device

PATIENCE = timedelta(minutes=30)  # of a rank that waits for another, say while the first writes the model
T = TypeVar("T")


class Group:
    """What the processes of a run tell each other besides gradients; alone without arguments.

    Args:
        control: a process group for tensors on the CPU: nothing here waits for the device.
    """

    def __init__(self, control: dist.ProcessGroup | None = None):
        self._control = control
        self.first = control is None or dist.get_rank(control) == 0

    def shared(self, value: T | None) -> T:
        """The first rank's value, on every rank."""
        box = [value]
        if self._control is not None:
            dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes; every rank must ask."""
        return bool(self.max(int(flag)))

    def max(self, number: int) -> int:
        """The largest number that a rank has; every rank must ask, and none gets its answer before all have."""
        if self._control is None:
            return number
        box = torch.tensor([number])
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self._control)
        return int(box.item())


@contextmanager
def joined(place: Place, trainer: Mapping[str, Any]) -> Iterator[Group]:
    """Joins the other processes of this run, if there are any, and leaves them at the end.

    Lightning finds the process group made, and its place in torchrun's variables, which are set for a Slurm step too.

    Args:
        place: which process this is.
        trainer: the ``trainer`` group of the configuration.

    Raises:
        ConfigError: this machine has fewer GPUs than were asked for.
    """
    rank_zero_only.rank = place.rank  # else what RANK or SLURM_PROCID says, also where it is none of ours
    device = choose_device(trainer["accelerator"], trainer["devices"])
    if trainer["devices"] * trainer["num_nodes"] == 1:
        yield Group()
        return
    if place.launcher == "srun":
        first_node = SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_NODELIST"])
        meeting = {"MASTER_ADDR": first_node, "MASTER_PORT": str(15000 + int(os.environ["SLURM_JOB_ID"][-4:]))}
        os.environ |= {**meeting, **os.environ, **place.environment(trainer["devices"])}
    if device == "cuda":
        torch.cuda.set_device(place.local_rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    yield Group(dist.new_group(backend="gloo", timeout=PATIENCE))
    # Not after an exception: what this rank has to say must be written before the others find it gone.
    dist.barrier()
    dist.destroy_process_group()
