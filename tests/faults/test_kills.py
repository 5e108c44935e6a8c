"""SIGKILL at random instants of a whole run, as `driver` does it: the end is that of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import driver
import pytest
import torch
from safetensors.torch import save_file

from lightning_opt.run_folder import claim, read_status


@pytest.mark.slow
@pytest.mark.fault(1, "killed 20 times at random instants, the same command each time: the end is the same bits")
@pytest.mark.fault(6, "killed 20 times at random instants: nothing damaged is loaded, nothing is left over")
def test_a_run_that_is_killed_20_times_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)  # for `driver.py --seed`
    told, found = driver.trial(tmp_path, 20, seed)
    print("\n".join(told))
    assert found == []
    assert len([line for line in told if line.startswith("kill")]) == 20


KILLED = """
import os, signal, sys
from pathlib import Path
from lightning_opt.run_folder import RunFolder, claim, records
folder, _ = claim(Path("runs"), "name", "0" * 8)
records.write_json(folder.summary, {"whole": True})
(folder.path / ".model.123.tmp").mkdir()
records.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
records.write_json(sys.argv[1] == "deep" and folder.results or folder.summary, {"new": True})
"""


@pytest.mark.fault(6, "kill -9 while a record is written: the old one is whole, what was begun is cleared away")
@pytest.mark.parametrize("where", ["top", "deep"])
def test_a_record_that_was_being_written_leaves_nothing_over(repository: Path, tmp_path: Path, where: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, where], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(repository)}
    )
    assert done.returncode == -signal.SIGKILL
    [path] = tmp_path.glob("runs/name/*-*")
    assert len([*path.rglob("*.part"), *path.rglob("*.tmp")]) == 2
    folder, adopted = claim(tmp_path / "runs", "name", "0" * 8)
    assert adopted
    assert folder.path == path
    assert [*path.rglob("*.part"), *path.rglob("*.tmp")] == []
    assert json.loads(folder.summary.read_text()) == {"whole": True}
    assert read_status(folder.status)["owner"]["pid"] == os.getpid()


# What the driver compares must differ where a bit does, or the 20 kills would prove nothing.


def made(folder: Path) -> Path:
    """A run folder in small."""
    checkpoint, model, evaluation = folder / "checkpoints/step-000003", folder / "model", folder / "evaluation"
    for each in (checkpoint, model, evaluation):
        each.mkdir(parents=True)
    save_file({"w": torch.arange(3.0)}, checkpoint / "model.safetensors")
    state: dict[str, Any] = {"optimizer_states": [{"m": torch.ones(3)}], "step": 3}
    state["run"] = {"metrics": {"row": {"step": 3, "loss": 1.5, "step_ms": 7.0}, "seconds": 3.0}}
    torch.save(state, checkpoint / "state.pt")
    (checkpoint / "MANIFEST.json").write_text(json.dumps({"step": 3, "meta": {"tokens": 9}, "created": "today"}))
    shutil.copy(checkpoint / "model.safetensors", model)
    scores = {"mmlu": {"acc,none": 0.25}}
    other = {"n-samples": {}, "n-shot": {}, "versions": {}, "date": 1.0}
    (evaluation / "results.json").write_text(json.dumps({"results": scores, **other}))
    (folder / "metrics.csv").write_text("step,time_s,train/loss\n1,0.5,3.25\n2,0.9,3.125\n")
    summary = dict.fromkeys(("steps", "tokens", "train_loss", "val_loss", "val_loss_by_corpus", "evaluation"), 1)
    (folder / "summary.json").write_text(json.dumps({**summary, "state": "FINISHED", "config_hash": "0", "seconds": 1}))
    (folder / "run.log").write_text("said")
    return folder


def rewrite(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Changes the text of a file."""

    def change(folder: Path) -> None:
        path = folder / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


def flip(name: str) -> Callable[[Path], None]:
    """Changes the last bit of a file."""

    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)

    return change


def state(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Changes what a checkpoint holds beside the weights."""

    def rewritten(folder: Path) -> None:
        path = folder / "checkpoints/step-000003/state.pt"
        tree = torch.load(path, weights_only=True)
        change(tree)
        torch.save(tree, path)

    return rewritten


def ulp(tensor: torch.Tensor) -> None:
    """The next number."""
    tensor[1] = torch.nextafter(tensor[1], torch.tensor(2.0))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (flip("model/model.safetensors"), "model/model.safetensors: other bytes"),
        (flip("checkpoints/step-000003/model.safetensors"), "checkpoints/step-000003/model.safetensors: other bytes"),
        (state(lambda tree: ulp(tree["optimizer_states"][0]["m"])), "other values"),
        (state(lambda tree: tree.update(step=4)), "3, 4"),
        (state(lambda tree: tree["run"]["metrics"]["row"].update(loss=1.25)), "1.5, 1.25"),
        (rewrite("checkpoints/step-000003/MANIFEST.json", "9", "8"), "9, 8"),
        (rewrite("metrics.csv", "3.125", "3.126"), "'3.125', '3.126'"),
        (rewrite("metrics.csv", "2,0.9,3.125\n", ""), "2 values, 1 values"),
        (rewrite("evaluation/results.json", "0.25", "0.5"), "0.25, 0.5"),
        (rewrite("summary.json", "FINISHED", "DIVERGED"), "'FINISHED', 'DIVERGED'"),
        (lambda folder: (folder / "checkpoints/.step-000003.12.part").write_text(""), "left over"),
        (lambda folder: (folder / ".rank-0.json").write_text(""), "left over"),
        (lambda folder: (folder / "model/extra").write_text(""), "only in one folder: model/extra"),
        (lambda folder: (folder / "metrics.csv").unlink(), "only in one folder: metrics.csv"),
        (rewrite("metrics.csv", "0.9", "1.9"), None),
        (rewrite("evaluation/results.json", "1.0", "2.0"), None),
        (rewrite("run.log", "said", "said more"), None),
        (lambda folder: (folder / "events.jsonl").write_text(""), None),
        (state(lambda tree: tree["run"]["metrics"].update(seconds=9.0)), None),
    ],
)
def test_what_the_driver_calls_different(tmp_path: Path, change: Callable[[Path], None], told: str | None) -> None:
    folders = made(tmp_path / "a"), made(tmp_path / "b")
    assert driver.differences(*folders) == []
    change(folders[1])
    found = driver.differences(*folders)
    assert told in " ".join(found) if told else found == []
