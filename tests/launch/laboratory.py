"""Jobs whose loss is a known function of their configuration, run in this process."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_opt.launch import main
from lightning_opt.run_folder import RunFolder, Status, SweepFolder, config_hash, write_json

RUNS_HERE = ("hydra/launcher=basic", "evaluation=none")


class Lab:
    """Jobs that `launch` handed down: each "trains" to the loss that `loss` gives; None: it fails."""

    def __init__(self) -> None:
        self.ran: list[dict[str, Any]] = []
        self.loss: Callable[[dict[str, Any]], float | None] = lambda config: 3.0

    def run(self, config: dict[str, Any], folder: RunFolder, **_: Any) -> int:
        self.ran.append(config)
        loss = self.loss(config)
        state, code = ("FAILED", 1) if loss is None else ("FINISHED", 0) if math.isfinite(loss) else ("DIVERGED", 3)
        if not code:
            write_json(folder.summary, {"val_loss": loss})
        Status(folder.status, config_hash(config)).set(state, "as told" if code else None)
        return code

    def at(self, *keys: str) -> list[tuple[Any, ...]]:
        """What ran, in order."""
        return [tuple(value(config, key) for key in keys) for config in self.ran]


def value(config: Any, key: str) -> Any:
    """A field of a configuration."""
    for part in key.split("."):
        config = config[int(part)] if isinstance(config, list | tuple) else config[part]
    return config


def sweep(*words: str) -> int:
    """A sweep whose jobs run in this process."""
    return main(["-m", *words, *RUNS_HERE])


def the_folder() -> SweepFolder:
    """The only sweep folder there is."""
    (file,) = Path("runs/sweeps").glob("*/sweep.json")
    return SweepFolder(file.parent)
