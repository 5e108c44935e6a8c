"""The recipe for somebody else's project, as they would run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

NOT_NEEDED = ["hydra", "omegaconf", "transformers", "lm_eval", "grain", "datasets", "matplotlib"]
ROOMS = ["launch", "job", "training", "models", "data", "evaluation", "reports", "run_folder", "anatomy"]

WATCHED = """
import json, runpy, sys
import lightning.pytorch  # whatever it, or torchmetrics, finds installed and imports is not our doing
before = set(sys.modules)
runpy.run_path(sys.argv[1], run_name="__main__")
print("MODULES", json.dumps(sorted(set(sys.modules) - before)))
"""


def test_it_runs_learns_and_imports_nothing_else_of_ours(repository: Path, tmp_path: Path) -> None:
    script = repository / "recipes" / "your_own_lightning.py"
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WATCHED, str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = map(float, re.search(r"loss (\S+) -> (\S+)", done.stdout).groups())
    assert first > 3
    assert last < 0.5
    assert "'grad_norm'" in done.stdout
    modules = set(json.loads(done.stdout.split("MODULES ")[1]))
    assert not modules & {*NOT_NEEDED, *(f"lightning_opt.{room}" for room in ROOMS)}
    assert {"lightning_opt.optim.lion", "lightning_opt.callbacks.stability"} <= modules
    callbacks = {name for name in modules if name.startswith("lightning_opt.callbacks.")}
    assert callbacks == {f"lightning_opt.callbacks.{name}" for name in ("stability", "batches")}


def test_it_fits_on_a_screen(repository: Path) -> None:
    lines = (repository / "recipes" / "your_own_lightning.py").read_text().splitlines()
    code = [line for line in lines if line.strip() and not line.strip().startswith(('"""', "#"))]
    assert len(code) <= 30
