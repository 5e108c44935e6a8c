"""Who may work in which folder."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_opt.run_folder import (
    FolderRefused,
    Status,
    adoptable,
    claim,
    config_hash,
    owner_is_gone,
    owner_seems_gone,
    read_status,
)

HASH = "0123abcd"


def leave(folder: Path, state: str, pid: int | None = None) -> None:
    """Writes the status that an earlier process left behind; a pid of None is one that is gone."""
    status = read_status(folder / "status.json")
    status["state"] = state
    if pid is None:
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait()
        status["owner"] |= {"pid": child.pid, "started": 1.0}
    (folder / "status.json").write_text(json.dumps(status))


@pytest.mark.parametrize(
    ("state", "adopted"),
    [("RUNNING", True), ("PREEMPTED", True), ("FAILED", True), ("FINISHED", False), ("DIVERGED", False)],
)
def test_the_same_command_adopts_what_is_unfinished(tmp_path: Path, state: str, adopted: bool) -> None:
    first, _ = claim(tmp_path, "run", HASH)
    leave(first.path, state)
    again, was_adopted = claim(tmp_path, "run", HASH)
    assert was_adopted is adopted
    assert (again.path == first.path) is adopted


def test_a_live_owner_keeps_the_folder(tmp_path: Path) -> None:
    first, _ = claim(tmp_path, "run", HASH)
    again, adopted = claim(tmp_path, "run", HASH)
    assert not adopted
    assert again.path != first.path


def test_another_configuration_or_never_makes_a_new_folder(tmp_path: Path) -> None:
    first, _ = claim(tmp_path, "run", HASH)
    leave(first.path, "RUNNING")
    assert claim(tmp_path, "run", "ffff0000")[1] is False
    assert claim(tmp_path, "run", HASH, resume="never")[0].path != first.path


def test_a_number_used_again_is_another_process(tmp_path: Path) -> None:
    """The owner's pid lives, but it started at another time."""
    first, _ = claim(tmp_path, "run", HASH)
    status = read_status(first.status)
    status["owner"] |= {"pid": os.getpid(), "started": 12.5}
    first.status.write_text(json.dumps(status))
    assert claim(tmp_path, "run", HASH)[1] is True


def owned_elsewhere(folder: Path, age: float) -> None:
    status = read_status(folder / "status.json")
    status["owner"] |= {"host": "elsewhere", "heartbeat": time.time() - age}
    (folder / "status.json").write_text(json.dumps(status))


class Sleeps:
    """Stands in for `time`: sleeping takes no time, and somebody may do something meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: float = 0, act: Callable[[], None] = lambda: None) -> None:
        self.slept, self._at, self._act, self.time = 0.0, at, act, time.time
        monkeypatch.setattr(importlib.import_module("lightning_opt.run_folder.folder"), "time", self)

    def monotonic(self) -> float:
        return self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        if self.slept == self._at:
            self._act()


# the age of a heartbeat; a negative one is of a clock ahead of ours
@pytest.mark.parametrize("age", [600, 1, -3600])
def test_a_run_whose_host_broke_down_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, age: float
) -> None:
    first, _ = claim(tmp_path, "run", HASH)
    owned_elsewhere(first.path, age)
    sleeps = Sleeps(monkeypatch)
    again, adopted = claim(tmp_path, "run", HASH)
    assert adopted
    assert again.path == first.path
    assert sleeps.slept == pytest.approx(120, abs=1)
    assert len(caplog.messages) == 2


# by our clock: one that beat just now, and one whose clock is an hour behind
@pytest.mark.parametrize("age", [5, 3600])
@pytest.mark.parametrize("named", [False, True])
def test_a_run_that_beats_on_another_host_keeps_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool, age: float
) -> None:
    first, _ = claim(tmp_path, "run", HASH)
    owned_elsewhere(first.path, age)
    assert adoptable(tmp_path, "run", HASH) is None
    sleeps = Sleeps(monkeypatch, at=7, act=lambda: owned_elsewhere(first.path, age - 7))
    if named:
        with pytest.raises(FolderRefused, match="in progress"):
            claim(tmp_path, "run", HASH, path=first.path)
    else:
        again, adopted = claim(tmp_path, "run", HASH)
        assert not adopted
        assert again.path != first.path
    assert sleeps.slept == 7


def test_who_took_it_up_before_us_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commands look at the same dead owner: the one that is later finds another's name, of this host."""
    first, _ = claim(tmp_path, "run", HASH)
    own = first.status.read_text()
    owned_elsewhere(first.path, 5)
    Sleeps(monkeypatch, at=100, act=lambda: first.status.write_text(own))
    assert claim(tmp_path, "run", HASH)[0].path != first.path


def test_who_slept_while_another_took_the_folder_up_ends_and_writes_no_more(tmp_path: Path) -> None:
    """The kernel stops it, as a host does that hangs; its next beat finds the other's name."""
    code = f"""
import time
from pathlib import Path
from lightning_opt.run_folder import status
status.HEARTBEAT_S = 0.05
with status.Status(Path({str(tmp_path)!r}) / "status.json", {HASH!r}):
    print("runs", flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "runs\n"
    time.sleep(0.3)
    assert child.poll() is None  # its own name does not trouble it
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    owned_elsewhere(tmp_path, 0)
    theirs = (tmp_path / "status.json").read_bytes()
    child.send_signal(signal.SIGCONT)
    _, said = child.communicate(timeout=30)
    assert child.returncode == 143
    assert "on elsewhere has taken it up: this one ends and writes no more" in said
    assert (tmp_path / "status.json").read_bytes() == theirs
    assert owner_seems_gone(read_status(tmp_path / "status.json")) is False
    owned_elsewhere(tmp_path, 600)
    assert owner_seems_gone(read_status(tmp_path / "status.json"))  # on a page
    assert not owner_is_gone(read_status(tmp_path / "status.json"))


def claimer(root: Path, seconds: float) -> list[str]:
    """A command that claims a folder, prints it, and holds it for a while."""
    code = f"""
import time
from pathlib import Path
from lightning_opt.run_folder import claim
print(claim(Path({str(root)!r}), "run", {HASH!r})[0].path, flush=True)
time.sleep({seconds})
"""
    return [sys.executable, "-c", code]


@pytest.mark.fault(33, "two launches in the same second: different folders, nothing overwritten")
def test_launches_in_the_same_moment_get_different_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        runs = list(
            pool.map(
                lambda _: subprocess.run(claimer(tmp_path, 1.5), capture_output=True, text=True, check=True).stdout,
                range(4),
            )
        )
    assert len(set(runs)) == 4


def test_a_killed_owner_is_gone(tmp_path: Path) -> None:
    child = subprocess.Popen(claimer(tmp_path, 60), stdout=subprocess.PIPE, text=True)
    folder = Path(child.stdout.readline().strip())
    assert claim(tmp_path, "run", HASH)[0].path != folder
    child.send_signal(signal.SIGKILL)  # not reaped yet: a zombie is gone too
    time.sleep(0.3)
    for other in tmp_path.glob("run/*Z-*"):
        if other != folder:
            leave(other, "FINISHED")
    again, adopted = claim(tmp_path, "run", HASH)
    child.wait()
    assert adopted
    assert again.path == folder


def test_a_named_folder(tmp_path: Path) -> None:
    named = tmp_path / "mine"
    folder, adopted = claim(tmp_path, "run", HASH, path=named)
    assert folder.path == named
    assert not adopted
    with pytest.raises(FolderRefused, match="in progress"):
        claim(tmp_path, "run", HASH, path=named)
    leave(named, "RUNNING")
    assert claim(tmp_path, "run", HASH, path=named)[1] is True
    leave(named, "RUNNING")
    with pytest.raises(FolderRefused, match="another configuration"):
        claim(tmp_path, "run", "ffff0000", path=named)
    with pytest.raises(FolderRefused, match=r"resume=never starts anew, and this one holds a run$"):
        claim(tmp_path, "run", HASH, path=named, resume="never")
    leave(named, "FINISHED")
    with pytest.raises(FolderRefused, match="already FINISHED"):
        claim(tmp_path, "run", HASH, path=named)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(FolderRefused, match="other files"):
        claim(tmp_path, "run", HASH, path=tmp_path / "full")


def test_the_hash_ignores_order_name_and_resume() -> None:
    config = {"optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]}, "seed": 1, "name": "a", "resume": "auto"}
    same = {"resume": "never", "name": "b", "seed": 1, "optimizer": {"betas": [0.9, 0.95], "lr": 1e-3}}
    assert config_hash(config) == config_hash(same)
    assert config_hash(config) != config_hash({**config, "seed": 2})
    loading = {**config, "data": {"path": "a", "num_workers": 0, "cache_dir": "x"}}
    assert config_hash(loading) == config_hash({**loading, "data": {"path": "a", "num_workers": 4, "cache_dir": "y"}})
    assert config_hash(loading) != config_hash({**loading, "data": {"path": "b", "num_workers": 0, "cache_dir": "x"}})
    assert len(config_hash(config)) == 8
    saved = {**config, "callbacks": {"checkpoint": {"keep_last": 2}, "memory": {}}, "resume_allow": []}
    other = {**saved, "callbacks": {"checkpoint": {"keep_last": 1}, "memory": {}}, "resume_allow": ["data"]}
    assert config_hash(saved) == config_hash(other)  # so that a run that was refused can be gone on with


def test_a_run_that_starts_from_a_checkpoint_is_another() -> None:
    config = {"seed": 1, "resume": "auto"}
    elsewhere = {"seed": 1, "resume": "runs/x"}
    assert config_hash(config) != config_hash(elsewhere)
    assert config_hash(elsewhere) == config_hash({**elsewhere, "resume": "./runs/x/"})
    assert config_hash(elsewhere) != config_hash({**elsewhere, "resume": "runs/y"})


def test_what_would_be_adopted_is_told_without_touching_it(tmp_path: Path) -> None:
    assert adoptable(tmp_path, "run", HASH) is None
    first, _ = claim(tmp_path, "run", HASH)
    assert adoptable(tmp_path, "run", HASH) is None  # we live
    leave(first.path, "PREEMPTED")
    before = first.status.read_bytes()
    for found in (adoptable(tmp_path, "run", HASH), adoptable(tmp_path, "run", HASH, path=first.path)):
        assert found == first
    assert adoptable(tmp_path, "run", "ffff0000") is None
    assert adoptable(tmp_path, "run", "ffff0000", path=first.path) is None
    assert first.status.read_bytes() == before
    leave(first.path, "FINISHED")
    assert adoptable(tmp_path, "run", HASH) is None
    assert adoptable(tmp_path, "run", HASH, grows=True) == first


def test_status_tells_how_it_ended(tmp_path: Path) -> None:
    with Status(tmp_path / "status.json", HASH) as status:
        status.step = 7
        status.set("DIVERGED", "gradient norm nan at step 8")
        status.step = 8
    written = read_status(tmp_path / "status.json")
    assert (written["state"], written["step"], written["reason"]) == ("DIVERGED", 8, "gradient norm nan at step 8")
    assert written["owner"]["pid"] == os.getpid()
