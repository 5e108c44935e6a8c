"""Sweeps whose jobs are real processes that do not train: the ledger, failures, signals, devices, output."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_train import BREAKS, BREAKS_ONCE, CRASHES, DIVERGES, IS_KILLED, IS_MISCONFIGURED, WAITS

from lightning_opt.run_folder import SweepFolder, read_events, read_status

LIMIT_S = 60
LONG = WAITS + 10 * LIMIT_S


class Sweep:
    """A running `fake_train.py -m`, in a process group of its own as a shell would start it."""

    def __init__(self, folder: Path, words: tuple[str, ...], environment: dict[str, str]) -> None:
        script = Path(__file__).with_name("fake_train.py")
        path = os.pathsep.join([str(script.parents[2]), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, str(script), "-m", *words, "evaluation=none"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "4", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # a background shell hands down an ignored Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.family: set[psutil.Process] = set()

    def wait(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, out

    def signal(self, number: int) -> None:
        """To the whole group, as a terminal does; the family is remembered first."""
        self.family = {self._self, *self._self.children(recursive=True)}
        os.killpg(self.process.pid, number)

    @property
    def _self(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def clean_up(self) -> None:
        alive = psutil.pid_exists(self.process.pid) and self.process.poll() is None
        for process in self._self.children(recursive=True) if alive else []:
            process.kill()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Sweep]]:
    started: list[Sweep] = []

    def begin(*words: str, **environment: str) -> Sweep:
        started.append(Sweep(tmp_path, words, environment))
        return started[-1]

    yield begin
    for sweep in started:
        sweep.clean_up()


def folders(place: Path) -> list[SweepFolder]:
    return [SweepFolder(path.parent) for path in sorted(place.glob("runs/sweeps/*/sweep.json"))]


def by_seed(folder: SweepFolder) -> dict[int, Any]:
    return {job.differs["seed"]: job for job in folder.jobs()}


def tries(job: Any) -> list[dict[str, Any]]:
    file = job.folder.path / "tries.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise TimeoutError


def started_jobs(place: Path) -> list[Path]:
    return sorted(place.glob("runs/sweeps/*/*/tries.jsonl"))


def test_every_way_to_fail_is_recorded_and_stops_no_other(start, tmp_path):
    seeds = [BREAKS, IS_KILLED, CRASHES, IS_MISCONFIGURED, DIVERGES, 1]
    code, out = start(f"seed={','.join(map(str, seeds))}").wait()
    assert code == 1, out
    (folder,) = folders(tmp_path)
    jobs = by_seed(folder)
    states = {seed: (job.state, read_status(job.folder.status)["reason"]) for seed, job in jobs.items()}
    assert states == {
        BREAKS: ("FAILED", "RuntimeError: a job that breaks"),
        IS_KILLED: ("FAILED", "the process was killed by SIGKILL (out of memory?)"),
        CRASHES: ("FAILED", "the process was killed by SIGSEGV (a crash below Python)"),
        IS_MISCONFIGURED: ("FAILED", "as told"),
        DIVERGES: ("DIVERGED", "as told"),
        1: ("FINISHED", None),
    }
    logs = {seed: jobs[seed].folder.log.read_text() for seed in (BREAKS, IS_KILLED, CRASHES)}
    assert "Traceback (most recent call last)" in logs[BREAKS]
    assert 'raise RuntimeError("a job that breaks")' in logs[BREAKS]
    assert "failed: the process was killed by SIGKILL" in logs[IS_KILLED]
    assert re.search(r"Segmentation fault(.|\n)*fake_train.py.* in run\n", logs[CRASHES])
    assert [event["kind"] for event in read_events(jobs[IS_KILLED].folder.events)] == ["failed"]
    sweep = read_status(folder.status)
    assert (sweep["state"], sweep["step"], sweep["reason"]) == ("FAILED", 2, "4 of 6 jobs without a result")
    assert "[1/6] seed=599\nseed 599 speaks\n" in out  # one at a time speaks for itself
    assert "[6/6] FINISHED: loss 0.0100, " in out
    assert f"table of {folder.path.relative_to(tmp_path)}" in out


def test_the_same_command_again_runs_only_what_has_no_result(start, tmp_path):
    words = f"seed=1,{DIVERGES},{BREAKS_ONCE}"
    assert start(words).wait()[0] == 1
    (folder,) = folders(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if "620" not in str(path)}
    code, out = start(words).wait()
    assert code == 3, out
    assert folders(tmp_path) == [folder]
    after = {path: path.stat().st_mtime_ns for path in before if path.is_file() and path.parent != folder.path}
    assert after.items() <= before.items()
    assert {seed: len(tries(job)) for seed, job in by_seed(folder).items()} == {1: 1, DIVERGES: 1, BREAKS_ONCE: 2}
    assert read_status(folder.status)["state"] == "FINISHED"
    assert "[1/3] seed=1: FINISHED: loss 0.0100 already" in out


def test_stop_starts_nothing_more(start, tmp_path):
    code, out = start(f"seed=1,{BREAKS},2", "on_failure=stop").wait()
    assert code == 1
    (folder,) = folders(tmp_path)
    assert [job.state for job in folder.jobs()] == ["FINISHED", "FAILED", None]
    assert "seed=2: not started" in out


def test_retry_is_for_failures_only(start, tmp_path):
    seeds = [BREAKS_ONCE, DIVERGES, IS_MISCONFIGURED, BREAKS]
    code, _ = start(f"seed={','.join(map(str, seeds))}", "on_failure=retry:2").wait()
    assert code == 1
    (folder,) = folders(tmp_path)
    counts = {seed: len(tries(job)) for seed, job in by_seed(folder).items()}
    assert counts == {BREAKS_ONCE: 2, DIVERGES: 1, IS_MISCONFIGURED: 1, BREAKS: 3}
    assert by_seed(folder)[BREAKS_ONCE].state == "FINISHED"


def test_one_job_per_device_each_with_its_own(start, tmp_path):
    seeds = [WAITS + tenths for tenths in (8, 9, 10, 11)]
    code, out = start(f"seed={','.join(map(str, seeds))}", FAKE_GPUS="3,GPU-ab").wait()
    assert code == 0, out
    jobs = by_seed(folders(tmp_path)[0])
    spans = []
    for job in jobs.values():
        (one,) = tries(job)
        spans.append((one["gpus"], one["began"], float((job.folder.path / "ended").read_text())))
        assert one["threads"] == "2"  # two at once share four
        assert not one["tty"]
    assert {name for name, _, _ in spans} == {"3", "GPU-ab"}
    overlaps = [a[0] for a in spans for b in spans if a is not b and a[1] < b[1] < a[2] and a[0] == b[0]]
    assert not overlaps
    assert max(end for *_, end in spans) - min(begin for _, begin, _ in spans) < 0.1 * sum(s - WAITS for s in seeds)
    assert f"[1/4 seed={seeds[0]}] seed {seeds[0]} speaks\n" in out  # several at once say who speaks


def test_a_job_of_two_devices_takes_two(start, tmp_path):
    words = ("seed=704,705", "trainer.devices=2", "trainer.strategy=ddp", "trainer.global_batch_size=8")
    code, out = start(*words, FAKE_GPUS="0,1").wait()
    assert code == 0, out
    assert [tries(job)[0]["gpus"] for job in folders(tmp_path)[0].jobs()] == ["0,1", "0,1"]


def test_killed_at_job_three_of_six_and_started_again(start, tmp_path):
    """kill -9 of everything: the jobs die too, and only what has no result runs again, in the same folder."""
    seeds = [1, 2, LONG, 3, 4, 5]
    words = f"seed={','.join(map(str, seeds))}"
    sweep = start(words)
    until(lambda: len(started_jobs(tmp_path)) == 3)
    sweep.signal(signal.SIGKILL)
    sweep.process.communicate()
    gone, alive = psutil.wait_procs(sweep.family, timeout=10)
    assert not alive
    assert len(gone) >= 3  # ourselves, the fork server, the job
    (folder,) = folders(tmp_path)
    assert [job.state for job in folder.jobs()] == ["FINISHED", "FINISHED", "RUNNING", None, None, None]
    ended = [(job.folder.path / "ended").stat().st_mtime_ns for job in folder.jobs()[:2]]
    again = start(words)
    until(lambda: len(tries(folder.jobs()[2])) == 2)
    again.signal(signal.SIGTERM)
    assert again.wait()[0] == 143
    assert [len(tries(job)) for job in folder.jobs()] == [1, 1, 2, 0, 0, 0]
    assert ended == [(job.folder.path / "ended").stat().st_mtime_ns for job in folder.jobs()[:2]]
    assert folders(tmp_path) == [folder]


def test_the_jobs_die_when_only_their_parent_is_killed(start, tmp_path):
    sweep = start(f"seed={LONG}")
    (file,) = until(lambda: started_jobs(tmp_path))
    child = until(lambda: file.read_text() and psutil.Process(json.loads(file.read_text())["pid"]))
    sweep.process.kill()
    sweep.process.communicate()
    assert not psutil.wait_procs([child], timeout=10)[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_jobs_properly(start, tmp_path, number, code):
    sweep = start(f"seed=1,{LONG},{LONG + 1},2", "jobs_per_device=2")
    until(lambda: len(started_jobs(tmp_path)) == 3)
    sweep.signal(number)
    answer, out = sweep.wait()
    assert answer == code, out
    assert not psutil.wait_procs(sweep.family, timeout=10)[1]
    (folder,) = folders(tmp_path)
    assert [job.state for job in folder.jobs()] == ["FINISHED", "PREEMPTED", "PREEMPTED", None]
    assert read_status(folder.status)["state"] == "PREEMPTED"
    assert "Traceback" not in out
    two = [tries(job)[0] for job in folder.jobs()[1:3]]  # at once on the one CPU
    assert [(one["gpus"], one["threads"]) for one in two] == [(None, "2"), (None, "2")]


def test_whoever_ends_one_job_ends_the_sweep(start, tmp_path):
    sweep = start(f"seed={LONG},1")
    (file,) = until(lambda: started_jobs(tmp_path))
    os.kill(until(lambda: file.read_text() and json.loads(file.read_text())["pid"]), signal.SIGTERM)
    assert sweep.wait()[0] == 143
    assert [job.state for job in folders(tmp_path)[0].jobs()] == ["PREEMPTED", None]


def test_a_finished_sweep_is_not_trained_again(start, tmp_path):
    assert start("seed=1,2").wait()[0] == 0
    code, out = start("seed=1,2").wait()
    assert code == 0, out
    (folder,) = folders(tmp_path)
    assert "2 jobs, 0 to run\n" in out
    assert "all 2 jobs are done; resume=never runs them anew\n" in out
    assert f"table of {folder.path.relative_to(tmp_path)}" in out
    assert [len(tries(job)) for job in folder.jobs()] == [1, 1]
    assert read_status(folder.status)["state"] == "FINISHED"
    assert start("seed=1,2", "resume=never").wait()[0] == 0
    assert len(folders(tmp_path)) == 2


def test_the_page_can_be_looked_at_while_jobs_run(start, tmp_path):
    """Also where it cannot be drawn, which harms nothing."""
    (tmp_path / "broken").touch()
    sweep = start(f"seed=1,{WAITS + 10},{LONG}")
    drawn = tmp_path / "reported"
    until(lambda: drawn.exists() and "\nFINISHED FINISHED " in drawn.read_text())
    until(lambda: len(started_jobs(tmp_path)) == 3)
    sweep.signal(signal.SIGTERM)
    code, out = sweep.wait()
    assert code == 143
    lines = drawn.read_text().splitlines()
    assert re.match(r"FINISHED (None|RUNNING) None", lines[0])
    assert lines[-1] == "FINISHED FINISHED PREEMPTED"
    assert out.index(f"{folders(tmp_path)[0].report_html.relative_to(tmp_path)}\n") < out.index("seed 1 speaks")
    assert out.count("the comparison could not be written: RuntimeError: no page") == 1


def test_one_job_goes_by_the_runs_name_and_inherits_no_more_of_the_path_than_it_needs(start, tmp_path, repository):
    code, out = start("seed=1").wait()
    assert code == 0, out
    assert re.search(r"^\[1/1\] adamw_nano-[0-9a-f]{8}$", out, re.MULTILINE), out
    (job,) = folders(tmp_path)[0].jobs()
    named = tries(job)[0]["path"].split(os.pathsep)
    assert named[0] == str(repository)
    assert not [entry for entry in named if "site-packages" in entry or "lib-dynload" in entry]


def test_jobs_of_an_earlier_command_are_no_matter_of_this_one(start, tmp_path):
    sweep = start(f"seed=1,{LONG},2", "hydra.sweep.dir=k")
    until(lambda: len(list(tmp_path.glob("k/*/tries.jsonl"))) == 2)
    sweep.signal(signal.SIGKILL)
    sweep.process.communicate()
    assert not psutil.wait_procs(sweep.family, timeout=10)[1]
    code, out = start(f"seed=5,{DIVERGES}", "hydra.sweep.dir=k").wait()
    assert code == 3, out
    folder = SweepFolder(tmp_path / "k")
    jobs = by_seed(folder)
    killed = read_status(jobs[LONG].folder.status)
    assert (killed["state"], killed["reason"]) == ("PREEMPTED", "its process is gone")
    assert read_status(folder.status)["reason"] == "2 of 5 jobs without a result"
    first = f"train.py -m seed=1,{LONG},2 hydra.sweep.dir=k evaluation=none"
    assert f"2 of 5 jobs have no result; the same command again runs only those: python {first}\n" in out
    assert out.count("runs only those") == 1
    newest = f"train.py -m seed=5,{DIVERGES} hydra.sweep.dir=k evaluation=none"
    assert json.loads(folder.sweep.read_text())["command"] == newest
    assert {seed: job.command for seed, job in jobs.items()} == {
        1: first, LONG: first, 2: first, 5: newest, DIVERGES: newest,
    }  # fmt: skip


def test_a_named_sweep_takes_more_jobs(start, tmp_path):
    assert start("seed=1,2", "hydra.sweep.dir=mine").wait()[0] == 0
    code, out = start("seed=2,3", "optimizer=adamw,lion", "hydra.sweep.dir=mine").wait()
    assert code == 0, out
    jobs = SweepFolder(tmp_path / "mine").jobs()
    assert [len(tries(job)) for job in jobs] == [1, 1, 1, 1, 1]
    assert jobs[0].differs == {"seed": 1}
    assert jobs[1].differs == {"seed": 2, "optimizer": "adamw"}  # the same configuration, once
    assert os.listdir(tmp_path / "mine").count("seed-2-" + jobs[1].config_hash) == 1
    assert sorted(os.listdir(tmp_path)) == ["mine", "reported"]


def test_a_search_that_was_stopped_goes_on(start, tmp_path):
    """In its second job; the search then asks for what it would have asked for."""
    fields = ("optimizer.lr_scale=0.5,1", "schedule.warmup=0.05,0.1", "~tuned")
    words = ("hydra/sweeper=coordinate_descent", *fields, f"seed={WAITS + 20}")
    sweep = start(*words)
    until(lambda: len(started_jobs(tmp_path)) == 2)
    sweep.signal(signal.SIGTERM)
    code, out = sweep.wait()
    assert code == 143, out
    assert not psutil.wait_procs(sweep.family, timeout=10)[1]
    (folder,) = folders(tmp_path)
    assert [job.state for job in folder.jobs()] == ["FINISHED", "PREEMPTED"]
    assert "Traceback" not in out
    code, out = start(*words).wait()
    assert code == 0, out
    assert folders(tmp_path) == [folder]
    ran = {tuple(job.differs.values()): (job.state, len(tries(job))) for job in folder.jobs()}
    assert ran == {(1, 0.05): ("FINISHED", 1), (0.5, 0.05): ("FINISHED", 2), (1, 0.1): ("FINISHED", 1)}
    assert "best optimizer.lr_scale=1 schedule.warmup=0.05: loss 7.2000 (3 configurations, 1 more within" in out
    assert f"table of {folder.path.relative_to(tmp_path)}" in out


def test_a_search_stops_at_a_failure_where_told_to(start, tmp_path):
    fields = ("optimizer.lr_scale=0.5,1", "schedule.warmup=0.05,0.1", "~tuned")
    code, out = start("hydra/sweeper=coordinate_descent", *fields, f"seed={BREAKS}", "on_failure=stop").wait()
    assert code == 1, out
    assert [job.state for job in folders(tmp_path)[0].jobs()] == ["FAILED", None]
