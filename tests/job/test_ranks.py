"""Ranks that another process starts: how they end, and that none is left behind. Nothing here imports torch."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from lightning_opt.job.logs import muted, run_log
from lightning_opt.job.outcomes import Outcome, left_notes, outcome_of
from lightning_opt.job.ranks import start_ranks
from lightning_opt.plan import ConfigError, Place, place
from lightning_opt.run_folder import Diverged, ExitCode, RunFolder

FAULTS = {
    "raise": lambda: (_ for _ in ()).throw(ValueError("a fault")),
    "config": lambda: (_ for _ in ()).throw(ConfigError("trainer.devices", 2, "must be 1")),
    "diverge": lambda: (_ for _ in ()).throw(Diverged("norm nan")),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "vanish": lambda: os._exit(7),
    "taken": lambda: (_ for _ in ()).throw(RuntimeError("port: 1, code: -98, name: EADDRINUSE")),
}


def work(order: dict[str, Any], folder: RunFolder | None, status: Any, here: Place) -> Outcome:
    """One rank has a fault; the others notice only a moment later, as collectives do."""
    assert folder is not None
    told = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert place(os.environ) == here
    again = (folder.path / f"pid-{here.rank}").exists()
    (folder.path / f"pid-{here.rank}").write_text(f"{os.getpid()} {told['RANK']}/{told['WORLD_SIZE']}")
    try:
        if here.first:
            status.step = 5
        if order["fault"] == "taken" and (again or here.rank != order["rank"]):
            return Outcome()
        if here.rank == order.get("rank") and order["fault"] in FAULTS:
            FAULTS[order["fault"]]()
        if order["fault"] == "deaf" or (order["fault"] == "joining" and here.rank):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as one that waits below Python
        if order["fault"] in ("deaf", "joining"):
            (folder.path / f"ready-{here.rank}").touch()
        if order["fault"]:
            time.sleep(0.3 if order["fault"] in FAULTS else 60)
            raise RuntimeError("Connection closed by peer")
        return Outcome()
    except BaseException as error:
        outcome = outcome_of(error, status.step)
        outcome.leave(folder, here.rank)
        return outcome


def start(tmp_path: Path, fault: str | None, rank: int = 1) -> tuple[Outcome, int]:
    status = SimpleNamespace(step=0)
    outcome = start_ranks(work, {"fault": fault, "rank": rank}, RunFolder(tmp_path), status, 2)
    assert not list(tmp_path.glob(".rank-*"))
    assert [pid for pid in pids(tmp_path) if psutil.pid_exists(pid)] == []
    return outcome, status.step


def pids(folder: Path) -> list[int]:
    return [int(path.read_text().split()[0]) for path in folder.glob("pid-*")]


def test_ranks_know_their_places_and_all_end_well(tmp_path: Path) -> None:
    outcome, step = start(tmp_path, None)
    assert (outcome.state, outcome.code, step) == ("FINISHED", 0, 5)
    assert sorted(path.read_text().split()[1] for path in tmp_path.glob("pid-*")) == ["0/2", "1/2"]


def test_a_port_that_was_taken_costs_a_second_start(tmp_path: Path) -> None:
    outcome, step = start(tmp_path, "taken", 0)
    assert (outcome.state, step) == ("FINISHED", 5)


@pytest.mark.parametrize(
    ("fault", "rank", "state", "code", "reason"),
    [
        ("raise", 1, "FAILED", ExitCode.FAILED, "rank 1: ValueError: a fault"),
        ("raise", 0, "FAILED", ExitCode.FAILED, "ValueError: a fault"),
        ("config", 0, "FAILED", ExitCode.CONFIGURATION, "trainer.devices = 2: must be 1"),
        ("diverge", 1, "DIVERGED", ExitCode.DIVERGED, "norm nan"),
        ("kill", 1, "FAILED", ExitCode.FAILED, "rank 1 was killed by SIGKILL"),
        ("vanish", 1, "FAILED", ExitCode.FAILED, "rank 1 ended with exit code 7"),
    ],
)
def test_the_first_fault_is_the_runs(tmp_path: Path, fault: str, rank: int, state: str, code: int, reason: str) -> None:
    outcome, _ = start(tmp_path, fault, rank)
    assert (outcome.state, outcome.code, outcome.reason) == (state, code, reason)
    assert ("a fault" in outcome.traceback) == (fault == "raise")


def test_what_ended_first_is_the_cause(tmp_path: Path) -> None:
    Outcome("FAILED", "Connection closed by peer", 1, time=2.0).leave(RunFolder(tmp_path), 0)
    Outcome("FAILED", "KeyError: 'lr'", 1, time=1.5).leave(RunFolder(tmp_path), 2)
    Outcome("DIVERGED", "norm nan", 3, time=1.0).leave(RunFolder(tmp_path), 3)
    notes = left_notes(RunFolder(tmp_path))
    assert (notes[2].reason, notes[3].reason) == ("rank 2: KeyError: 'lr'", "norm nan")  # no rank diverges alone
    assert min(notes.values(), key=lambda note: note.time).state == "DIVERGED"
    assert left_notes(RunFolder(tmp_path)) == {}


PARENT = """
import sys
sys.path[:0] = [{here!r}, {root!r}]
from pathlib import Path
from types import SimpleNamespace
from lightning_opt.job import ranks, signals
from lightning_opt.job.ranks import start_ranks
from lightning_opt.job.signals import Terminated, terminable
from lightning_opt.run_folder import RunFolder
import test_ranks
if __name__ == "__main__":
    ranks.LEAVE_S, signals.ECHO_S = 1.0, 0.2
    try:
        with terminable():
            folder = RunFolder(Path({folder!r}))
            start_ranks(test_ranks.work, {{"fault": {fault!r}}}, folder, SimpleNamespace(step=0), 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Terminated:
        sys.exit(143)
"""


def parent_of_two(repository: Path, folder: Path, fault: str) -> subprocess.Popen[bytes]:
    script = folder / "parent.py"
    here = str(Path(__file__).parent)
    script.write_text(PARENT.format(here=here, root=str(repository), folder=str(folder), fault=fault))
    process = subprocess.Popen(
        [sys.executable, str(script)], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )
    wanted = "pid-*" if fault == "wait" else "ready-*"
    until(lambda: (len(list(folder.glob(wanted))) == 2 and len(pids(folder)) == 2) or process.poll() is not None)
    return process


def until(happened: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_ranks(repository: Path, tmp_path: Path, number: int, code: int) -> None:
    process = parent_of_two(repository, tmp_path, "wait")
    process.send_signal(number)
    assert process.wait(30) == code
    assert not any(psutil.pid_exists(pid) for pid in pids(tmp_path))
    assert left_notes(RunFolder(tmp_path)) == {}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_rank_that_waits_for_one_that_is_gone(repository: Path, tmp_path: Path, number: int, code: int) -> None:
    process = parent_of_two(repository, tmp_path, "joining")
    process.send_signal(number)
    assert process.wait(15) == code
    assert not any(psutil.pid_exists(pid) for pid in pids(tmp_path))


def test_a_second_signal_kills_ranks_that_do_not_listen(repository: Path, tmp_path: Path) -> None:
    process = parent_of_two(repository, tmp_path, "deaf")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert not any(psutil.pid_exists(pid) for pid in pids(tmp_path))


def test_no_rank_outlives_a_killed_parent(repository: Path, tmp_path: Path) -> None:
    process = parent_of_two(repository, tmp_path, "deaf")
    process.kill()
    process.wait()
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids(tmp_path)), 10)


def test_places_in_the_environment() -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    assert place(torchrun) == Place(3, 1, 4, "torchrun")
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
    assert place(step) == Place(2, 0, 4, "srun")
    batch = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # the script itself, not a step
    assert place(batch) == place({"RANK": "1", "WORLD_SIZE": "2"}) == Place()
    assert Place(3, 1, 4, "srun").environment(2)["GROUP_RANK"] == "1"


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"TORCHELASTIC_RUN_ID": "1", "RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK"),
        ({"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE"),
        ({"SLURM_STEP_NUM_TASKS": "2x"}, "SLURM_STEP_NUM_TASKS"),
    ],
)
def test_a_place_that_cannot_be_is_refused_by_name(
    environment: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_opt.launch import main

    with pytest.raises(ConfigError, match=rf"^{name} = .*must be a whole number"):
        place(environment)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert main(["optimizer=lion"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name} = ")


def test_logs_are_given_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loggers = [logging.getLogger(name) for name in ("lightning_opt", "py.warnings", "transformers")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    for speaks in (muted, lambda: run_log(tmp_path / "run.log")):
        with suppress(KeyError), speaks():
            logging.getLogger("lightning_opt.job").warning("inside")
            raise KeyError
        assert [(logger.handlers, logger.propagate, logger.level) for logger in loggers] == before
    assert not caplog.records
    logging.getLogger("lightning_opt.job").warning("outside")
    assert caplog.messages == ["outside"]
