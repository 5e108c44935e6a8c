"""The inside of the sandbox: builds the closed room, then runs one program after another in it. Standard library only.

Started by `room.Sandbox` as a fresh interpreter with an empty environment; its source comes by stdin, so that no
path of the host is in its memory. Frames on stdin and stdout: four bytes of length, then JSON. The first answer is
`{"ready": true, "user": 61999, "one_user": false}`, once an empty program has passed with every right given up,
or `{"error": why}`.

Two processes: the outer one makes the namespaces and waits; the inner one is process 1 of the new PID namespace and
keeps the rights to build. Every candidate is a fork of process 1 that gives up all rights before it runs a line. The
room ends when stdin does: a death signal of the owner would come when the owner's thread ends that started the room.
"""

from __future__ import annotations

import bisect  # noqa: F401 - what solutions import most is loaded before the room closes: a fork then has it for free
import collections
import contextlib
import copy  # noqa: F401
import dataclasses  # noqa: F401
import datetime  # noqa: F401
import decimal  # noqa: F401
import errno
import fractions  # noqa: F401
import functools  # noqa: F401
import glob
import hashlib
import heapq  # noqa: F401
import itertools  # noqa: F401
import json
import math
import operator  # noqa: F401
import os
import random
import re  # noqa: F401
import resource
import select
import signal
import socket
import statistics  # noqa: F401
import string  # noqa: F401
import struct
import sys
import time
import types
import typing  # noqa: F401

import sandbox_kernel as kernel

_NEW_ROOT = (
    "/proc"  # a folder that every Linux has and nothing of ours lies in; covered only in our own mount namespace
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")

Limits = collections.namedtuple("Limits", "seconds memory_bytes processes file_bytes open_files folder_bytes")
_TRIAL = Limits(10.0, 512 << 20, 4, 1 << 20, 32, 1 << 20)
_claims: list[socket.socket] = []  # held as long as the room stands; candidates lose every descriptor but two


def _read_exactly(fd: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.read(fd, count)
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _send(fd: int, message: dict) -> None:
    body = json.dumps(message).encode()
    view = memoryview(struct.pack("!I", len(body)) + body)
    while view:
        view = view[os.write(fd, view) :]


def _free_user() -> int:
    """A user id that no account, no running process and no other room of this machine has."""
    taken = set()
    with contextlib.suppress(OSError), open("/etc/passwd", encoding="utf-8", errors="replace") as accounts:
        taken.update(line.split(":")[2] for line in accounts if line.count(":") >= 3)
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                taken.add(str(entry.stat().st_uid))
    choice = random.SystemRandom()
    while True:
        user = choice.randrange(61_184, 65_520)  # below 65536: containers may map no more
        if str(user) not in taken and _claim(user):
            return user


def _claim(user: int) -> bool:
    """Whether no other room has this id: a name that the kernel gives to one, and takes back when it dies."""
    name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        name.bind(f"\0lightning_opt sandbox {user}")
    except OSError as error:
        name.close()
        return error.errno != errno.EADDRINUSE  # where such names cannot be had, ids are only unlikely to meet
    _claims.append(name)
    return True


def _make_namespaces() -> tuple[int, bool]:
    """The user id for candidates, and whether the room knows that one alone (then nobody can change the user).

    Root that may not make namespaces makes them in a user namespace, and candidates must not be root of the host there
    either: no process limit binds it (getrlimit(2), RLIMIT_NPROC), whatever it is called inside.
    """
    user = _free_user()
    flags = kernel.NEW_NS | kernel.NEW_PID | kernel.NEW_NET | kernel.NEW_IPC | kernel.NEW_UTS
    outer_user, outer_group = os.geteuid(), os.getegid()
    if outer_user == 0:
        with contextlib.suppress(OSError):
            kernel.unshare(flags)
            return user, False
        _map_users(
            flags | kernel.NEW_USER, {"uid_map": f"0 0 1\n{user} {user} 1", "gid_map": f"0 0 1\n{user} {user} 1"}
        )
        return user, False
    kernel.unshare(flags | kernel.NEW_USER)
    one = {"setgroups": "deny", "uid_map": f"{user} {outer_user} 1", "gid_map": f"{user} {outer_group} 1"}
    _write_maps("self", one)
    return user, True


def _map_users(flags: int, maps: dict[str, str]) -> None:
    """Enters the namespaces and has a process that stayed outside, with root's rights there, map several ids."""
    wait, go = os.pipe()
    me, helper = os.getpid(), os.fork()
    if helper == 0:
        failed = 1
        try:
            os.close(go)
            if os.read(wait, 1):
                _write_maps(str(me), maps)
                failed = 0
        finally:
            os._exit(failed)
    os.close(wait)
    try:
        kernel.unshare(flags)
        os.write(go, b"1")
    finally:
        os.close(go)
        failed = os.waitpid(helper, 0)[1]
    if failed:
        raise PermissionError("process limits do not bind root, and root here may not map another user")


def _write_maps(process: str, maps: dict[str, str]) -> None:
    for name, text in maps.items():
        with open(f"/proc/{process}/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _shown_folders() -> list[str]:
    """Folders that a candidate may read: Python's own library and the system's shared libraries."""
    sys.path[:] = [os.path.realpath(path) for path in sys.path]
    wanted = [path for path in sys.path if os.path.isdir(path)]
    wanted += [os.path.realpath(path) for path in _LIBRARIES if os.path.isdir(path)]
    shown: list[str] = []
    for path in sorted(set(wanted)):
        if not any(path == outer or path.startswith(outer + "/") for outer in shown):
            shown.append(path)
    return shown


def _build_room() -> None:
    """A root of its own on a small tmpfs: libraries read-only, four devices, /tmp; no /proc, /etc, /home."""
    room = kernel.MS_NOSUID | kernel.MS_NODEV
    shown = _shown_folders()
    installed = ("/*-packages", "/python*/*-packages")  # site-packages, and dist-packages of Debian
    hidden = [path for folder in shown for pattern in installed for path in glob.glob(folder + pattern)]
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", _NEW_ROOT, "tmpfs", kernel.MS_NOSUID, "size=64k,mode=755")
    for path in shown:
        os.makedirs(_NEW_ROOT + path, exist_ok=True)
        kernel.mount(path, _NEW_ROOT + path, None, kernel.MS_BIND | kernel.MS_REC)
        kernel.make_read_only(_NEW_ROOT + path)
    for path in hidden:
        kernel.mount("tmpfs", _NEW_ROOT + path, "tmpfs", room | kernel.MS_RDONLY, "size=4k,mode=755")
    for path in _LIBRARIES:
        if os.path.islink(path) and not os.path.lexists(_NEW_ROOT + path):
            os.symlink(os.readlink(path), _NEW_ROOT + path)
    os.makedirs(_NEW_ROOT + "/dev")
    for path in _DEVICES:
        os.close(os.open(_NEW_ROOT + path, os.O_CREAT | os.O_WRONLY, 0o600))
        kernel.mount(path, _NEW_ROOT + path, None, kernel.MS_BIND)
    os.makedirs(_NEW_ROOT + "/tmp")
    kernel.enter_root(_NEW_ROOT)
    kernel.mount("none", "/", None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID)
    with contextlib.suppress(OSError):
        socket.sethostname("sandbox")


def _limit(limits: Limits) -> None:
    cpu = math.ceil(limits.seconds)
    for name, soft, hard in (
        ("RLIMIT_CPU", cpu, cpu + 1),
        ("RLIMIT_AS", limits.memory_bytes, limits.memory_bytes),
        ("RLIMIT_NPROC", limits.processes, limits.processes),
        ("RLIMIT_FSIZE", limits.file_bytes, limits.file_bytes),
        ("RLIMIT_NOFILE", limits.open_files, limits.open_files),
        ("RLIMIT_CORE", 0, 0),
        ("RLIMIT_MEMLOCK", 0, 0),
        ("RLIMIT_MSGQUEUE", 0, 0),
    ):
        resource.setrlimit(getattr(resource, name), (soft, hard))


def _give_up_rights(user: int, limits: Limits, keep: tuple[int, int], *, mapped: bool) -> None:
    """Turns this fork of process 1 into a candidate's: own folder and IPC, limits, two descriptors, no rights."""
    os.setsid()
    kernel.unshare(kernel.NEW_NS | kernel.NEW_IPC)
    options = f"size={limits.folder_bytes},nr_inodes=512,mode=700,uid={user},gid={user}"
    kernel.mount("tmpfs", "/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC, options)
    os.chdir("/tmp")
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    for fd in range(3, 256):
        if fd not in keep:
            with contextlib.suppress(OSError):
                os.close(fd)
    _limit(limits)
    if mapped:
        kernel.drop_capabilities()
    else:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    kernel.hide_memory()
    kernel.die_with_parent()
    kernel.no_new_privileges()
    kernel.refuse_system_calls()
    for number in range(1, signal.NSIG):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)


def _run(program: str, secret: int, report: int) -> None:
    """Runs the program; only when its last line is reached is the secret fetched and handed in."""
    fetch, hand_in, digest, whoami, leave = os.read, os.write, hashlib.sha256, os.getpid, os._exit
    me = whoami()
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    try:
        exec(compile(program, "candidate.py", "exec"), module.__dict__)
    except BaseException as error:
        hand_in(report, f"{type(error).__name__}: {error}"[:300].encode(errors="replace"))
        return
    if whoami() != me:  # a child that the program forked runs on to here too, and does not speak for it
        leave(0)
    hand_in(report, digest(fetch(secret, 64)).digest())


def _wait(child: int, seconds: float) -> int | None:
    """Exit status of the child, or None when the time is over."""
    with contextlib.suppress(OSError):
        handle = os.pidfd_open(child)
        try:
            if not select.select([handle], [], [], seconds)[0]:
                return None
            return os.waitpid(child, 0)[1]
        finally:
            os.close(handle)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    return None


def _clear() -> None:
    """Ends every process in the namespace but process 1 (us), and waits until none is left."""
    while True:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        try:
            while True:
                os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _judge(program: str, limits: Limits, user: int, *, mapped: bool) -> dict:
    """Runs one program in a process of its own and says whether it ran to its end."""
    secret_out, secret_in = os.pipe()
    report_out, report_in = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        leave = os._exit
        try:
            _give_up_rights(user, limits, (secret_out, report_in), mapped=mapped)
            _run(program, secret_out, report_in)
        except BaseException as error:
            with contextlib.suppress(BaseException):
                os.write(report_in, f"sandbox: {error}"[:300].encode())
        finally:
            leave(0)
    os.close(report_in)
    os.close(secret_out)
    nonce = os.urandom(32)  # made after the fork: the candidate's memory never held it
    with contextlib.suppress(OSError):
        os.write(secret_in, nonce)
    status = _wait(child, limits.seconds)
    _clear()
    os.close(secret_in)
    os.set_blocking(report_out, False)
    with contextlib.suppress(OSError):
        said = os.read(report_out, 4096)
    os.close(report_out)
    milliseconds = (time.monotonic() - started) * 1000
    passed = status == 0 and said == hashlib.sha256(nonce).digest()
    return {"passed": passed, "reason": _reason(status, said, passed=passed, limits=limits), "ms": milliseconds}


def _reason(status: int | None, said: bytes, *, passed: bool, limits: Limits) -> str:
    if passed:
        return "passed"
    if status is None:
        return f"timed out after {limits.seconds:g} s"
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return f"used more than {math.ceil(limits.seconds)} s of CPU time"
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}"
    return said.decode(errors="replace")[:300] or "left before the tests were over"


def _serve(requests: int, answers: int, user: int, *, mapped: bool) -> None:
    """Process 1: closes the room, then answers requests until stdin ends."""
    try:
        kernel.die_with_parent()
        kernel.hide_memory()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one signal with a handler: the others never reach process 1
        _build_room()
        trial = _judge("", _TRIAL, user, mapped=mapped)
    except OSError as error:
        _send(answers, {"error": str(error)})
        return
    if not trial["passed"]:
        _send(answers, {"error": trial["reason"]})
        return
    _send(answers, {"ready": True, "user": user, "one_user": mapped})
    while True:
        try:
            (length,) = struct.unpack("!I", _read_exactly(requests, 4))
            request = json.loads(_read_exactly(requests, length))
        except EOFError:
            return
        _send(answers, _judge(request["program"], Limits(**request["limits"]), user, mapped=mapped))


def main() -> None:
    """Entry point of the sandbox process."""
    requests, answers = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    sys.executable, sys.orig_argv = "", []
    try:
        user, mapped = _make_namespaces()
        inner = os.fork()
    except OSError as error:
        _send(answers, {"error": f"this machine grants no namespaces ({error})"})
        return
    if inner == 0:
        try:
            _serve(requests, answers, user, mapped=mapped)
        finally:
            os._exit(0)
    os.close(requests)
    os.close(answers)
    os.waitpid(inner, 0)
