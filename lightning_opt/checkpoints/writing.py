"""One checkpoint onto the disk, so that a kill or a power cut at any instant leaves the old ones or the new one too."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import os
import platform
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning_opt
from lightning_opt.checkpoints import contents
from lightning_opt.checkpoints.manifest import (
    MANIFEST,
    Checkpoint,
    digest,
    folder_name,
    manifest_text,
    read_manifest,
)
from lightning_opt.run_folder.status import process_start

log = logging.getLogger("lightning_opt.checkpoints")

BAD_KEPT = 2
_ASIDE = re.compile(r"\.step-(\d+)\.bad")
_LEFTOVER = re.compile(r"\.(step-\d+)\.(\d+)\.(part|old|gone)")


def write(
    root: Path, tree: dict[str, Any], *, step: int, meta: dict[str, Any], metric: dict[str, Any] | None = None
) -> Checkpoint:
    """Writes one checkpoint: beside, synced, read back from the disk and compared, manifest last, renamed into place.

    Args:
        root: the folder of checkpoints; made if it does not exist.
        tree: tensors on the CPU and plain types.
        step: optimizer steps done; a checkpoint of that step is replaced.
        meta: what to keep about it; plain JSON.
        metric: ``{"name", "value"}``.

    Returns:
        The checkpoint, on disk.

    Raises:
        OSError, RuntimeError: it could not be written, or the disk holds something else than was written. Nothing is
            left behind, older checkpoints are as they were.
    """
    root.mkdir(parents=True, exist_ok=True)
    place = root / folder_name(step)
    beside = _hidden(place, "part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        contents.save(tree, beside)
        files = {path.name: _synced(path) for path in sorted(beside.iterdir())}
        if not contents.same(tree, contents.load(beside, mmap=True)):
            raise OSError(f"{place.name}: the disk holds something else than was written")
        text = manifest_text(
            step=step,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=_versions(),
            metric=metric or {"name": None, "value": None},
            files=files,
            meta=meta,
        )
        (beside / MANIFEST).write_text(text, encoding="utf-8")
        _synced(beside / MANIFEST)
        _sync(beside)
        _put(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return read_manifest(place)


def remove(path: Path) -> None:
    """Deletes a checkpoint: renamed first, so that no part of it is ever taken for a whole; a failure is a warning."""
    gone = _hidden(path, "gone")
    try:
        path.rename(gone)
        shutil.rmtree(gone)
    except OSError as error:
        log.warning("checkpoint %s could not be deleted: %s", path.name, error)


def set_aside(path: Path) -> Path:
    """Takes a damaged checkpoint out of the way, so that it neither counts as one nor stands where one is to be.

    Returns:
        Where it is now: ``.step-000300.bad``, or still in its place where that cannot be.
    """
    aside = path.with_name(f".{path.name}.bad")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        return path.rename(aside)
    except OSError as error:
        log.warning("checkpoint %s could not be set aside: %s", path.name, error)
        return path


def clear_set_aside(root: Path) -> None:
    """Deletes all damaged checkpoints that were set aside but the newest ones: to be called once there is a new one."""
    bad = {path: int(match[1]) for path in root.iterdir() if (match := _ASIDE.fullmatch(path.name))}
    for path in sorted(bad, key=bad.__getitem__)[:-BAD_KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def clear_leftovers(root: Path | str) -> list[str]:
    """Clears away what a killed process left: half-written and half-deleted checkpoints.

    To be called before anything of this process writes there. A checkpoint that was being replaced by another of the
    same step comes back.

    Returns:
        The names of what was there.
    """
    root, cleared = Path(root), []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        match = _LEFTOVER.fullmatch(path.name)
        if not match or _is_at_work(int(match[2]), path):
            continue
        place = root / match[1]
        if match[3] == "old" and not place.exists():
            path.rename(place)
        else:
            shutil.rmtree(path, ignore_errors=True)
        cleared.append(path.name)
    return cleared


def _is_at_work(pid: int, path: Path) -> bool:
    """Whether another process of that number lives that is old enough to have made the folder."""
    started = process_start(pid)
    return pid != os.getpid() and started is not None and started <= path.stat().st_mtime


def _hidden(place: Path, kind: str) -> Path:
    return place.with_name(f".{place.name}.{os.getpid()}.{kind}")


def _put(beside: Path, place: Path) -> None:
    """Renames a finished folder into place; what was there comes back if that fails."""
    old = _hidden(place, "old")
    if place.exists():
        place.rename(old)
    try:
        beside.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise
    _sync(place.parent)
    _sync(place.parent.parent)
    shutil.rmtree(old, ignore_errors=True)


def _synced(path: Path) -> dict[str, Any]:
    """Brings a file onto the disk; its size and its sha256 as the disk gives it back."""
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors writes for the owner alone
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if path.is_file() and hasattr(os, "posix_fadvise"):  # else reading back would only see our own memory
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


@functools.cache
def _versions() -> dict[str, str]:
    versions = {"lightning_opt": lightning_opt.__version__, "python": platform.python_version()}
    for name in ("torch", "lightning"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
