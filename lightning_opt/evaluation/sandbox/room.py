"""One sandbox for generated code: `Sandbox().run(program)` says whether a Python program runs to its last line.

Covered: the program runs as a user id that nothing else has, without capabilities and without a way to gain any, in
PID, network, IPC, UTS and mount namespaces of its own. Its root holds Python's standard library and the system's
shared libraries (read-only), /dev/null, zero, random, urandom, and one writable folder, /tmp: a small tmpfs of its
own. The host's files, processes, network and environment are not there. Time (wall and CPU), address space,
processes, file size, open files and the folder's size are limited; standard input is empty, standard output goes
nowhere; a seccomp filter (x86-64, arm64; without one there is no sandbox) refuses sockets, ptrace, new namespaces,
mounts, bpf, keys, shared memory, and priorities, cores and limits of other processes.
When a program ends, every process it left is killed, and the next one starts in a fresh folder and IPC namespace.

As root the room's keeper is another user than the programs. As an ordinary user all of this stands in a user namespace
that maps one id: there the program has its keeper's id, and what keeps them apart is the filter, the keeper's closed
memory (no ptrace, no core) and the kernel's rule that process 1 takes no signal it has no handler for.

Not covered: holes in the kernel itself and CPU side channels; cgroup limits (so total memory is address space x
processes, and a candidate may use `processes` cores until its time is over); the wall clock, the kernel's version and
the names and contents of the shown library folders can be read. A solution that was written against this very file
can call itself passed (it shares an interpreter with the tests, as it could return an object equal to everything):
scores are honest for models, not for an attacker on the score.

Standard library only, Linux only.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import select
import struct
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

_LOG = logging.getLogger("lightning_opt.evaluation")
_FILES = {"sandbox_kernel": "kernel.py", "sandbox_server": "server.py"}
# Run from text, not from files: a program could read their path.
_START = """
import json, sys, types
for name, source in json.loads(sys.stdin.readline()).items():
    sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name + '.py', 'exec'), vars(sys.modules[name]))
sys.modules['sandbox_server'].main()
"""
_START_SECONDS = 20.0
_GRACE_SECONDS = 5.0

_PROBE = """
import ctypes, os, signal, socket
assert os.getuid() not in (0, {user}), 'user'
assert set(os.environ) <= {{'LC_CTYPE'}}, 'environment'
assert os.listdir('/tmp') == [], 'folder'
for path in {secret!r}:
    assert not os.path.exists(path), path
for family in (socket.AF_INET, socket.AF_UNIX):
    try:
        socket.socket(family)
    except PermissionError:
        continue
    raise AssertionError('a socket can be opened')
libc = ctypes.CDLL(None)
for flags in (0x10000000, 0x10020000, 0x40000000):
    assert libc.unshare(flags) == -1, 'a namespace can be made'
for path in ('/here', '/dev/here', '/usr/here'):
    try:
        open(path, 'w')
    except OSError:
        continue
    raise AssertionError(path + ' can be written')
try:
    for _ in range({processes}):
        if not os.fork():
            signal.pause()
except BlockingIOError:
    pass
else:
    raise AssertionError('more processes than allowed')
"""


class SandboxError(RuntimeError):
    """This machine cannot isolate programs; the text says why."""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: wall-clock time, and (rounded up) CPU time per process.
        memory_bytes: address space per process.
        processes: processes and threads at once.
        file_bytes: largest file.
        open_files: open descriptors.
        folder_bytes: size of the temporary folder.
    """

    seconds: float = 5.0
    memory_bytes: int = 512 << 20
    processes: int = 4
    file_bytes: int = 8 << 20
    open_files: int = 32
    folder_bytes: int = 16 << 20


@dataclass(frozen=True)
class Verdict:
    """How one program ended.

    Attributes:
        passed: the program ran to its last line.
        reason: `passed`, or the error in a few words (written by the program: not to be trusted).
        ms: milliseconds it took.
    """

    passed: bool
    reason: str
    ms: float = 0.0


class Sandbox:
    """A closed room that runs one program at a time; starts at the first `run`, and again should it die.

    Args:
        limits: of each program.

    Attributes:
        user: the user id that programs run as, once started.

    Raises:
        SandboxError: from `start` and `run`, where the machine cannot isolate programs.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.user: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Sandbox:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Builds the room."""
        if self._process is not None:
            return
        if not sys.platform.startswith("linux"):
            raise SandboxError(f"isolation needs Linux namespaces, this is {sys.platform}")
        folder = Path(__file__).resolve().parent
        sources = {name: (folder / file).read_text("utf-8") for name, file in _FILES.items()}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,  # Ctrl-C on the terminal must not end the room before its owner
        )
        hello = None
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(sources).encode() + b"\n")
            self._process.stdin.flush()
            hello = self._receive(time.monotonic() + _START_SECONDS)
        if not hello or not hello.get("ready"):
            self.close()
            raise SandboxError((hello or {}).get("error", "the sandbox process did not start"))
        self.user = hello["user"]

    def run(self, program: str) -> Verdict:
        """Runs `program` to its end or to its limits, alone; once more in a new room where the room itself has died.

        Args:
            program: Python source; passing means that the last line was reached without an exception.
        """
        with self._lock:
            for _ in range(2):  # a room may have been ended from outside, which is not the program's fault
                self.start()
                deadline = time.monotonic() + self.limits.seconds + _GRACE_SECONDS
                answer = None
                with contextlib.suppress(OSError):
                    self._send({"program": program, "limits": asdict(self.limits)})
                    answer = self._receive(deadline)
                if answer is not None:
                    return Verdict(**answer)
                self.close()
                if time.monotonic() >= deadline:
                    return Verdict(False, "the sandbox did not answer in time and was ended")
            return Verdict(False, "the sandbox died twice under this program")

    def close(self) -> None:
        """Ends the room and every process in it (the kernel ends a PID namespace with its first process)."""
        process, self._process = self._process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        if process.poll() is None:
            process.kill()
            process.wait()

    def _send(self, message: dict) -> None:
        body = json.dumps(message).encode()
        self._process.stdin.write(struct.pack("!I", len(body)) + body)
        self._process.stdin.flush()

    def _receive(self, deadline: float) -> dict | None:
        """The next answer, or None when the time is over or the process gone."""
        head = self._read(4, deadline)
        body = head and self._read(struct.unpack("!I", head)[0], deadline)
        return json.loads(body) if body else None

    def _read(self, wanted: int, deadline: float) -> bytes | None:
        fd, buffer = self._process.stdout.fileno(), b""
        while len(buffer) < wanted:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                return None
            part = os.read(fd, wanted - len(buffer))
            if not part:
                return None
            buffer += part
        return buffer


def _home_entries() -> list[str]:
    """What the home folder holds, but for the way to a Python that is installed in it."""
    library = str(Path(os.__file__).resolve())
    try:
        return [str(entry) for entry in Path.home().iterdir() if not library.startswith(str(entry))]
    except (OSError, RuntimeError):
        return []


@functools.cache
def available() -> tuple[bool, str]:
    """Whether programs can be isolated here, found out by isolating one; and if not, why (one line)."""
    secret = [str(Path(__file__).resolve()), "/etc/passwd", "/proc/self", *_home_entries()]
    try:
        with Sandbox() as sandbox:
            probe = sandbox.run(_PROBE.format(user=os.getuid(), secret=secret, processes=sandbox.limits.processes))
            if not probe.passed:
                return False, f"the sandbox leaks: {probe.reason}"
            if sandbox.run("raise SystemExit(0)").passed:
                return False, "the sandbox calls everything passed"
    except SandboxError as error:
        return False, f"no sandbox for generated code: {error}"
    return True, "isolated"
