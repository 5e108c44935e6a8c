"""Parts of a run that are told secrets and cannot keep them: they warn, log and fail with them, as real clients do."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger


class Client(CSVLogger):
    """A logger whose server turns its key away."""

    def __init__(self, save_dir: str, api_key: str, url: str, headers: dict[str, str], note: str) -> None:
        super().__init__(save_dir, name="client")
        self._known = (api_key, url, headers, note)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Fails as a client does."""
        raise ConnectionError(f"401 for {self._known} and {os.environ['HF_TOKEN']}")


class Telltale(pl.Callback):
    """Says its password, and ends the run with it."""

    def __init__(self, password: str, shared: str) -> None:
        self.password, self.shared = password, shared

    def state_dict(self) -> dict[str, Any]:
        """Something of ours is in every checkpoint."""
        return {"shared with": len(self.shared)}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says it in every way that reaches run.log or the terminal."""
        logging.getLogger("lightning_opt.telltale").info("told: the password is %s", self.password)
        logging.getLogger("lightning.pytorch").error("told to Lightning: %s", self.shared)
        warnings.warn(f"told: {os.environ['WANDB_API_KEY']}", UserWarning, stacklevel=1)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fails once everything is written."""
        raise PermissionError(f"the vault refused {self.password!r} ({os.environ['HF_TOKEN']}, {self.shared})")
