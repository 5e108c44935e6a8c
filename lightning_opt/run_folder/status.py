"""Who runs in a folder and how it stands: ``status.json`` with a heartbeat."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any, Literal

from lightning_opt.run_folder.records import json_text, late_events, overwrite_text, read_json, write_text

State = Literal["RUNNING", "FINISHED", "DIVERGED", "PREEMPTED", "FAILED"]
STATES: tuple[State, ...] = ("RUNNING", "FINISHED", "DIVERGED", "PREEMPTED", "FAILED")
FINISHED_STATES: tuple[State, ...] = ("FINISHED", "DIVERGED")
"""States that the same command does not take up again: a diverged run is a result."""


HEARTBEAT_S = 10.0
STALE_S = 120.0


def read_status(path: Path) -> dict[str, Any]:
    """Reads ``status.json``; empty when there is none or a crash of the machine left it unreadable."""
    try:
        return read_json(path)
    except ValueError:
        return {}


def owner_is_gone(status: dict[str, Any]) -> bool:
    """Tells whether nobody works in the folder any more.

    On this host the owner's process is looked up (its start time too, since numbers are used again). Of one on another
    host, whose clock need not be ours, only a heartbeat that does not move says so: see `claim`.
    """
    owner = status.get("owner")
    if not owner or status.get("state") != "RUNNING":
        return True
    return not is_elsewhere(status) and process_start(int(owner["pid"])) != owner.get("started")


def owner_seems_gone(status: dict[str, Any]) -> bool:
    """As good as `owner_is_gone` for a page: by the clock, two minutes without a heartbeat from another host say so."""
    if owner_is_gone(status) or not is_elsewhere(status):
        return owner_is_gone(status)
    return time.time() - float(status["owner"].get("heartbeat", 0)) > STALE_S


def is_elsewhere(status: dict[str, Any]) -> bool:
    """Whether the owner runs, or ran, on another host."""
    return status["owner"].get("host") != socket.gethostname()


def process_start(pid: int) -> float | None:
    """Start time of a live process in seconds since the epoch; None when there is none (a zombie is none)."""
    import psutil

    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return round(process.create_time(), 2)
    return None


class Status:
    """The only writer of ``status.json``; a context manager whose thread keeps the heartbeat.

    A process that stood still for so long that another took its folder up finds the other's name in the file. It ends
    at once, with 143, as if it had been killed: whatever it still wrote would meet the other's.

    Args:
        path: the file.
        config_hash: identity of the configuration, kept in the file so that a folder of any name can be adopted.
    """

    def __init__(self, path: Path, config_hash: str):
        self.path = path
        self.state: State = "RUNNING"
        self.step = 0
        self.reason: str | None = None
        self.config_hash = config_hash
        self._owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": process_start(os.getpid())}
        self._written = False
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="status-heartbeat", daemon=True)

    def __enter__(self) -> Status:
        self.write()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=2 * HEARTBEAT_S)
        self.write()

    def set(self, state: State, reason: str | None = None) -> None:
        """Changes the state and writes it at once.

        Args:
            state: one of `STATES`.
            reason: one line that says why.
        """
        self.state, self.reason = state, reason
        self.write()

    def write(self) -> None:
        """Writes the file now, and events that are late; on a full disk into the old file's place.

        Raises:
            OSError: there is none yet, and none can be made.
        """
        with self._lock:
            if self._written:
                self._give_way()
            self._written = True
            text = json_text(
                {
                    "state": self.state,
                    "step": self.step,
                    "reason": self.reason,
                    "config_hash": self.config_hash,
                    "owner": {**self._owner, "heartbeat": round(time.time(), 2)},
                }
            )
            try:
                write_text(self.path, text)
            except OSError:
                if not self.path.exists():
                    raise
                with contextlib.suppress(OSError):  # the next beat may succeed
                    overwrite_text(self.path, text)
        late_events()

    def _give_way(self) -> None:
        with contextlib.suppress(OSError):
            owner = read_status(self.path).get("owner") or self._owner
            if any(owner.get(name) != mine for name, mine in self._owner.items()):
                said = f"process {owner.get('pid')} on {owner.get('host')} has taken it up: this one ends"
                with contextlib.suppress(OSError):
                    os.write(2, f"\n{self.path.parent}: {said} and writes no more\n".encode())
                os._exit(143)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):
                self.write()
