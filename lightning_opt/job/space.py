"""Whether a run's checkpoints will fit on the disk: asked before its first step, not found out after a day."""

from __future__ import annotations

import shutil
import tempfile
from typing import Any

from lightning_opt.checkpoints import bytes_needed, find
from lightning_opt.plan import ConfigError
from lightning_opt.run_folder import RunFolder

_FIELD = "hydra.run.dir"


def check_space(folder: RunFolder, model: Any, optimizer: Any, *, keep: int, averaged: bool = False) -> None:
    """Checks that the checkpoints' folder can be written, and that all it will hold, and the export, will fit.

    Args:
        folder: the run's.
        model: what is trained.
        optimizer: one of ours over it.
        keep: checkpoints that are kept at most.
        averaged: they hold averaged weights too.

    Raises:
        ConfigError: it cannot, or there is too little room; names need and room in bytes.
    """
    try:
        folder.checkpoints.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder.checkpoints) as probe:
            probe.write(b"x")
    except OSError as error:
        where = f"its checkpoints folder cannot be written: {error.strerror or error}"
        raise ConfigError(_FIELD, str(folder.path), f"must be a folder we can write to ({where})") from None
    model_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    state_bytes = sum(row["state_bytes"] for row in optimizer.routing_table())
    there = sum(checkpoint.bytes for checkpoint in find(folder.checkpoints))
    need = max(0, bytes_needed((1 + averaged) * model_bytes, state_bytes, keep) - there) + model_bytes
    free = shutil.disk_usage(folder.checkpoints).free
    if need > free:
        raise ConfigError(
            _FIELD,
            str(folder.path),
            f"needs {need:,} bytes for {keep} checkpoints, one being written, and the export; {free:,} are free there: "
            "name a folder on another disk, or keep fewer (callbacks.checkpoint.keep_last, keep_best, "
            "keep_every_n_steps)",
        )
