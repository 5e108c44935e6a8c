"""One way to make a folder once: built beside, renamed when complete, reused next time, never seen half done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

from lightning_opt.plan import ConfigError

log = logging.getLogger("lightning_opt.data")

MANIFEST = "MANIFEST.json"
FULL_CHECK_BYTES = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 64, 64 * 2**10


class Damaged(Exception):  # reads as what it says of a folder
    """A finished folder is not as it was written; the message names the file and what is wrong with it."""


def fingerprint(*parts: Any) -> str:
    """sha256 (hex) over plain values, independent of dictionary order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file; above 64 MiB of its size and 64 evenly spaced blocks, so that opening stays quick."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= FULL_CHECK_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for sample in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return "sampled:" + digest.hexdigest()


def seal(folder: Path) -> None:
    """Writes the manifest (name, size and digest of every file) and forces everything to disk."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
            _sync(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps(files, indent=1), encoding="utf-8")
    _sync(manifest)
    _sync(folder)


def verify(folder: Path) -> None:
    """Compares every file of a sealed folder with its manifest.

    Raises:
        Damaged: something is missing, longer, shorter or other than it was written.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = [(name, entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{folder.name}/{MANIFEST} is missing or unreadable") from None
    for name, size, digest in entries:
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{folder.name}/{name} is missing")
        if path.stat().st_size != size:
            raise Damaged(f"{folder.name}/{name} has {path.stat().st_size} bytes, written were {size}")
        if file_digest(path) != digest:
            raise Damaged(f"{folder.name}/{name} is not what was written (sha256 differs)")


def folder_made_once(cache_dir: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``cache_dir/name``, made by ``make`` if it is not there or was damaged.

    Several processes may ask at once: one makes it, the others wait. A process killed in the middle leaves only a
    temporary folder (dot in front) that nobody reads and the next maker removes.

    Args:
        cache_dir: made if needed.
        name: the folder's name; holds the fingerprint of everything its content depends on.
        make: fills the empty folder it is given.

    Raises:
        ConfigError: ``cache_dir`` cannot be written.
    """
    target = cache_dir / name
    if _is_good(target):
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(cache_dir / f".{name}.lock")
        try:
            lock.acquire(timeout=1)
        except filelock.Timeout:
            log.info("another process is making %s: waiting for it", target)
            lock.acquire()
    except OSError as error:
        raise ConfigError("data.cache_dir", str(cache_dir), f"must be a folder we can write to ({error})") from None
    try:
        if not _is_good(target, warn=True):
            _make(target, make)
    finally:
        lock.release()
    return target


def _is_good(target: Path, *, warn: bool = False) -> bool:
    if not target.is_dir():
        return False
    try:
        verify(target)
    except Damaged as damage:
        if warn:
            log.warning("%s: made again", damage)
        return False
    return True


def _make(target: Path, make: Callable[[Path], None]) -> None:
    """Runs under the lock, so every temporary folder of this target is a leftover."""
    for leftover in target.parent.glob(f".{target.name}.making-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    making = Path(tempfile.mkdtemp(prefix=f".{target.name}.making-", dir=target.parent))
    making.chmod(0o777 & ~_umask())  # mkdtemp's own folders are closed to everybody else
    try:
        make(making)
        seal(making)
        if target.exists():
            target.rename(making.with_name(making.name + "-old"))
        making.rename(target)
        _sync(target.parent)
    finally:
        for leftover in target.parent.glob(f".{target.name}.making-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def content_hashes(files: list[Path], memory: Path) -> list[str]:
    """sha256 of each file's content; computed once, then remembered by path, size and modification time.

    Args:
        files: what to hash.
        memory: a JSON file that remembers (in the cache folder); made if needed, ignored if broken.
    """
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
        known = known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        known = {}
    hashes, news = [], False
    for file in files:
        status = file.stat()
        key, stamp = str(file.resolve()), [status.st_size, status.st_mtime_ns]
        entry = known.get(key)
        if not (isinstance(entry, list) and len(entry) == 3 and entry[:2] == stamp):
            with file.open("rb") as stream:
                entry = [*stamp, hashlib.file_digest(stream, "sha256").hexdigest()]
            known[key], news = entry, True
        hashes.append(entry[2])
    if news:
        memory.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{memory.name}.", dir=memory.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(known, stream)
        os.replace(temporary, memory)
    return hashes
