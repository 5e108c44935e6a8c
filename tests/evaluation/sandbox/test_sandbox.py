"""Evil candidates: each is contained, counted as failed, and leaves the next one and the machine alone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lightning_opt.evaluation import sandbox
from lightning_opt.evaluation.sandbox import Limits, Sandbox

ISOLATED, WHY = sandbox.available()
pytestmark = pytest.mark.skipif(not ISOLATED, reason=WHY)

SECONDS = 1.0


@pytest.fixture(scope="module")
def room() -> Sandbox:
    with Sandbox(Limits(seconds=SECONDS)) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _others_are_unaffected(room: Sandbox) -> None:
    """After whatever the test ran, the same room still tells right from wrong, from a clean start."""
    yield
    assert room.run("import os\nassert os.listdir('/tmp') == []\nassert 1 + 1 == 2").passed
    assert not room.run("assert 1 + 1 == 3").passed
    user = room.user
    held = [entry for entry in os.scandir("/proc") if entry.name.isdigit() and entry.stat().st_uid == user]
    assert held == []


EVIL = {
    "endless loop": "while True: pass",
    "sleeps": "import time; time.sleep(60)",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "ten gigabytes": "x = [0] * (10 * 2**30 // 8)",
    "grows": "x = []\nwhile True: x.append(bytearray(2**20))",
    "deep recursion": "def f(): return f()\nf()",
    "deep recursion without limit": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "input": "input()",
    "gigabyte of output": "import sys\nfor _ in range(1024): sys.stdout.write('x' * 2**20)\nraise SystemExit",
    "os._exit": "import os\nos._exit(0)\nassert False",
    "sys.exit": "import sys\nsys.exit(0)\nassert False",
    "quits": "raise SystemExit(0)",
    "kills all": "import os\nos.kill(-1, 9)",
    "kills process 1": "import os\nos.kill(1, 9)\nassert False",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)\nassert False",
    "kills itself": "import os\nos.kill(os.getpid(), 9)",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "ignores signals": "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\nwhile True: pass",
    "alarm": "import signal, time\nsignal.alarm(1)\ntime.sleep(60)",
    "big file": "open('/tmp/x', 'wb').write(b'x' * 2**26)",
    "many files": "for n in range(10**6): open(f'/tmp/{n}', 'w').close()",
    "many descriptors": "files = [open('/dev/null') for _ in range(1000)]",
    "closes everything": "import os\nos.closerange(0, 1000)\nos._exit(0)",
    "floods its report": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'passed' * 9)\n"
    "    except OSError: pass\nos._exit(0)",
    "syntax error": "def f(:\n",
    "null byte": "x = 1\0",
    "replaces builtins": "import builtins\nfor n in ('BaseException', 'Exception', 'type', 'open', 'exec'):\n"
    "    setattr(builtins, n, None)\nraise ValueError",
    "crashes": "import ctypes\nctypes.string_at(0)",
    "swallows everything": "while True:\n    try:\n        while True: raise SystemExit(0)\n"
    "    except BaseException: pass",
    "swallows its failure": "try:\n    assert False\nexcept BaseException:\n    raise SystemExit(0)",
    "leaves in a finally": "import os\ntry:\n    assert False\nfinally:\n    os._exit(0)",
    "leaves at exit": "import atexit, os\natexit.register(os._exit, 0)\nassert False",
    "fills the folder": "n = 0\nwhile True:\n    open(f'/tmp/{n}', 'wb').write(b'x' * 2**20)\n    n += 1",
    "fills by one sparse file": "f = open('/tmp/x', 'wb')\nf.seek(2**40)\nf.write(b'x')\nf.flush()",
    "links the host's root": "import os\nos.symlink('/etc/passwd', '/tmp/x')\nopen('/tmp/x').read()",
    "climbs out": "open('../../../../../../etc/passwd').read()",
    "links a library hard": "import os\nos.link(os.__file__, '/tmp/x')\nopen('/tmp/x', 'a').write('x')",
    "writes through a link": "import os\nos.symlink(os.__file__, '/tmp/x')\nopen('/tmp/x', 'a').write('x')",
    "runs what it wrote": "import os, stat\nopen('/tmp/x', 'w').write('#!/bin/true\\n')\nos.chmod('/tmp/x', 0o4755)\n"
    "os.execv('/tmp/x', ['x'])",
    "reads the keeper's environment": "open('/proc/1/environ').read()",
    "reads its keeper's memory": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "asks for a name": "import socket\nsocket.gethostbyname('localhost')",
    "starts a shell": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'], check=True)",
    "flood on a closed pipe": "import os\nwhile True: os.write(2, b'x' * 2**16)",
    "raises in str": "class E(BaseException):\n    def __str__(self): raise self\nraise E",
}


@pytest.mark.parametrize("name", EVIL)
def test_evil_candidate_fails(room: Sandbox, name: str) -> None:
    assert not room.run(EVIL[name]).passed


CONTAINED = {
    "endless loop": r"timed out after 1 s|used more than 1 s of CPU time",
    "swallows everything": r"timed out after 1 s|used more than 1 s of CPU time",
    "ten gigabytes": "MemoryError",
    "grows": "MemoryError|timed out after 1 s",
    "thread bomb": "can't start new thread",
    "big file": r"File too large|killed by signal 25",
    "fills by one sparse file": r"File too large|killed by signal 25",
    "fills the folder": "No space left on device",
    "many files": "No space left on device",
    "many descriptors": "Too many open files",
    "links the host's root": "No such file or directory",
    "climbs out": "No such file or directory",
    "links a library hard": "Invalid cross-device link|Operation not permitted|Read-only",
    "writes through a link": "Read-only file system|Permission denied",
    "runs what it wrote": "Permission denied",
    "reads the keeper's environment": "No such file or directory",
    "os._exit": "left before the tests were over",
    "swallows its failure": "SystemExit",
}


@pytest.mark.parametrize("name", CONTAINED)
def test_it_fails_for_the_right_reason(room: Sandbox, name: str) -> None:
    """It was stopped by what is meant to stop it, and not by a slip in the attempt."""
    assert re.search(CONTAINED[name], room.run(EVIL[name]).reason), room.run(EVIL[name]).reason


def passes(room: Sandbox, program: str) -> None:
    verdict = room.run(program)
    assert verdict.passed, verdict.reason


def test_nothing_can_be_removed_or_written_outside(room: Sandbox, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("alive")
    room.run("import shutil\nshutil.rmtree('/', ignore_errors=True)")
    assert Path(os.__file__).exists()
    passes(
        room,
        f"import os\nassert not os.path.exists({str(canary)!r})\n"
        "library = os.path.dirname(os.__file__)\n"
        "for place in ('/x', '/dev/x', '/usr/lib/x', library + '/x', '/dev/shm/x', '/var/tmp/x'):\n"
        "    try: open(place, 'w')\n    except OSError: continue\n    raise AssertionError(place)",
    )
    assert canary.read_text() == "alive"
    passes(room, "open('/tmp/mine', 'w').write('x')")


def test_host_secrets_are_not_there(room: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    canary = Path.home() / f".canary-{os.getpid()}"
    canary.write_text("secret")
    try:
        with Sandbox() as fresh:
            passes(fresh, "import os\nassert set(os.environ) <= {'LC_CTYPE'}, dict(os.environ)")
            for path in (canary, Path("/etc/passwd"), Path("/proc/1/environ"), Path("/proc/self/mem"), Path(__file__)):
                passes(fresh, f"import os\nassert not os.path.lexists({str(path)!r})")
            passes(fresh, "import os\nassert os.listdir('/dev') and not os.path.exists('/dev/shm')")
    finally:
        canary.unlink()


def test_no_network(room: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        reached = []
        threading.Thread(target=lambda: reached.append(server.accept()), daemon=True).start()
        verdict = room.run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)")
        assert not verdict.passed
        assert reached == []
        name = f"\0lightning-opt-{os.getpid()}"
        with socket.socket(socket.AF_UNIX) as abstract:
            abstract.bind(name)
            abstract.listen()
            attempt = f"import socket\nsocket.socket(socket.AF_UNIX).connect({name!r})"
            assert not room.run(attempt).passed


def test_user_has_no_rights_and_can_gain_none(room: Sandbox) -> None:
    passes(
        room,
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"assert os.getuid() == os.geteuid() == {room.user}\n"
        "assert libc.unshare(0x10000000) == -1\nassert libc.unshare(0x20000) == -1\n"
        "assert libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) == -1\nassert libc.ptrace(16, 1, 0, 0) == -1\n"
        "assert libc.prctl(39, 0, 0, 0, 0) == 1\nassert libc.shmget(0, 4096, 0o1600) == -1\n"
        "for call in (lambda: os.setuid(0), lambda: os.chroot('/tmp'), lambda: os.nice(-5)):\n"
        "    try: call()\n    except OSError: continue\n    raise AssertionError",
    )
    passes(room, "import os\nassert os.getpid() > 1\ntry: os.kill(1, 0)\nexcept PermissionError: pass")


def test_a_daemon_does_not_outlive_its_program(room: Sandbox) -> None:
    passes(
        room,
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n"
        "    if os.fork() == 0:\n        time.sleep(60)\n    os._exit(0)",
    )


def test_a_forked_child_cannot_speak_for_its_parent(room: Sandbox) -> None:
    assert not room.run("import os\nif os.fork():\n    os._exit(0)\n").passed


def test_programs_do_not_influence_each_other(room: Sandbox) -> None:
    passes(room, "import math, builtins\nmath.pi = 3\nbuiltins.len = None\nopen('/tmp/left', 'w').close()")
    passes(room, "import math, os\nassert math.pi > 3 and len('ab') == 2 and os.listdir('/tmp') == []")


def test_a_dead_room_costs_no_program_its_verdict() -> None:
    with Sandbox() as fragile:
        passes(fragile, "x = 1")
        fragile._process.kill()
        fragile._process.wait()
        passes(fragile, "x = 1")


def test_a_room_that_dies_under_a_program_runs_it_again() -> None:
    with Sandbox() as fragile:
        threading.Timer(0.5, fragile._process.kill).start()
        passes(fragile, "import time\ntime.sleep(1)")


def test_room_outlives_the_thread_that_started_it() -> None:
    with contextlib.closing(Sandbox()) as opened:
        starter = threading.Thread(target=opened.start)
        starter.start()
        starter.join()
        process = opened._process
        passes(opened, "import time\ntime.sleep(0.3)")
        assert opened._process is process


def test_room_ends_with_its_owner(tmp_path: Path) -> None:
    code = (
        "import os\nfrom lightning_opt.evaluation.sandbox import Sandbox\n"
        "room = Sandbox()\nroom.start()\nprint(room._process.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the sandbox outlived its owner")


def test_no_isolation_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(sandbox.SandboxError, match="darwin"):
        Sandbox().run("x = 1")


OTHERS = {
    "limits": "import resource\nresource.prlimit({pid}, resource.RLIMIT_AS, (1 << 20, 1 << 20))",
    "asks for limits": "import resource\nresource.prlimit({pid}, resource.RLIMIT_AS)",
    "priority": "import os\nos.setpriority(os.PRIO_PROCESS, {pid}, 19)",
    "priority of the user": "import os\nos.setpriority(os.PRIO_USER, 0, 19)",
    "cores": "import os\nos.sched_setaffinity({pid}, [0])",
    "scheduler": "import os\nos.sched_setscheduler({pid}, os.SCHED_IDLE, os.sched_param(0))",
}


@pytest.mark.parametrize("name", OTHERS)
def test_process_1_cannot_be_slowed_or_starved(room: Sandbox, name: str) -> None:
    """Refused by the filter: a child of the program's own user is as closed to it as process 1."""
    attempt = OTHERS[name].format(pid="child").replace("\n", "\n    ")
    passes(
        room,
        "import os, time\nchild = os.fork()\nif not child:\n    time.sleep(9)\n    os._exit(0)\n"
        f"try:\n    {attempt}\nexcept PermissionError:\n    pass\nelse:\n    raise AssertionError",
    )
    passes(room, "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))")


def test_programs_see_no_installed_package_and_no_path_of_ours(room: Sandbox) -> None:
    installed = [path for top in ("/usr/lib", "/usr/local/lib") for path in Path(top).glob("python*/*-packages")]
    installed.append(Path(os.__file__).parent / "site-packages")
    for folder in installed:
        passes(room, f"import os\nassert not os.path.exists({str(folder)!r}) or os.listdir({str(folder)!r}) == []")
    hosts = [str(Path(sandbox.__file__).parent), sys.executable]
    passes(
        room,
        "import sys\nframe, seen = sys._getframe(), [repr(vars(sys))]\n"
        "seen += [repr(vars(module)) for module in list(sys.modules.values())]\n"
        "while frame:\n    seen.append(frame.f_code.co_filename + repr(frame.f_globals))\n    frame = frame.f_back\n"
        f"for path in {hosts!r}:\n    assert not any(path in text for text in seen), path",
    )


def copied(folder: Path, *replaced: str) -> Path:
    """The room's three files alone in a folder that all may read; pairs of old and new text, each once there."""
    folder.chmod(0o755)
    names = ("room.py", "kernel.py", "server.py")
    texts = {name: (Path(sandbox.__file__).parent / name).read_text() for name in names}
    for old, new in zip(replaced[::2], replaced[1::2], strict=True):
        assert sum(text.count(old) for text in texts.values()) == 1
        texts = {name: text.replace(old, new) for name, text in texts.items()}
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o644)
    return folder


@pytest.mark.parametrize(
    ("replaced", "said"),
    [
        (("ctypes.c_ulong(2), head", "ctypes.c_ulong(77), head"), "no sandbox for generated code: .*seccomp"),
        (
            ('_AUDIT_ARCH = {"x86_64"', '_AUDIT_ARCH = {"other"'),
            "no sandbox for generated code: .*no system call table",
        ),
        (('"unshare": (272, 97)', '"unshare": (9999, 9999)'), "leaks: .*namespace"),
        (('"socket": (41, 198)', '"socket": (9998, 9998)'), "leaks: .*socket"),
        (('("RLIMIT_NPROC", limits.processes, limits.processes)', '("RLIMIT_NPROC", 64, 64)'), "leaks: .*processes"),
    ],
)
def test_without_what_holds_there_is_no_sandbox(tmp_path: Path, replaced: tuple[str, str], said: str) -> None:
    if replaced[0].startswith("_AUDIT") and os.uname().machine != "x86_64":
        pytest.skip("the replaced entry is that of x86-64")
    code = "import room; print(*room.available())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=copied(tmp_path, *replaced), check=True)
    assert re.match(f"False .*{said}", done.stdout), done.stdout


@pytest.mark.skipif(os.getuid() != 0, reason="changes to an ordinary user")
def test_an_ordinary_user_gets_the_same_isolation() -> None:
    """As nobody, with the system's Python (ours may lie where nobody cannot read)."""
    import shutil
    import tempfile

    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None:
        pytest.skip("no system Python")
    evil = [attempt.format(pid=1) for attempt in OTHERS.values()]
    evil += [
        "import os; os._exit(0)", "while True: pass", "import os\nos.kill(-1, 9)\nassert 0",
        "import os\nfor n in range(1, 65):\n    if n != 32 and n != 33: os.kill(1, n)\nassert 0",
        "import ctypes; assert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
        "import ctypes; assert ctypes.CDLL(None).unshare(0x10020000) == 0",
        "import ctypes; assert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0",
        "import socket; socket.socket()", "open('/etc/passwd')", "open('/usr/lib/x', 'w')",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        code = (
            "import json, sys\nimport room as sandbox\nok, why = sandbox.available()\nprint(ok, why)\n"
            "room = sandbox.Sandbox(sandbox.Limits(seconds=1))\nroom.start()\nprocess = room._process\n"
            "for bad in json.load(sys.stdin):\n"
            "    assert not room.run(bad).passed, bad\n"
            "    again = room.run('x = bytearray(1 << 24)')\n    assert again.passed, (bad, again.reason)\n"
            "    assert room._process is process, bad\n"
            "print('done')\n"
        )
        done = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, cwd=copied(Path(scratch)), user="nobody",
            group="nogroup", extra_groups=[], env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}, check=False,
            input=json.dumps(evil),
        )  # fmt: skip
    if done.stdout.startswith("False no sandbox"):
        pytest.skip(done.stdout.strip())
    assert done.stdout == "True isolated\ndone\n", done.stdout + done.stderr


SYS_ADMIN, SETUID = 21, 7
NOTHING_BINDS = """
import os, signal
forked = 0
try:
    while forked < 40:
        if not os.fork(): signal.pause()
        forked += 1
except OSError: pass
raise SystemExit(forked)
"""


def as_root_without(folder: Path, *capabilities: int) -> list[str]:
    """As uid 0 whose bounding set lacks capabilities: what `available` says, and how often a program could fork."""
    import ctypes

    libc = ctypes.CDLL(None)

    def drop() -> None:
        for capability in capabilities:
            assert libc.prctl(24, capability, 0, 0, 0) == 0  # PR_CAPBSET_DROP; the program is run with what is left

    code = (
        "import os, sys\nimport room as sandbox\nassert os.getuid() == 0\n"
        "ok, why = sandbox.available()\nprint(ok, why)\n"
        "print(ok and sandbox.Sandbox().run(sys.stdin.read()).reason)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, input=NOTHING_BINDS, preexec_fn=drop, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.skipif(os.getuid() != 0, reason="is about root")
def test_processes_are_limited_for_root_without_the_right_to_make_namespaces(tmp_path: Path) -> None:
    said, reason = as_root_without(copied(tmp_path), SYS_ADMIN)
    if said.startswith("False no sandbox for generated code: this machine grants no namespaces ([Errno"):
        pytest.skip(said)  # no user namespaces here
    assert said == "True isolated"
    assert re.fullmatch(r"SystemExit: [1-3]", reason), reason
    said, _ = as_root_without(tmp_path, SYS_ADMIN, SETUID)
    assert re.match("False no sandbox for generated code: .*process limits do not bind root", said), said


@pytest.mark.skipif(os.getuid() != 0, reason="is about root")
def test_a_program_that_is_root_outside_its_namespace_is_called_a_leak(tmp_path: Path) -> None:
    """As it once was: one id mapped onto root's, under which every fork succeeds."""
    folder = copied(tmp_path, "if outer_user == 0:", "if False:")
    said, _ = as_root_without(folder, SYS_ADMIN)
    if said.startswith("False no sandbox"):
        pytest.skip(said)
    assert re.match("False the sandbox leaks: .*more processes than allowed", said), said
