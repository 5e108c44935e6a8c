"""Signals, sent for real, to whole runs: the step is finished and saved, and the same command ends with the same bits.

The runs are this very process, which saves each the seconds of its imports; how a process ends is tested in tests/job.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import driver
import numpy as np
import psutil
import pytest
import signaller

from lightning_opt import checkpoints, reports
from lightning_opt.checkpoints import store
from lightning_opt.job import signals, stages
from lightning_opt.job.signals import STOP_SIGNALS
from lightning_opt.launch import main, preflight, refusing, sweep, task
from lightning_opt.plan import ConfigError
from lightning_opt.run_folder import ExitCode, RunFolder, Status, SweepFolder, read_events, read_json, read_status

TINY = (
    *driver.SMALLEST,
    "name=signalled",
    "trainer.num_threads=1",
    "trainer.max_steps=12",
    "trainer.global_batch_size=4",
    "trainer.micro_batch_size=2",
    "trainer.val_every_n_steps=5",
    "trainer.log_every_n_steps=2",
    "callbacks.checkpoint.every_n_steps=3",
    "callbacks.signaller._target_=signaller.Signaller",
)
"""Two micro-batches a step, validation at 5 and 10, checkpoints at 3, 6, 9 and 12; of the stop's own, none is left."""


class Runs:
    """`train.py` in this process, each time in a folder of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._monkeypatch = folder, monkeypatch
        self._texts = driver.write_texts(folder / "texts")

    def __call__(self, name: str, at: str = "", *more: str) -> int:
        """Runs the command in a folder of this name.

        Args:
            name: of the folder.
            at: which signals, and where: see `signaller`.
            more: overrides.
        """
        place = self._folder / name
        place.mkdir(exist_ok=True)
        self._monkeypatch.chdir(place)
        self._monkeypatch.setattr(sys, "argv", ["train.py"])
        self._monkeypatch.setenv(signaller.PLACES, at)
        texts = (f"data.path={self._texts}", f"data.cache_dir={self._folder / 'cache'}")
        return main([*TINY, *texts, *more])

    def folder(self, name: str) -> RunFolder:
        """The one run folder that all commands of this name have."""
        (path,) = (self._folder / name).glob("runs/signalled/*-*")
        return RunFolder(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """One folder of texts for all, and a run named ``calm`` that nobody disturbs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = Runs(tmp_path_factory.mktemp("signals"), monkeypatch)
        assert made("calm") == 0
        yield made


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Ctrl-C as in a terminal, and handlers of somebody else's that must be there again at the end."""
    mine = {number: lambda *_: pytest.fail("nobody answers for the run") for number in STOP_SIGNALS}
    before = {number: signal.signal(number, handler) for number, handler in mine.items()}
    yield
    assert {number: signal.getsignal(number) for number in mine} == mine
    for number, handler in before.items():
        signal.signal(number, handler)


def stopped(folder: RunFolder, step: int, reason: str) -> None:
    """The run says why it stopped and where, and has a good checkpoint of that very step."""
    status = read_status(folder.status)
    assert (status["state"], status["step"], status["reason"]) == ("PREEMPTED", step, reason)
    assert checkpoints.find(folder.checkpoints)[0].step == step
    checkpoints.verify(checkpoints.find(folder.checkpoints)[0].path)
    assert read_json(folder.summary)["state"] == "PREEMPTED"
    assert folder.report_html.exists()


def goes_on(runs: Runs, name: str, step: int) -> None:
    """The same command goes on from that step, and the end equals that of a run nobody disturbed, to the last bit."""
    assert runs(name) == 0
    (event,) = (event for event in read_events(runs.folder(name).events) if event["kind"] == "resumed")
    assert event["step"] == step
    assert driver.differences(runs.folder("calm").path, runs.folder(name).path) == []


@pytest.mark.fault(10, "SIGTERM within an accumulation window: the step ends, saved, 143, the same bits at the end")
def test_sigterm_in_the_middle_of_a_step(runs: Runs) -> None:
    assert runs("term", "batch:4:SIGTERM") == 143
    stopped(runs.folder("term"), 4, "stopped by SIGTERM at step 4")
    goes_on(runs, "term", 4)


@pytest.mark.fault(
    11, "SIGUSR1 thrice within a validation: one save, 143, and Slurm starts the job again; the same bits"
)
def test_sigusr1_within_a_validation(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "scontrol"
    script.write_text(f'#!/bin/sh\ncat runs/signalled/*/status.json > {tmp_path}/told\necho "$@" >> {tmp_path}/told\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setattr(signals, "ECHO_S", 60.0)
    assert runs("usr1", "validation:5:SIGUSR1 validation:5:SIGTERM save:5:SIGUSR1") == 143
    folder = runs.folder("usr1")
    stopped(folder, 5, "stopped by SIGUSR1 at step 5")
    assert [found.step for found in checkpoints.find(folder.checkpoints)] == [5, 3]
    requeued = read_events(folder.events)[-1]
    assert (requeued["kind"], requeued["job"], requeued["step"]) == ("requeued", "41", 5)
    told = (tmp_path / "told").read_text()
    assert told.endswith("requeue 41\n")
    assert '"PREEMPTED"' in told  # Slurm may end us at once, so by then all is said
    monkeypatch.delenv("SLURM_JOB_ID")
    goes_on(runs, "usr1", 5)


@pytest.mark.fault(11, "Slurm ends a requeued run by SIGTERM, and a finished run is told: its record stays as it was")
def test_signals_after_the_end(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    script = tmp_path / "scontrol"
    script.write_text("#!/bin/sh\nkill -TERM $PPID\nsleep 0.2\nkill -TERM $$\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setattr(signals, "ECHO_S", 0.0)
    assert runs("late", "batch:11:SIGUSR1") == 143
    folder = runs.folder("late")
    stopped(folder, 11, "stopped by SIGUSR1 at step 11")
    assert [event["kind"] for event in read_events(folder.events)][-2:] == ["preempted", "requeued"]

    drawn, last = reports.write, stages._report

    def write(path: Path) -> None:
        signal.raise_signal(signal.SIGTERM)
        assert "SIGTERM: the report is still written" in capfd.readouterr().err
        drawn(path)
        signal.raise_signal(signal.SIGTERM)

    def report(*given: Any) -> None:
        last(*given)
        for number in STOP_SIGNALS:
            signal.raise_signal(number)

    folder.report_html.unlink()
    monkeypatch.setattr(reports, "write", write)
    monkeypatch.setattr(stages, "_report", report)
    assert runs("late") == 0
    assert read_status(folder.status)["state"] == "FINISHED"
    assert folder.report_html.exists()
    assert "asked to stop once more" in folder.log.read_text()


@pytest.mark.fault(12, "a signal while the command is still read: one line, 130 or 143")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signals_before_the_run(number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(preflight, "check_command", lambda *_, **__: signal.raise_signal(number))
    assert main(["optimizer=lion"]) == (130 if number == signal.SIGINT else 143)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("interrupted" if number == signal.SIGINT else f"stopped by {number.name}")


def test_a_recorded_end_is_never_replaced(tmp_path: Path, capsys: Any) -> None:
    for state, reason in (("FINISHED", None), ("RUNNING", "stopped by SIGTERM at step 7")):
        folder = RunFolder(tmp_path / state)
        folder.path.mkdir()
        status = Status(folder.status, "hash")
        status.step = 7
        status.set(state)
        assert task._ended(folder, {}, ExitCode.PREEMPTED, "stopped by SIGTERM") == 143
        assert read_status(folder.status)["reason"] == reason


def test_an_end_is_recorded_before_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a terminal that is gone, or a file on a full disk."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    folder = RunFolder(tmp_path)
    monkeypatch.setattr(sys, "stderr", Full())
    assert task._ended(folder, {}, ExitCode.FAILED, "OSError: no", "Traceback:\nOSError: no\n") == 1
    assert read_status(folder.status)["state"] == "FAILED"
    assert refusing.give_up(signals.Terminated("SIGTERM")) == 143
    assert refusing.refuse(ConfigError("seed", -1, "must be 0 or more")) == 2


def test_a_sweep_names_the_signal(tmp_path: Path, capsys: Any) -> None:
    folder, asked = SweepFolder(tmp_path), signals.Signals()
    asked.asked = "SIGUSR1"
    folder.write("train.py -m", [], [])
    assert sweep._end(folder, Status(folder.status, "hash"), ExitCode.PREEMPTED, [], asked, draw=True) == 143
    assert read_status(folder.status)["reason"] == "stopped by SIGUSR1"


@pytest.mark.fault(11, "a second signal while saving: it stops at once, and what is on disk is good")
def test_a_second_signal_while_copying(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ECHO_S", 0.0)
    assert runs("copying", "batch:4:SIGTERM save:4:SIGINT") == 130
    folder = runs.folder("copying")
    assert read_status(folder.status)["state"] == "PREEMPTED"
    assert [found.step for found in checkpoints.find(folder.checkpoints)] == [3]
    goes_on(runs, "copying", 3)


@pytest.mark.fault(11, "a second signal while a slow disk is waited for: it is waited for no longer")
def test_a_second_signal_while_writing(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    writers, over = [], threading.Event()
    quick = store.write

    def write(root: Path, snapshot: dict[str, Any], *, step: int, **more: Any) -> None:
        if step == 4:
            writers.append(threading.current_thread())
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            assert over.wait(60)
            raise OSError("the process is gone")
        quick(root, snapshot, step=step, **more)

    monkeypatch.setattr(signals, "ECHO_S", 0.0)
    monkeypatch.setattr(store, "write", write)
    assert runs("writing", "batch:4:SIGTERM") == 143
    (writer,) = writers
    assert writer.is_alive()
    assert writer.abandoned  # so that the process does not wait for it either: see `job.leave`
    over.set()
    writer.join()
    folder = runs.folder("writing")
    assert read_status(folder.status)["reason"] == "stopped by SIGTERM at step 4"
    assert [found.step for found in checkpoints.find(folder.checkpoints)] == [3]


@pytest.mark.fault(12, "Ctrl-C before a validation: saved, summary and the command to go on said, 130, the same bits")
def test_ctrl_c(runs: Runs, capfd: Any) -> None:
    assert runs("ctrl-c", "batch:5:SIGINT") == 130
    stopped(runs.folder("ctrl-c"), 5, "interrupted at step 5")
    said = capfd.readouterr().out
    end = said[said.index("PREEMPTED ") :]
    assert "training loss" in end
    assert "python train.py debug=smoke" in end
    assert (runs.folder("ctrl-c").path / "report.md").exists()
    goes_on(runs, "ctrl-c", 5)


LONG = ("trainer.max_steps=40", "callbacks.checkpoint.every_n_steps=20")
"""Long enough for a signal to be passed on before the end; of the stop's checkpoint, none is left."""


@pytest.mark.slow
@pytest.mark.fault(10, "signals to a run of two ranks: both stop after the same step, and the end is the same bits")
def test_ranks_stop_together(runs: Runs) -> None:
    assert runs("calm-ddp", "", "trainer=ddp", *LONG) == 0
    assert runs("ddp", "batch:4:SIGUSR1", "trainer=ddp", *LONG) == 143
    step = read_status(runs.folder("ddp").status)["step"]
    assert 4 <= step < 20
    stopped(runs.folder("ddp"), step, f"stopped by SIGUSR1 at step {step}")
    assert runs("ddp", "", "trainer=ddp", *LONG) == 0
    assert driver.differences(runs.folder("calm-ddp").path, runs.folder("ddp").path) == []


class Sweep:
    """`train.py -m` with two jobs, in a process and a folder of its own."""

    def __init__(self, repository: Path, folder: Path, texts: Path) -> None:
        here = str(Path(__file__).parent)
        self._folder = folder
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(repository), here])}
        words = [*TINY, *LONG, f"data.path={texts}", f"data.cache_dir={texts.parent / 'cache'}"]
        self._command = [sys.executable, str(repository / "train.py"), "-m", "optimizer=adamw,lion", *words]

    def __call__(self, at: str = "", **environment: str) -> int:
        self._folder.mkdir(exist_ok=True)
        return subprocess.run(
            self._command,
            cwd=self._folder,
            env={**self._environment, signaller.PLACES: at, **environment},
            timeout=300,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ).returncode

    @property
    def jobs(self) -> list[RunFolder]:
        """Their folders, in order."""
        (file,) = self._folder.glob("runs/sweeps/*/sweep.json")
        return [job.folder for job in SweepFolder(file.parent).jobs()]


@pytest.mark.slow
@pytest.mark.fault(11, "SIGUSR1 to a sweep: its job saves, Slurm is asked once, and the sweep's end is the same bits")
def test_a_sweep_passes_signals_on(repository: Path, tmp_path: Path) -> None:
    texts, script = driver.write_texts(tmp_path / "texts"), tmp_path / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    script.chmod(0o755)
    calm, sweep = (Sweep(repository, tmp_path / name, texts) for name in ("calm", "stopped"))
    assert calm() == 0
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert sweep("batch:4:SIGUSR1", PATH=path, SLURM_JOB_ID="41") == 143
    first, second = sweep.jobs
    step = read_status(first.status)["step"]
    assert 4 <= step < 20
    stopped(first, step, f"stopped by SIGTERM at step {step}")
    assert not second.status.exists()
    assert (tmp_path / "told").read_text() == "requeue 41\n"
    assert sweep() == 0
    for quiet, disturbed in zip(calm.jobs, sweep.jobs, strict=True):
        assert driver.differences(quiet.path, disturbed.path) == []


class Slow:
    """A dataset whose items can be waited for."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        time.sleep(self._seconds)
        return {"input_ids": torch.full((4,), index)}


def workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "resource_tracker" not in " ".join(child.cmdline())]


@pytest.mark.fault(11, "signals to loader workers: they read on, and still end when their run tells them to")
def test_workers_leave_signals_to_their_run() -> None:
    from lightning_opt.data import loader

    before = set(workers())
    items = loader(Slow(), batch_size=2, num_workers=2)
    batches = iter(items)
    first = next(batches)
    mine = set(workers()) - before
    assert len(mine) == 2
    for worker in mine:
        for name in ("INT", "USR1", "TERM"):
            subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)  # anybody but the parent
    time.sleep(0.2)
    seen = [first, *batches]
    assert np.array_equal([int(batch["input_ids"][0, 0]) for batch in seen], range(0, 40, 2))
    assert all(worker.is_running() for worker in mine)
    for worker in mine:
        os.kill(worker.pid, signal.SIGTERM)
    assert not psutil.wait_procs(mine, timeout=10)[1]
