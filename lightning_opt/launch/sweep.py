"""A sweep's life: its folder and ledger, which jobs are left to run, what is said, how it ends."""

from __future__ import annotations

import functools
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from omegaconf import DictConfig

from lightning_opt.job.requeue import requeue
from lightning_opt.job.signals import STOP_SIGNALS, Signals, Terminated, terminable
from lightning_opt.launch import processes, task
from lightning_opt.launch.compose import CONF
from lightning_opt.launch.ledger import Ledger
from lightning_opt.launch.preflight import Command
from lightning_opt.launch.refusing import say
from lightning_opt.launch.resolve import quoted
from lightning_opt.launch.searching import Search
from lightning_opt.plan import ConfigError
from lightning_opt.run_folder import (
    FINISHED_STATES,
    ExitCode,
    FolderRefused,
    RunFolder,
    Status,
    SweepFolder,
    SweepJob,
    claim_sweep,
    config_hash,
    owner_is_gone,
    read_json,
    read_status,
    record_end,
    to_go_on,
)
from lightning_opt.run_folder.status import State

# What every run imports, so that the fork server does it once for all. Not lm_eval.evaluator: pyarrow starts a thread.
PRELOAD = (
    "lightning_opt.launch.task",
    "lightning_opt.job.stages",
    "lightning_opt.training.trainer",
    "lightning_opt.models.dense",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "lightning_opt.optim.adamw",
    "lightning_opt.callbacks.progress",
    "lightning_opt.callbacks.export",
    "lightning_opt.data.embedded",
    "lightning_opt.data.token_data",
    "lightning_opt.reports.page",
)
PRELOAD_TO_SCORE = ("lightning_opt.evaluation.score", "lm_eval.models.huggingface")
LOOK_S = 5.0  # between two looks at whether a job has ended
_CODES = {"FINISHED": ExitCode.FINISHED, "DIVERGED": ExitCode.DIVERGED, "PREEMPTED": ExitCode.PREEMPTED}

# Hydra makes the sweeper itself and hands it nothing of ours, so these pass by here.
_left: list[list[str]] = []
_until = math.inf
_search: Search | None = None


def left_to_run() -> list[list[str]]:
    """For the grid's sweeper: the overrides of each job that has no result yet."""
    return _left


def current_search() -> Search:
    """For the sweepers that decide from results: what decides.

    Raises:
        RuntimeError: there is none: the sweeper was not started by `run_sweep`.
    """
    if _search is None:
        raise RuntimeError("this sweeper needs train.py -m, which checks the search before Hydra begins")
    return _search


def run_sweep(
    command: Command,
    words: Sequence[str],
    hand_over: Callable[[list[str]], int],
    *,
    draw: bool = True,
    until: float = math.inf,
) -> int:
    """Runs the jobs of a checked command that have no result yet, and compares all of them.

    Args:
        command: what to run: a list of jobs, or a search that finds them as it goes.
        words: the command line as it was given, after ``python``.
        hand_over: gives overrides to Hydra, which calls the sweeper and the launcher; answers an exit code.
        draw: whether the comparison is drawn and what to do next is said; else both are for the caller to do.
        until: `time.monotonic` after which our launcher starts nothing more.

    Returns:
        The exit code: 130 or 143 where it was stopped, else 1 where a job of this command has no result, else 3 where
        one diverged, else 0.

    Raises:
        ConfigError: the named folder cannot be used.
    """
    global _search, _until
    _search, _until = command.search, until
    asked = {config_hash(job.config) for job in command.jobs}
    folder, hash = _claim(command, sorted(asked))
    ledger = Ledger(folder, words, command.swept or ())
    task.begin(None)
    with terminable() as signals, Status(folder.status, hash) as status:
        try:
            signals.begin()
            begin = _begin_search if command.search else _begin_list
            code = 0
            if begin(command, ledger, draw):
                watched = _drawn_as_jobs_end(folder) if draw else nullcontext()
                with processes.environment({"PYTHONPATH": _imports_ours()}), watched:
                    code = hand_over([*command.overrides, f"hydra.sweep.dir={quoted(str(folder.path))}"])
        except ConfigError as error:
            status.set("FAILED", str(error))
            raise
        except KeyboardInterrupt:
            code = ExitCode.INTERRUPTED
        except Terminated:
            code = ExitCode.PREEMPTED
        signals.over = True
        if command.search:  # what it ran before counts too
            asked = {job.config_hash for job in folder.jobs()}
        code = _end(folder, status, task.stopped() or code, asked, signals, draw=draw)
    if code == ExitCode.PREEMPTED and signals.asked == "SIGUSR1" and (requeued := requeue()):
        _say(str(requeued))
    return code


def _imports_ours() -> str:
    """PYTHONPATH for an interpreter that starts anew (a fork server, a Slurm job): it lacks only this repository."""
    return os.pathsep.join(filter(None, [str(CONF.parent), os.environ.get("PYTHONPATH")]))


def _claim(command: Command, hashes: Sequence[str]) -> tuple[SweepFolder, str]:
    place = command.folder or task.RUNS
    try:
        return claim_sweep(task.RUNS, hashes, resume=command.jobs[0].config["resume"], path=command.folder)
    except FolderRefused as error:
        raise ConfigError("hydra.sweep.dir", str(place), f"must be {error}") from None
    except OSError as error:
        raise ConfigError(
            "hydra.sweep.dir", str(place), f"must be a folder we can write to ({error.strerror})"
        ) from None


def _begin_list(command: Command, ledger: Ledger, draw: bool) -> bool:
    """Enters the jobs, says what comes, and answers whether any has to run."""
    folder, jobs = ledger.folder, ledger.add(command.jobs)
    asked = {config_hash(job.config) for job in command.jobs}
    _left[:] = ledger.left(command.jobs)
    _say(f"sweep {folder.path}: {len(jobs)} job{'s' * (len(jobs) > 1)}, {len(_left)} to run")
    for number, job in enumerate(jobs, 1):
        if job.is_done and job.config_hash in asked:
            _say(f"[{number}/{len(jobs)}] {job.label()}: {_result(job.folder)} already")
    if draw and _left:
        _say(f"comparison, drawn again as each job ends: {folder.report_html}")
    elif draw:
        _say(f"all {len(asked)} jobs are done; resume=never runs them anew")
    return bool(_left)


def _begin_search(command: Command, ledger: Ledger, draw: bool) -> bool:
    """Hands the search its folder, and says what it is."""
    search = current_search()
    _say(f"sweep {ledger.folder.path}: {search.words}")
    if draw:
        _say(f"comparison, drawn again as each job ends: {ledger.folder.report_html}")
    search.open(ledger, _say)
    return True


def launch(
    configs: Sequence[DictConfig], run: Callable[[DictConfig], int], *, on_failure: str, jobs_per_device: int
) -> list[int | None]:
    """For the launcher: runs each configuration in a process of its own.

    Args:
        configs: as Hydra composed them, with their `hydra` node.
        run: what each process does with its own; picklable; answers an exit code.
        on_failure: ``continue``, ``stop`` or ``retry:N``.
        jobs_per_device: how many share a GPU, or the CPU where there is none.

    Returns:
        Exit codes, which `task.exit_code` knows too; None for a job that did not start.
    """
    scored = any(cfg.evaluation.suite != "none" for cfg in configs)
    processes.start_server([*PRELOAD, *(PRELOAD_TO_SCORE if scored else ())])
    on_cpu = all(cfg.trainer.accelerator == "cpu" for cfg in configs)
    lines = [_Line(cfg, number) for number, cfg in enumerate(configs, 1)]
    tasks = [
        processes.Task(line.prefix, functools.partial(run, cfg), int(cfg.trainer.devices))
        for line, cfg in zip(lines, configs, strict=True)
    ]
    pool = processes.Pool(
        processes.Places([] if on_cpu else processes.visible_devices(), jobs_per_device),
        on_failure,
        until=_until,
        before=lambda index: lines[index].begin(),
        after=lambda index, code: lines[index].end(code),
    )
    codes = pool.run(tasks)
    for code in codes.values():
        task.note(code)
    return [codes.get(index) for index in range(len(tasks))]


class _Line:
    """What is said of one job, and what is recorded for it where it could not do so itself.

    Args:
        cfg: its configuration.
        number: its place among the jobs of this launch; the ledger's place is shown where there is one.
    """

    def __init__(self, cfg: DictConfig, number: int) -> None:
        self.job: SweepJob | None = None
        name, label, short = str(number), " ".join(cfg.hydra.overrides.task), ""
        jobs = SweepFolder(Path(str(cfg.hydra.sweep.dir))).jobs()
        for place, job in enumerate(jobs, 1):
            if job.folder.path.name == str(cfg.hydra.sweep.subdir):
                self.job, name, label, short = job, f"{place}/{len(jobs)}", job.label(), job.label(short=True)
        self._head, self._label, self.prefix = f"[{name}]", label, f"[{name} {short or label}]"

    def begin(self) -> None:
        """Says that it starts."""
        self._since = time.monotonic()
        _say(f"{self._head} {self._label}")

    def end(self, code: int) -> int:
        """Says how it ended, and answers the exit code that its record amounts to."""
        if self.job is None:
            _say(f"{self._head} ended: {_cause(code)}")
            return code if code >= 0 else int(ExitCode.FAILED)
        stopped = -code in STOP_SIGNALS or code in task.STOPS
        settle(self.job, "PREEMPTED" if stopped else "FAILED", _cause(code))
        status = read_status(self.job.folder.status)
        seconds = f"{time.monotonic() - self._since:.0f} s"
        _say(f"{self._head} {_result(self.job.folder)}, {seconds}")
        state = str(status.get("state"))
        if state == "FAILED":
            _say(f"{self._head} see {self.job.folder.log}")
            return int(ExitCode.CONFIGURATION if code == ExitCode.CONFIGURATION else ExitCode.FAILED)
        return int(ExitCode.INTERRUPTED) if code == ExitCode.INTERRUPTED else int(_CODES.get(state, ExitCode.FAILED))


def settle(job: SweepJob, state: State, reason: str) -> None:
    """Records the end of a job whose process died without a word.

    Args:
        job: the job.
        state: how it ended, if its own record does not say so.
        reason: one line that says why.
    """
    status = read_status(job.folder.status)
    if status.get("state") in (None, "RUNNING") and owner_is_gone(status):
        record_end(job.folder, job.config_hash, state, reason)


def _cause(code: int) -> str:
    if code >= 0:
        return f"the process ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = {"SIGKILL": " (out of memory?)", "SIGSEGV": " (a crash below Python)"}.get(name, "")
    return f"the process was killed by {name}{hint}"


def _result(folder: RunFolder) -> str:
    status, summary = read_status(folder.status), read_json(folder.summary)
    if status.get("reason"):
        return f"{status['state']}: {status['reason']}"
    loss = next((summary[key] for key in ("val_loss", "train_loss") if summary.get(key) is not None), None)
    return str(status.get("state")) if loss is None else f"{status['state']}: loss {loss:.4f}"


def _end(
    folder: SweepFolder, status: Status, code: int, asked: Collection[str], signals: Signals, *, draw: bool
) -> int:
    """Settles what is left open, sets the sweep's state, and compares the jobs.

    Args:
        folder: the sweep's.
        status: the sweep's own.
        code: what the jobs' launch answered.
        asked: each `config_hash` of this command: those of earlier ones are no matter of its exit code.
        signals: what they asked for.
        draw: whether the jobs are compared, and what to do next is said.
    """
    jobs = folder.jobs()
    for job in jobs:
        if job.state == "RUNNING":
            settle(job, "PREEMPTED", "its process is gone")
    left = [job for job in jobs if not job.is_done]
    status.step = len(jobs) - len(left)
    if code in task.STOPS:
        status.set(
            "PREEMPTED", "interrupted" if code == ExitCode.INTERRUPTED else f"stopped by {signals.asked or 'SIGTERM'}"
        )
    else:
        states = {job.state for job in jobs if job.config_hash in asked}
        failed = code not in (ExitCode.FINISHED, ExitCode.DIVERGED) or not states <= set(FINISHED_STATES)
        code = ExitCode.FAILED if failed else ExitCode.DIVERGED if "DIVERGED" in states else ExitCode.FINISHED
        if left or failed:
            status.set("FAILED", f"{len(left)} of {len(jobs)} jobs without a result")
        else:
            status.set("FINISHED")
    if draw:
        _compare(folder, signals)
        for command, mine in to_go_on(left).items():
            _say(f"{len(mine)} of {len(jobs)} jobs have no result; the same command again runs only those: {command}")
            for job in mine:
                _say(f"  {job.label()}: {_result(job.folder) if job.state else 'not started'}")
    return int(code)


@contextmanager
def _drawn_as_jobs_end(folder: SweepFolder) -> Iterator[None]:
    """Draws the comparison again after a job has ended, under any launcher; in a thread, so that no job waits."""
    over, drawn = threading.Event(), _ended(folder)

    def look() -> None:
        nonlocal drawn
        while not over.wait(LOOK_S):
            with suppress(Exception):  # the sweep's end says what is wrong with its page
                if (ended := _ended(folder)) != drawn:
                    drawn = ended
                    from lightning_opt import reports

                    reports.write_sweep(folder.path)

    thread = threading.Thread(target=look, name="comparison", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _ended(folder: SweepFolder) -> list[str | None]:
    return [job.state if job.state != "RUNNING" else None for job in folder.jobs()]


def _compare(folder: SweepFolder, signals: Signals) -> None:
    """The comparison; a fault here must not hide how the sweep ended."""
    try:
        with signals.finishing("the comparison is still drawn"):
            from lightning_opt import reports

            reports.write_sweep(folder.path)
            for line in reports.sweep_lines(folder.path):
                _say(line)
    except (KeyboardInterrupt, Terminated):
        _say("asked to stop once more: the comparison is not drawn")
    except Exception as error:
        _say(f"{traceback.format_exc()}the comparison could not be written: {type(error).__name__}: {error}")


def _say(line: str) -> None:
    say(line, sys.stdout)
