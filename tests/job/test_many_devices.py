"""Whole runs on several devices through the front door: what they leave behind, and how they end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from test_run import FILES, Door, door, read, texts  # noqa: F401 - fixtures

from lightning_opt.run_folder import read_events, read_metrics

pytestmark = pytest.mark.slow

FAULT = """
import os
import lightning.pytorch as pl
from lightning_opt.run_folder import Diverged

class Fault(pl.Callback):
    def __init__(self, how, rank=1):
        self.how, self.rank = how, rank

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3 and trainer.global_rank == self.rank:
            if self.how == "raise":
                raise ValueError("a fault")
            if self.how == "diverge":
                raise Diverged("norm nan")
            os.kill(os.getpid(), 9)
"""


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=15)[1]


def until_line(process: subprocess.Popen[str], start: str) -> None:
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith(start):
        assert line or process.poll() is None


def torchrun(door: Door, *overrides: str) -> list[str]:  # noqa: F811
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    python, *rest = door.command(*overrides)
    return [python, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), *rest]


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_two_devices_give_the_run_of_one(door: Door, optimizer: str) -> None:  # noqa: F811
    runs = {"one": (), "ddp": ("trainer=ddp",), "fsdp": ("trainer=fsdp", "trainer.devices=2")}
    tables = {}
    for name, more in runs.items():
        evaluation = ("evaluation=mini", "evaluation.limit=2") if name == "fsdp" else ()
        result = door(f"optimizer={optimizer}", f"name={name}", "optimizer.implementation=eager", *more, *evaluation)
        assert result.returncode == 0, result.stdout + result.stderr
        (folder,) = (path for path in door.folders() if path.parent.name == name)
        assert [file for file in FILES if not (folder / file).exists()] == []
        assert not list(folder.glob(".rank*"))
        assert read(folder / "status.json")["state"] == "FINISHED"
        assert read(folder / "status.json")["step"] == 20
        tables[name] = read_metrics(folder / "metrics.csv")
        if more:
            assert result.stdout.count("step 20/20  100%") == 1
            assert f"{name} × 2" in result.stdout
            assert read(folder / "env.json")["world_size"] == 2
    assert read(folder / "summary.json")["evaluation"]["hellaswag"]["n"] == 2
    for name in ("ddp", "fsdp"):
        assert tables[name]["train/loss"][0] == pytest.approx(tables["one"]["train/loss"][0], abs=1e-6)
        assert tables[name]["train/loss"] == pytest.approx(tables["one"]["train/loss"], abs=2e-3)
        assert tables[name]["tokens"] == tables["one"]["tokens"]


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("how", "state", "code", "reason"),
    [
        ("raise", "FAILED", 1, "rank 1: ValueError: a fault"),
        ("diverge", "DIVERGED", 3, "norm nan"),
        ("kill", "FAILED", 1, "rank 1 was killed by SIGKILL"),
    ],
)
def test_a_fault_on_one_rank_ends_the_run(
    door: Door,  # noqa: F811
    trainer: str,
    how: str,
    state: str,
    code: int,
    reason: str,
) -> None:
    (door.folder / "fault.py").write_text(FAULT)
    door.environment = lambda: {**os.environ, "PYTHONPATH": f"{door.repository}:{door.folder}"}
    result = door(f"trainer={trainer}", "callbacks.fault._target_=fault.Fault", f"callbacks.fault.how={how}")
    assert result.returncode == code, result.stdout + result.stderr
    (folder,) = door.folders()
    status = read(folder / "status.json")
    assert (status["state"], status["reason"], status["step"]) == (state, reason, 3)
    assert read_events(folder / "events.jsonl")[-1]["reason"] == reason
    assert ("Traceback" in (folder / "run.log").read_text()) == (how == "raise")
    assert (folder / "report.html").exists()


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_all_ranks_stop_after_the_same_step(door: Door, trainer: str, number: int, code: int) -> None:  # noqa: F811
    process = door.start(door.command(f"trainer={trainer}", "trainer.max_steps=100000"))
    until_line(process, "step 5")
    ranks = family(process)
    process.send_signal(number)
    process.stdout.read()
    assert process.wait(timeout=120) == code
    assert gone(ranks)
    (folder,) = door.folders()
    status = read(folder / "status.json")
    assert status["state"] == "PREEMPTED"
    assert status["step"] == read_metrics(folder / "metrics.csv")["step"][-1]


def test_no_rank_outlives_its_parent(door: Door) -> None:  # noqa: F811
    process = door.start(door.command("trainer=fsdp", "trainer.max_steps=100000"))
    until_line(process, "step 2")
    ranks = family(process)
    process.kill()
    process.wait()
    assert gone(ranks)


def test_torchrun(door: Door) -> None:  # noqa: F811
    command = torchrun(door, "trainer=fsdp", "evaluation=mini", "evaluation.limit=2")
    done = subprocess.run(command, cwd=door.folder, env=door.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = door.folders()
    assert [file for file in FILES if not (folder / file).exists()] == []
    assert read(folder / "status.json")["state"] == "FINISHED"
    assert done.stdout.count("step 20/20  100%") == 1


@pytest.mark.parametrize(("rank", "reason"), [(1, "rank 1: ValueError: a fault"), (0, "ValueError: a fault")])
def test_a_fault_under_torchrun(door: Door, rank: int, reason: str) -> None:  # noqa: F811
    (door.folder / "fault.py").write_text(FAULT)
    fault = ("callbacks.fault._target_=fault.Fault", "callbacks.fault.how=raise", f"callbacks.fault.rank={rank}")
    environment = {**os.environ, "PYTHONPATH": f"{door.repository}:{door.folder}"}
    command = torchrun(door, "trainer=ddp", *fault)
    done = subprocess.run(command, cwd=door.folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    (folder,) = door.folders()
    status = read(folder / "status.json")
    assert (status["state"], status["reason"]) == ("FAILED", reason)


def test_torchrun_is_stopped(door: Door) -> None:  # noqa: F811
    process = door.start(torchrun(door, "trainer=ddp", "trainer.max_steps=100000"))
    until_line(process, "step 5")
    ranks = family(process)
    process.terminate()
    process.stdout.read()
    process.wait(timeout=120)
    assert gone(ranks)
    (folder,) = door.folders()
    assert read(folder / "status.json")["state"] == "PREEMPTED"


def test_a_slurm_step(door: Door) -> None:  # noqa: F811
    """As srun starts two tasks on one machine."""
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_JOB_ID": str(10000 + os.getpid() % 9999)}
    tasks = []
    for rank in "01":
        place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NAME": "train"}
        tasks.append(
            subprocess.Popen(
                door.command("trainer=ddp"),
                cwd=door.folder,
                env={**door.environment(), **step, **place},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert said[1] == ""
    (folder,) = door.folders()
    assert read(folder / "status.json")["state"] == "FINISHED"


def test_the_number_of_devices_must_fit(door: Door, tmp_path: Path) -> None:  # noqa: F811
    result = door("trainer=ddp", "trainer.num_nodes=2")
    assert result.returncode == 2
    assert "trainer.num_nodes = 2: needs torchrun or srun" in result.stderr
    environment = {**door.environment(), "TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}
    done = subprocess.run(
        [sys.executable, *door.command("trainer=ddp")[1:]],
        cwd=door.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "must be the 4 that torchrun started" in done.stderr
