"""`train.py` on a GPU from the command to the report: trains, exports, scores, and a sweep shares the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
SMALL = ["model=femto", "trainer=gpu", "trainer.compile=off", "trainer.max_steps=20", "trainer.val_sequences=8"]


def train(repository: Path, *words: str) -> None:
    for package in ("hydra", "grain", "lm_eval", "sympy"):
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, str(repository / "train.py"), *words],
        cwd=repository,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.cache_dir={tmp_path_factory.mktemp('cache')}"


def test_one_run(repository: Path, tmp_path: Path, cache: str) -> None:
    folder = tmp_path / "run"
    train(repository, *SMALL, cache, "evaluation.limit=4", f"hydra.run.dir={folder}")
    assert json.loads((folder / "status.json").read_text())["state"] == "FINISHED"
    env = json.loads((folder / "env.json").read_text())
    assert env["device"] == "cuda"
    assert env["device_name"]
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["precision"] == "bf16-mixed"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["val_loss"] < 7
    assert summary["peak_memory_bytes"] > summary["optimizer_state_bytes"] > 0
    assert list((folder / "model").glob("*.safetensors"))
    assert (folder / "evaluation" / "results.json").exists()
    assert (folder / "report.html").exists()


def test_a_sweep_shares_the_gpu(repository: Path, tmp_path: Path, cache: str) -> None:
    words = ["optimizer=adamw,lion", "evaluation=none", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    train(repository, "-m", *SMALL, cache, *words)
    states = [json.loads(path.read_text())["state"] for path in (tmp_path / "sweep").glob("*/status.json")]
    assert states == ["FINISHED"] * 2
