"""Rooms side by side: the verdicts of one by one, in order; how many there are; what goes wrong in one is said."""

from __future__ import annotations

import socket
import threading
from types import SimpleNamespace

import pytest

from lightning_opt.evaluation import sandbox
from lightning_opt.evaluation.sandbox import Limits, Rooms, Sandbox, SandboxError, Verdict, rooms

ISOLATED, WHY = sandbox.available()
PROGRAMS = [
    "assert True",
    "import time\ntime.sleep(0.3)",
    "assert False",
    "raise SystemExit(0)",
    "while True: pass",
    "import os\nos.kill(-1, 9)",
    "import os\nos._exit(0)",
    "open('/tmp/x', 'w').write('x')",
    "import os\nassert os.listdir('/tmp') == []",
    "1 / 0",
]


@pytest.mark.skipif(not ISOLATED, reason=WHY)
def test_the_verdicts_are_those_of_one_by_one() -> None:
    limits, told = Limits(seconds=1.0), []
    with Sandbox(limits) as room:
        wanted = [room.run(program) for program in PROGRAMS]
    several = Rooms(limits, count=3)
    try:
        found = several.run(PROGRAMS, lambda: told.append(1))
        users = {room.user for room in several.rooms}
    finally:
        several.close()
    assert [(one.passed, one.reason) for one in found] == [(one.passed, one.reason) for one in wanted]
    assert [one.passed for one in found] == [True, True, False, False, False, False, False, True, True, False]
    assert len(told) == len(PROGRAMS)
    assert len(users) == 3


@pytest.mark.skipif(not ISOLATED, reason=WHY)
def test_a_user_id_is_claimed_from_all_of_the_machine_while_its_room_stands() -> None:
    """Process limits count by user id: a room of another process under the same one would eat into them."""

    def is_free(user: int) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as name:
            try:
                name.bind(f"\0lightning_opt sandbox {user}")
            except OSError:
                return False
        return True

    with Sandbox() as room:
        assert room.run("pass").passed
        user = room.user
        assert not is_free(user)
    assert is_free(user)


def test_as_many_as_there_are_rooms_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3)

    def run(self: Sandbox, program: str) -> Verdict:
        together.wait(30)  # for two others
        return Verdict(True, program)

    monkeypatch.setattr(Sandbox, "run", run)
    assert [verdict.reason for verdict in Rooms(count=3).run(list("abcdefghi"))] == list("abcdefghi")
    assert Rooms(count=3).run([]) == []


def test_a_machine_that_cannot_isolate_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Sandbox, program: str) -> Verdict:
        raise SandboxError("no namespaces")

    monkeypatch.setattr(Sandbox, "run", run)
    with pytest.raises(SandboxError, match="no namespaces"):
        Rooms(count=2).run(["x"] * 9)


@pytest.mark.parametrize(("cpus", "gigabytes", "wanted"), [(8, 5, 2), (2, 500, 2), (64, 500, 16), (4, 1, 1)])
def test_one_room_per_cpu_within_the_memory(
    monkeypatch: pytest.MonkeyPatch, cpus: int, gigabytes: int, wanted: int
) -> None:
    """A program may take four times half a gigabyte."""
    monkeypatch.setattr(rooms, "available_cpus", lambda: cpus)
    monkeypatch.setattr(rooms.psutil, "virtual_memory", lambda: SimpleNamespace(available=gigabytes << 30))
    assert len(Rooms().rooms) == wanted
