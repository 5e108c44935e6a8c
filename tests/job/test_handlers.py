"""What signals do to this very process: each is sent for real."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lightning_opt.job import signals as module
from lightning_opt.job.logs import run_log
from lightning_opt.job.outcomes import outcome_of
from lightning_opt.job.requeue import requeue
from lightning_opt.job.signals import STOP_SIGNALS, Signals, Terminated, terminable
from lightning_opt.plan import Place


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[dict[int, Any]]:
    """Ctrl-C as in a terminal (a background shell has it ignored), and others that must be found again."""
    mine = {number: lambda *_: pytest.fail("an older handler was called") for number in STOP_SIGNALS}
    before = {number: signal.signal(number, handler) for number, handler in mine.items()}
    yield mine
    assert {number: signal.getsignal(number) for number in mine} == mine
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    """Python answers before this returns."""
    signal.raise_signal(number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_outside_training_a_signal_ends_at_once(number: signal.Signals) -> None:
    wanted = KeyboardInterrupt if number == signal.SIGINT else Terminated
    with pytest.raises(wanted) as raised, terminable():
        send(number)
    outcome = outcome_of(raised.value, 7)
    code = 130 if number == signal.SIGINT else 143
    assert (outcome.state, outcome.code, outcome.signal) == ("PREEMPTED", code, number.name)
    assert outcome.reason == ("interrupted at step 7" if code == 130 else f"stopped by {number.name} at step 7")


def test_who_leaves_by_exit_has_failed_unless_it_was_ctrl_c() -> None:
    """Lightning answers KeyboardInterrupt with SystemExit; a callback of the user's may leave by itself."""

    def as_lightning() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    with pytest.raises(SystemExit) as left:
        sys.exit(0)
    outcome = outcome_of(left.value, 7)
    assert (outcome.state, outcome.code, outcome.reason) == ("FAILED", 1, "SystemExit: 0")
    assert "sys.exit(0)" in outcome.traceback
    with pytest.raises(SystemExit) as left:
        as_lightning()
    assert (outcome_of(left.value, 7).state, outcome_of(left.value, 7).code) == ("PREEMPTED", 130)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_while_training_it_is_noted_and_ends_with_the_training(number: signal.Signals, capfd: Any) -> None:
    done = []

    def train() -> None:
        with terminable() as signals, signals.deferred():
            assert signals.asked is None
            send(number)
            assert signals.asked == number.name
            done.append("the step")

    with pytest.raises(Terminated) as raised:
        train()
    assert done
    assert raised.value.name == number.name
    assert outcome_of(raised.value, 7).code == (130 if number == signal.SIGINT else 143)
    assert capfd.readouterr().err.count(number.name) == 1


@pytest.mark.parametrize("second", STOP_SIGNALS)
def test_a_second_one_ends_training_at_once_but_an_echo_does_not(second: int, monkeypatch: Any) -> None:
    """Never as KeyboardInterrupt, after which Lightning would leave Ctrl-C ignored."""
    monkeypatch.setattr(module, "ECHO_S", math.inf)
    with terminable() as signals, suppress(Terminated), signals.deferred():
        for number in STOP_SIGNALS:
            send(number)
        assert signals.asked == "SIGINT"
        monkeypatch.setattr(module, "ECHO_S", 0.0)
        with pytest.raises(Terminated):
            send(second)


def test_ctrl_c_has_a_short_echo_where_no_launcher_sends_it_too(monkeypatch: Any, capfd: Any) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    for launched, number, soon, late in (
        (False, signal.SIGINT, 0.05, 0.2),
        (False, signal.SIGTERM, 0.9, 1.1),
        (True, signal.SIGINT, 0.9, 1.1),
    ):
        monkeypatch.setattr(module, "place", lambda launched=launched: Place(launcher="torchrun" if launched else None))
        with terminable() as signals, suppress(Terminated), signals.deferred():
            send(number)
            now[0] += soon
            send(number)
            now[0] += late
            with pytest.raises(Terminated):
                send(number)
    said = capfd.readouterr().err.strip().splitlines()[::2]
    assert said[0] == "SIGINT: stopping after this step; once more stops at once"
    assert said[1] == "SIGTERM: stopping after this step; once more, after 1 s, stops at once"


def test_once_it_is_over_only_a_second_one_cuts_the_last_words_short(monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setattr(module, "ECHO_S", 0.0)
    with terminable() as signals:
        signals.over = True
        with signals.finishing("the report is still written"):
            send(signal.SIGTERM)
            assert "the report is still written" in capfd.readouterr().err
            with pytest.raises(Terminated):
                send(signal.SIGINT)
        for number in STOP_SIGNALS:
            send(number)
        with pytest.raises(Terminated):
            signals.begin()  # another job of this process
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_where_another_process_answers_only_the_first_counts(monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setattr(module, "ECHO_S", 0.0)
    with terminable(passed_on=True) as signals, suppress(Terminated), signals.deferred():
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            send(number)
        assert signals.asked == "SIGTERM"
    assert capfd.readouterr().err == ""


def test_within_one_it_is_the_same() -> None:
    with terminable() as outer:
        with terminable() as inner:
            assert inner is outer
        with pytest.raises(Terminated):
            send(signal.SIGTERM)
        assert outer.asked == "SIGTERM"
    with terminable() as later:
        assert later is not outer


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with terminable() as signals:
            send(signal.SIGINT)
            assert signals.asked is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_sets_no_handlers() -> None:
    seen = []

    def work() -> None:
        with terminable() as signals:
            seen.append(type(signals))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [Signals]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_forked_child_ends_as_if_it_had_inherited_nothing(number: int) -> None:
    with terminable() as signals:
        child = os.fork()
        if not child:
            send(number)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number
        assert signals.asked is None


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `scontrol` that writes down what it is asked, and fails where a file says so."""
    script = tmp_path / "scontrol"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        f'[ ! -e {tmp_path}/closed ] || {{ echo "no  such\njob" >&2; exit 1; }}\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    return tmp_path


def test_slurm_is_asked_to_start_the_job_again(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requeue()
    assert asked is not None
    assert (asked.job, asked.failure, str(asked)) == ("41", None, "Slurm job 41 is back in the queue")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    (slurm / "closed").touch()
    assert str(requeue()) == "Slurm job 40_3 could not be put back into the queue: no such job"
    assert (slurm / "asked").read_text() == "requeue 41\nrequeue 40_3\n"


def test_without_slurm_nobody_is_asked(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    assert requeue() is None
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())  # a job of a sweep, a rank
    assert requeue() is None
    assert not (slurm / "asked").exists()


@pytest.mark.fault(11, "signals while a finished run's process leaves: its exit code stays that of the run")
def test_a_signal_while_leaving_changes_no_exit_code(repository: Path) -> None:
    """The very front door, with a run of no length and an exit hook that takes its time, as torch's do."""
    code = f"""
import atexit, runpy, sys, time
import lightning_opt.launch
lightning_opt.launch.main = lambda words: 3
atexit.register(lambda: (print("leaving", flush=True), time.sleep(0.5)))
runpy.run_path({str(repository / "train.py")!r}, run_name="__main__")
"""
    for number in STOP_SIGNALS:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(repository)},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "leaving\n"
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_log_and_output_changes_no_exit_code(capfd: pytest.CaptureFixture[str]) -> None:
    with run_log(Path("/dev/full")) as log:
        for number in range(2000):
            log.info("line %d of a log that finds no room", number)
    assert "Traceback" not in capfd.readouterr().err
    code = "from lightning_opt.job import leave; print(1); leave(143)"
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, env=buffered, timeout=60
        )
    assert (ended.returncode, ended.stderr) == (143, b"")
