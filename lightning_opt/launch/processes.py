"""Jobs in processes of their own, forked from a server that has imported the heavy packages once.

A job's process leads a process group, so that a signal reaches it once and its own children die with it; it watches
this process and dies with it too.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

from lightning_opt.job import leave
from lightning_opt.job.signals import STOP_SIGNALS
from lightning_opt.launch.refusing import say
from lightning_opt.run_folder import ExitCode

_CONTEXT = multiprocessing.get_context("forkserver")
START_S = 10.0  # for a job that had only just started to say that it was stopped
_STOPS = (ExitCode.INTERRUPTED, ExitCode.PREEMPTED)
# The server must stay single-threaded and clear of CUDA, or what it forks cannot use either.
_SERVER_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


@dataclass(frozen=True)
class Task:
    """One job.

    Attributes:
        prefix: opens each line of its output where several jobs speak at once.
        call: what the process does; picklable; answers an exit code.
        devices: how many it takes.
    """

    prefix: str
    call: Callable[[], int]
    devices: int = 1


class Places:
    """Where jobs can run.

    Args:
        devices: names for ``CUDA_VISIBLE_DEVICES``; none where the CPU is the only device.
        jobs_per_device: how many jobs share one.
    """

    def __init__(self, devices: Sequence[str], jobs_per_device: int = 1) -> None:
        self.on_gpu = bool(devices)
        self._free = dict.fromkeys(devices or ["cpu"], jobs_per_device)
        self.count = len(self._free) * jobs_per_device

    def take(self, devices: int) -> list[str] | None:
        """The emptiest so many devices (all, where there are fewer), or None while they are taken."""
        wanted = min(devices, len(self._free))
        free = sorted((name for name, left in self._free.items() if left), key=lambda name: -self._free[name])
        if len(free) < wanted:
            return None
        for name in free[:wanted]:
            self._free[name] -= 1
        return free[:wanted]

    def give_back(self, taken: Sequence[str]) -> None:
        """Frees what `take` gave."""
        for name in taken:
            self._free[name] += 1


def start_server(preload: Sequence[str]) -> None:
    """Starts the fork server, which imports in the background.

    Args:
        preload: modules to import; one that is not installed is left out.
    """
    _CONTEXT.set_forkserver_preload(list(preload))
    resource_tracker.ensure_running()  # before: it lets signals through again when it starts
    # Inherited: what ends a whole group must not end it.
    with _stops_wait(), environment(_SERVER_ENVIRONMENT):
        forkserver.ensure_running()


@contextmanager
def _stops_wait() -> Iterator[None]:
    """Signals that stop are answered only once this is over."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def environment(more: dict[str, str]) -> Iterator[None]:
    """Variables for the processes that start while this lasts."""
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def visible_devices() -> list[str]:
    """The GPUs a job could see, as ``CUDA_VISIBLE_DEVICES`` names them; a child asks, since asking may use CUDA."""
    reader, writer = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_count_devices, args=(writer, dict(os.environ)))
    process.start()
    writer.close()
    try:
        count = reader.recv()
    except EOFError:
        count = 0
    process.join()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(index) for index in range(count)]


def _count_devices(writer: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    import torch

    writer.send(torch.cuda.device_count())


@dataclass
class _Running:
    index: int
    task: Task
    process: ForkServerProcess
    places: list[str]
    output: Connection | None
    rest: bytes = field(default=b"")


class Pool:
    """Runs tasks as places become free, in order.

    Args:
        places: where.
        on_failure: ``continue``, ``stop`` (what runs may finish, nothing more starts) or ``retry:N``.
        until: `time.monotonic` after which nothing more starts; what runs may finish.
        before: told a task's index when it starts.
        after: told a task's index and its process's exit code, negative for a signal; answers the exit code that
            counts, since the process may have died after its work was done.
    """

    def __init__(
        self,
        places: Places,
        on_failure: str = "continue",
        *,
        until: float = math.inf,
        before: Callable[[int], None] = lambda index: None,
        after: Callable[[int, int], int] = lambda index, code: code,
    ) -> None:
        self._places, self._before, self._after, self._until = places, before, after, until
        self._stops_at_failure = on_failure == "stop"
        self._retries = int(on_failure.partition(":")[2] or 0)
        self._waiting: deque[tuple[int, Task]] = deque()
        self._running: list[_Running] = []

    def run(self, tasks: Sequence[Task]) -> dict[int, int]:
        """Runs the tasks.

        Returns:
            Exit codes by index; a task that never started has none.

        Raises:
            BaseException: what interrupted us (Ctrl-C, SIGTERM, SIGUSR1), once every job has been told and has ended.
        """
        self._waiting.extend(enumerate(tasks))
        self._share = min(len(tasks), self._places.count)
        codes: dict[int, int] = {}
        left = dict.fromkeys(range(len(tasks)), self._retries)
        try:
            while self._waiting or self._running:
                self._start_what_fits()
                for job in self._wait():
                    codes[job.index] = code = self._end(job)
                    if code in _STOPS:  # whoever interrupts one job means them all
                        self._waiting.clear()
                        self._tell(signal.SIGTERM)
                    elif code in (ExitCode.FINISHED, ExitCode.DIVERGED):
                        continue
                    elif left[job.index] and code != ExitCode.CONFIGURATION:
                        left[job.index] -= 1
                        self._waiting.appendleft((job.index, job.task))
                    elif self._stops_at_failure:
                        self._waiting.clear()
        except BaseException as stop:
            self._stop(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
            raise
        return codes

    def _start_what_fits(self) -> None:
        if time.monotonic() >= self._until:
            self._waiting.clear()
        while self._waiting:
            index, task = self._waiting[0]
            places = self._places.take(task.devices)
            if places is None:
                return
            self._waiting.popleft()
            self._before(index)
            self._running.append(self._start(index, task, places))

    def _start(self, index: int, task: Task, places: list[str]) -> _Running:
        reader, writer = _CONTEXT.Pipe(duplex=False) if self._share > 1 else (None, None)
        environment = dict(os.environ)
        if self._places.on_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(places)
        process = _CONTEXT.Process(target=_work, args=(task.call, environment, self._share, writer))
        with _stops_wait():  # half a start leaves a child that prints a traceback
            process.start()
        if reader is not None and writer is not None:
            writer.close()
            os.set_blocking(reader.fileno(), False)
        return _Running(index, task, process, places, reader)

    def _wait(self) -> list[_Running]:
        """Passes output on until at least one job has ended."""
        while self._running:
            ended = {job.process.sentinel: job for job in self._running}
            spoke = {job.output: job for job in self._running if job.output is not None}
            ready = wait([*ended, *spoke])
            for source in ready:
                if source in spoke:
                    self._pass_on(spoke[source])
            if done := [ended[source] for source in ready if source in ended]:
                return done
        return []

    def _pass_on(self, job: _Running, *, last: bool = False) -> None:
        while job.output is not None:
            try:
                chunk = os.read(job.output.fileno(), 65536)
            except BlockingIOError:
                break
            if not chunk:
                job.output.close()
                job.output = None
            *lines, job.rest = (job.rest + chunk).split(b"\n")
            self._print(job, lines)
        if last and job.rest:
            self._print(job, [job.rest])

    @staticmethod
    def _print(job: _Running, lines: Sequence[bytes]) -> None:
        for line in lines:
            say(f"{job.task.prefix} {line.decode(errors='replace')}".rstrip(), sys.stdout)

    def _end(self, job: _Running) -> int:
        job.process.join()
        code = job.process.exitcode
        _kill_group(job.process.pid)  # what it left behind must not hold memory or the output
        self._pass_on(job, last=True)
        if job.output is not None:
            job.output.close()
        self._running.remove(job)
        self._places.give_back(job.places)
        return int(self._after(job.index, 1 if code is None else code))

    def _tell(self, number: int) -> None:
        for job in self._running:
            with suppress(ProcessLookupError):
                os.kill(job.process.pid or 0, number)

    def _stop(self, number: int) -> None:
        """Asks every job to end and waits for it; a second signal kills."""
        try:
            self._tell(number)
            while self._running:
                for job in self._wait():
                    self._end(job)
        finally:
            for job in list(self._running):
                job.process.kill()
                self._end(job)
            for process in multiprocessing.active_children():  # interrupted while it started
                process.terminate()
                process.join(START_S)
                process.kill()


def _kill_group(pid: int | None) -> None:
    if pid:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _work(call: Callable[[], int], environment: dict[str, str], share: int, output: Connection | None) -> None:
    """What a job's process does, first of all to become its own."""
    os.setpgid(0, 0)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    if output is not None:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        output.close()
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    if share > 1:
        _share_threads(share)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # from now on they can be answered
        leave(call())
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)


def _share_threads(share: int) -> None:
    torch: Any = sys.modules.get("torch")
    all_threads = torch.get_num_threads() if torch else int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    mine = max(1, all_threads // share)
    os.environ["OMP_NUM_THREADS"] = str(mine)
    if torch:
        torch.set_num_threads(mine)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
