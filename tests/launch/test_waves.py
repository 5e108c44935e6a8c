"""`run_jobs`: explicit lists of jobs, wave after wave in one process, in one folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fake_train import BREAKS, DIVERGES, WAITS

from lightning_opt.launch import run_jobs
from lightning_opt.plan import ConfigError
from lightning_opt.run_folder import SweepFolder, read_status

LIMIT_S = 300  # of patience
LONG = WAITS + 10 * LIMIT_S


class Waves:
    """A running `fake_waves.py`, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *waves: str) -> subprocess.Popen[str]:
        script = Path(__file__).with_name("fake_waves.py")
        path = os.pathsep.join([str(script.parents[2]), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [sys.executable, str(script), *waves],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.started.append(process)
        return process

    def run(self, *waves: str) -> tuple[int, str]:
        process = self.start(*waves)
        out, _ = process.communicate(timeout=LIMIT_S)
        return process.returncode, out

    @property
    def jobs(self) -> dict[int, tuple[str | None, list[dict[str, object]]]]:
        """Seed to its state and its tries."""
        found = {}
        for job in SweepFolder(self.folder / "waves").jobs():
            file = job.folder.path / "tries.jsonl"
            tries = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            found[int(job.differs["seed"])] = job.state, tries
        return found


@pytest.fixture
def waves(tmp_path: Path) -> Iterator[Waves]:
    waves = Waves(tmp_path)
    yield waves
    for process in waves.started:
        alive = process.poll() is None
        for child in psutil.Process(process.pid).children(recursive=True) if alive else []:
            child.kill()
        process.kill()
        process.wait()


def test_waves_share_a_folder_and_the_server_they_are_forked_from(waves: Waves) -> None:
    code, out = waves.run("1,2", f"2,3,{DIVERGES}", f"{BREAKS},1", "3,3")
    assert code == 0, out
    said = [line for line in out.splitlines() if line.startswith("wave ")]
    assert said == ["wave 1,2: 0", f"wave 2,3,{DIVERGES}: 3", f"wave {BREAKS},1: 1", "wave 3,3: 0"]
    states = {seed: (state, len(tries)) for seed, (state, tries) in waves.jobs.items()}
    assert states == {1: ("FINISHED", 1), 2: ("FINISHED", 1), 3: ("FINISHED", 1), DIVERGES: ("DIVERGED", 1),
                      BREAKS: ("FAILED", 1)}  # fmt: skip
    assert len({one["server"] for _, tries in waves.jobs.values() for one in tries}) == 1
    folder = SweepFolder(waves.folder / "waves")
    assert {job.command for job in folder.jobs()} == {f"fake_waves.py 1,2 2,3,{DIVERGES} {BREAKS},1 3,3"}
    assert not folder.report_html.exists()
    assert "comparison" not in out
    assert "[1/5]" not in out.partition(f"wave {BREAKS},1")[2]  # what another wave has run is not said again


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_wave_and_the_same_again_runs_only_what_has_no_result(waves: Waves, number, code) -> None:
    process = waves.start("1", f"2,{LONG},3")
    folder, end = waves.folder / "waves", time.monotonic() + LIMIT_S
    while len(list(folder.glob("*/tries.jsonl"))) < 3 or read_status(folder / "status.json").get("state") != "RUNNING":
        assert time.monotonic() < end
        time.sleep(0.05)
    family = {psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)}
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == code, out
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert read_status(folder / "status.json")["state"] == "PREEMPTED"
    assert "Traceback" not in out
    jobs = waves.jobs
    assert jobs[1][0] == "FINISHED"
    assert jobs[LONG][0] == "PREEMPTED"
    ran = {seed: len(tries) for seed, (_, tries) in jobs.items()}
    again, out = waves.run("1", "2,3,4")
    assert again == 0, out
    assert {seed: state for seed, (state, _) in waves.jobs.items() if seed != LONG} == dict.fromkeys(
        (1, 2, 3, 4), "FINISHED"
    )
    assert len(waves.jobs[1][1]) == ran[1] == 1


def test_a_wrong_job_is_refused_before_any_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = {
        "optimizer.lr": [["seed=1"], ["seed=2", "optimizer.lr=-1"]],
        "optimizer.lrr": [["optimizer.lrr=1"]],
        "seed": [["seed=1,2"]],
        "hydra.sweep.dir": [["hydra.sweep.dir=x"]],
    }
    for field, lists in wrong.items():
        with pytest.raises(ConfigError) as caught:
            run_jobs(lists, "waves", words=["mine.py"])
        assert caught.value.field == field
    with pytest.raises(ConfigError, match=r"^on_failure = never"):
        run_jobs([["seed=1"]], "waves", words=["mine.py"], shared=["on_failure=never"])
    assert run_jobs([], "waves", words=["mine.py"]) == 0
    assert not list(tmp_path.iterdir())
