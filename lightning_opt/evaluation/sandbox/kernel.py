"""System calls that the sandbox needs and Python 3.11 lacks, by ctypes. Standard library only; runs inside the
sandbox process.

Sources: unshare(2), mount(2), pivot_root(2), mount_setattr(2), prctl(2), capset(2), seccomp(2), namespaces(7) of the
Linux manual.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

NEW_NS, NEW_CGROUP, NEW_UTS, NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

_libc = ctypes.CDLL(None, use_errno=True)

# What no exercise needs and what could widen a hole or hold memory outside RLIMIT_AS: (x86-64, arm64) numbers.
_REFUSED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "unshare": (272, 97),
    "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "bpf": (321, 280), "perf_event_open": (298, 241), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "msgget": (68, 186), "semget": (64, 190), "kexec_load": (246, 104), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "mount_setattr": (442, 442), "syslog": (103, 116),
    "pidfd_getfd": (438, 438), "socket": (41, 198), "personality": (135, 92),
    # What touches other processes of the same user, process 1 among them where nobody can change the user:
    "setpriority": (141, 140), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122), "sched_setattr": (314, 274), "ioprio_set": (251, 30),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "process_madvise": (440, 440),
}  # fmt: skip
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ALL_NEW = NEW_NS | NEW_CGROUP | NEW_UTS | NEW_IPC | NEW_USER | NEW_PID | NEW_NET


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def unshare(flags: int) -> None:
    """Moves this process into new namespaces; OSError where the kernel refuses."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2); OSError where the kernel refuses."""
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    _check(_libc.mount(*encoded, ctypes.c_ulong(flags), data.encode()), f"mount {target}")


def make_read_only(path: str) -> None:
    """Makes the mount at `path` and all below it read-only, without set-uid programs and devices."""
    attributes = struct.pack("=4Q", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    at_fdcwd, at_recursive, mount_setattr = -100, 0x8000, 442
    arguments = (ctypes.c_long(mount_setattr), ctypes.c_int(at_fdcwd), path.encode(), ctypes.c_uint(at_recursive))
    if _libc.syscall(*arguments, attributes, ctypes.c_size_t(len(attributes))) == 0:
        return
    # Before Linux 5.12: only the top mount; flags locked by a user namespace must be kept (mount_namespaces(7)).
    kept = os.statvfs(path).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("none", path, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | kept)


def enter_root(path: str) -> None:
    """Makes the mount at `path` the root and lets go of the old one: nothing leads back (pivot_root(2), NOTES)."""
    os.chdir(path)
    _check(_libc.pivot_root(b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/")


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def die_with_parent() -> None:
    """SIGKILL for this process when the thread that started it ends."""
    prctl(_PR_SET_PDEATHSIG, 9)


def hide_memory() -> None:
    """No core file, no ptrace and no /proc/PID/mem by processes of the same user."""
    prctl(_PR_SET_DUMPABLE, 0)


def no_new_privileges() -> None:
    """No later exec gains rights by set-uid bits or file capabilities."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """Empties the effective, permitted and inheritable sets (capset(2), version 3)."""
    header, data = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _check(_libc.capset(header, data), "capset")


def refuse_system_calls() -> None:
    """Installs a seccomp filter: the calls of `_REFUSED`, limits of other processes, new namespaces and foreign ABIs
    fail with EPERM.

    Raises:
        OSError: the kernel has no seccomp filters, or the processor is neither x86-64 nor arm64.
    """
    machine = platform.machine()
    if machine not in _AUDIT_ARCH:
        raise OSError(f"no system call table for {machine}")
    column = 0 if machine == "x86_64" else 1
    load, equal, above, masked, give = 0x20, 0x15, 0x35, 0x45, 0x06
    refuse, allow, kill = 0x00050000 | 1, 0x7FFF0000, 0x80000000
    no_such_call = 0x00050000 | 38
    program = [(load, 0, 0, 4), (equal, 1, 0, _AUDIT_ARCH[machine]), (give, 0, 0, kill), (load, 0, 0, 0)]
    program += [(above, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # the x32 ABI has its own numbers
    for numbers in _REFUSED.values():
        program += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse)]
    pid_of_prlimit = (load, 0, 0, 16)  # 0 is the caller itself, and what getrlimit and setrlimit of libc ask for
    program += [(equal, 0, 4, _PRLIMIT[column]), pid_of_prlimit, (equal, 0, 1, 0), (give, 0, 0, allow)]
    program.append((give, 0, 0, refuse))
    # clone3 hides its flags behind a pointer: as if the kernel had none, libc falls back to clone.
    program += [(equal, 0, 1, _CLONE3[column]), (give, 0, 0, no_such_call)]
    program += [(equal, 0, 3, _CLONE[column]), (load, 0, 0, 16), (masked, 0, 1, _ALL_NEW), (give, 0, 0, refuse)]
    program.append((give, 0, 0, allow))
    filters = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    head = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(filters)))
    _check(_libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), head, 0, 0), "seccomp")
