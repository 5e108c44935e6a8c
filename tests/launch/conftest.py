"""A command in a process of its own, and a stand-in for `job` so that no test here trains."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from laboratory import Lab

# Runs train.py as `python train.py` does, then tells on stdout whether torch was imported.
_WATCH = """
import runpy, sys
sys.argv = [{script!r}, *sys.argv[1:]]
code = 0
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as stop:
    code = stop.code
print("heavy:", sorted({{"torch", "lightning", "transformers", "datasets", "lm_eval"}} & set(sys.modules)))
sys.exit(code)
"""


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def train_py(repository, tmp_path):
    """Runs `train.py` with these arguments in an empty folder."""

    def run(*arguments: str, **environment: str) -> Done:
        code = _WATCH.format(script=str(repository / "train.py"))
        path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def jobs(monkeypatch, tmp_path) -> list[dict[str, Any]]:
    """Jobs that `launch` handed down; they do nothing and answer what their seed says: seed 500 + code."""
    import lightning_opt.job
    import lightning_opt.reports
    from lightning_opt.run_folder import Status, config_hash

    seen: list[dict[str, Any]] = []

    def run(config: dict[str, Any], folder: Any, **keywords: Any) -> int:
        seen.append({"config": config, "folder": folder, **keywords})
        code = config["seed"] - 500 if 500 <= config["seed"] < 700 else 0
        if code == 99:
            raise RuntimeError("a job that breaks")
        state = {0: "FINISHED", 3: "DIVERGED", 143: "PREEMPTED"}.get(code, "FAILED")
        Status(folder.status, config_hash(config)).set(state)
        return code

    monkeypatch.setitem(lightning_opt.job.__dict__, "run", run)
    monkeypatch.setitem(lightning_opt.reports.__dict__, "write_sweep", lambda folder: None)
    monkeypatch.setitem(lightning_opt.reports.__dict__, "sweep_lines", lambda folder: [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return seen


@pytest.fixture
def lab(monkeypatch, tmp_path) -> Lab:
    """Jobs that run in this process to a loss that the test gives."""
    import lightning_opt.job
    import lightning_opt.reports

    lab = Lab()
    monkeypatch.setitem(lightning_opt.job.__dict__, "run", lab.run)
    monkeypatch.setitem(lightning_opt.reports.__dict__, "write_sweep", lambda folder: None)
    monkeypatch.setitem(lightning_opt.reports.__dict__, "sweep_lines", lambda folder: [f"table of {folder}"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return lab
