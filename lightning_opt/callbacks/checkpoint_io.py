"""Lightning's checkpoints as folders that can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_opt.checkpoints import Store, read


class CheckpointIO(TorchCheckpointIO):
    """Reads folders of `lightning_opt.checkpoints`, and writes them through a store; files as Lightning does.

    `callbacks.Checkpoint` installs it; ``Trainer(plugins=[CheckpointIO()])`` alone makes ``ckpt_path`` take a folder.

    Args:
        store: the run's, on the rank that writes.
        verified: a folder whose files somebody has compared with its manifest already.
    """

    def __init__(self, store: Store | None = None, verified: Path | None = None) -> None:
        self._store, self.verified = store, verified

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: dict[str, Any] | None = None
    ) -> None:
        """Hands a checkpoint to the store, where `storage_options` are what `Store.save` wants besides the step."""
        if self._store is None or storage_options is None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            self._store.save(checkpoint, step=checkpoint["global_step"], **storage_options)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The tree of a folder, verified, on the CPU.

        Raises:
            Damaged: it is not what was written, or is gone since it was verified.
        """
        verified = Path(path) == self.verified
        if not (verified or Path(path).is_dir()):
            return super().load_checkpoint(path, *args, **kwargs)
        return read(path, verified=verified)
