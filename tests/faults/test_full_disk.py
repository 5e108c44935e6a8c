"""A disk that runs full under a whole run (row 8): training goes on, and what found no room is written later."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import driver
import pytest
from test_checkpoint_faults import in_a_small_disk

import lightning_opt.reports
from lightning_opt import checkpoints
from lightning_opt.launch import main
from lightning_opt.run_folder import RunFolder, read_events, read_json, read_metrics, read_status

FORK = multiprocessing.get_context("fork")  # a file system of its own, without another import of torch
STEPS, FULL = 60, 10
TINY = (
    *driver.SMALLEST,
    "logger=none",
    "trainer.num_threads=1",
    f"trainer.max_steps={STEPS}",
    "trainer.global_batch_size=1",
    "trainer.micro_batch_size=1",
    "trainer.val_sequences=0",
    "trainer.log_every_n_steps=1",
    "callbacks.checkpoint.every_n_steps=8",
    "+callbacks.filler._target_=filler.Filler",
    f"+callbacks.filler.fill={FULL}",
)


def train_on_a_full_disk(place: Path, output: str, more: list[str], told: Connection) -> None:
    disk = place / "disk"
    disk.mkdir()
    try:
        small = in_a_small_disk(disk, megabytes=24)
    except OSError:
        small = False
    if not small:
        told.send(None)
        return
    for number, name in ((1, output), (2, "/dev/full" if output == "/dev/full" else "err")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["train.py"]
    os.chdir(place)
    lightning_opt.reports.__dict__["write"] = lambda folder: None  # drawing takes seconds
    code = main([*TINY, "data.path=texts", "data.cache_dir=cache", "hydra.run.dir=disk/run", *more])
    folder = RunFolder(disk / "run")
    told.send(
        {
            "code": code,
            "status": read_status(folder.status),
            "metrics": read_metrics(folder.metrics),
            "rows": folder.metrics.read_text().splitlines(),
            "events": [(event["kind"], event.get("step")) for event in read_events(folder.events)],
            "summary": read_json(folder.summary),
            "log": folder.log.read_text(),
            "out": Path(output).read_text() if output != "/dev/full" else "",
            "checkpoints": [checkpoints.verify(found.path).step for found in checkpoints.find(folder.checkpoints)],
        }
    )


def run(place: Path, *more: str, output: str = "out") -> Any:
    """What a run in a small file system of its own left there, and what it said.

    Args:
        place: a folder; ``disk`` in it is the file system.
        more: overrides.
        output: file that takes what the run prints; ``/dev/full`` takes none of it, nor of its errors.
    """
    driver.write_texts(place / "texts")
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=train_on_a_full_disk, args=(place, output, list(more), theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(200)
        answer = ours.recv()
    except EOFError:
        pytest.fail((place / "err").read_text() if (place / "err").exists() else "it died")
    finally:
        process.kill()
        process.join(60)
    if answer is None:
        pytest.skip("needs the right to mount a tmpfs (user namespaces)")
    return SimpleNamespace(**answer, err=(place / "err").read_text() if (place / "err").exists() else "")


@pytest.mark.fault(8, "the disk under a whole run is full for a while: it trains to its end, every row and event there")
def test_a_disk_that_is_full_for_a_while(tmp_path: Path) -> None:
    """What it prints goes to the same disk."""
    end = run(tmp_path, f"+callbacks.filler.free={STEPS - 10}", output="disk/out")
    assert (end.code, end.status["state"], end.status["step"]) == (0, "FINISHED", STEPS)
    assert end.metrics["step"] == list(range(1, STEPS + 1))
    assert len({row.count(",") for row in end.rows}) == 1
    assert [step for kind, step in end.events if kind == "checkpoint_failed"] == [16, 24, 32, 40, 48]
    assert end.summary["failed_saves"] == 5
    assert end.checkpoints == [STEPS, 56]
    assert "Traceback" not in end.out + end.err
    assert end.out.count("metrics.csv cannot be written (No space left on device): its rows wait in memory") == 1


@pytest.mark.fault(8, "nothing that a run prints finds room: it trains to its end all the same")
def test_an_output_that_is_full_from_the_start(tmp_path: Path) -> None:
    end = run(tmp_path, f"+callbacks.filler.free={FULL + 1}", output="/dev/full")
    assert (end.code, end.status["state"], end.status["step"]) == (0, "FINISHED", STEPS)
    assert "FINISHED" in end.log


@pytest.mark.fault(8, "SIGTERM while the disk is full: 143, PREEMPTED, and the checkpoint that is left is named")
def test_a_signal_while_the_disk_is_full(tmp_path: Path) -> None:
    end = run(tmp_path, "+callbacks.filler.stop=40")
    assert (end.code, end.status["state"], end.status["step"]) == (143, "PREEMPTED", 40)
    assert end.checkpoints == [8]
    assert "not saved: the last checkpoint is that of step 8" in end.out
    assert "saved at step 40" not in end.out
    assert "Traceback" not in end.out + end.err
