"""Which checkpoint a run starts from, and what is done to get it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from lightning_opt.checkpoints import Store
from lightning_opt.job import resuming
from lightning_opt.run_folder import RunFolder


def test_a_checkpoint_that_was_being_replaced_comes_back_first(tmp_path: Path) -> None:
    """Killed between the two renames that put a new one of the same step in its place."""
    folder = RunFolder(tmp_path)
    store = Store(folder.checkpoints)
    for step in (2, 4):
        store.save({"state_dict": {"w": torch.full((2,), step)}}, step=step, meta={}, wait=True)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    newest = folder.checkpoints / "step-000004"
    newest.rename(newest.with_name(f".step-000004.{dead.pid}.old"))
    config = {"resume": "auto", "resume_allow": []}
    start = resuming.choose(folder, config, {"length": {"max_steps": 8, "schedule": {}}})
    assert start is not None
    assert (start.step, start.path) == (4, newest)
