"""Fetches the real sets from the hub once and freezes them: JSON lines, and a list of revisions and checksums.

A frozen folder is an `evaluation.data_dir`; it is looked at before every use, so a file that changed is never scored.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_opt.evaluation.task_table import SOURCES, TaskSource
from lightning_opt.plan import ConfigError
from lightning_opt.run_folder import read_json, write_json

MANIFEST = "FROZEN.json"
_WAITS = (2.0, 8.0, 30.0)


def freeze(folder: Path, tasks: Sequence[str], say: Callable[[str], None] = print) -> dict[str, str]:
    """Fetches the sets of these tasks into `folder`; a set that is there already, whole, is not fetched again.

    Args:
        folder: made where it is missing; becomes an `evaluation.data_dir`.
        tasks: names of `task_table.SOURCES`.
        say: told about every file.

    Returns:
        File names that could not be had, with the reason.

    Raises:
        ConfigError: the list of what the folder holds is cut.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_frozen(folder, ())
    failed: dict[str, str] = {}
    for task in tasks:
        source = SOURCES[task]
        for split, name in source.files.items():
            plain = name.removesuffix(".gz")
            if _whole(folder, plain):
                say(f"{plain}: already frozen")
                continue
            try:
                say(f"{plain}: {_fetch(folder, plain, source, split)} documents of {source.hub}")
            except Exception as error:
                failed[plain] = f"{source.hub}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                say(f"{plain}: failed: {failed[plain]}")
    return failed


def check_frozen(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What is recorded of these files; {} in a folder that was not frozen by us.

    Raises:
        ConfigError: a file is not what it was when it was frozen, or the list of them is cut.
    """
    try:
        recorded = read_json(folder / MANIFEST)
    except ValueError:
        how = "must be whole, and is cut or no JSON: remove it and run recipes.evaluate --freeze again"
        raise ConfigError("evaluation.data_dir", str(folder / MANIFEST), how) from None
    for name in names:
        if name in recorded and checksum(folder / name) != recorded[name]["sha256"]:
            expected = f"must be unchanged since it was frozen: remove {name} and run recipes.evaluate --freeze again"
            raise ConfigError("evaluation.data_dir", str(folder / name), expected)
    return {name: recorded[name] for name in names if name in recorded}


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _whole(folder: Path, name: str) -> bool:
    recorded = read_json(folder / MANIFEST).get(name)
    return bool(recorded) and (folder / name).is_file() and checksum(folder / name) == recorded["sha256"]


def _fetch(folder: Path, name: str, source: TaskSource, split: str) -> int:
    """Writes one file and its line of the list; the number of its documents."""
    revision, rows = _patiently(lambda: _load(source, split))
    part = folder / f".{name}.{os.getpid()}.part"
    try:
        with part.open("w", encoding="utf-8") as file:
            count = sum(bool(file.write(json.dumps(row, ensure_ascii=False) + "\n")) for row in rows)
        entry = {"hub": source.hub, "config": source.config, "split": split, "revision": revision}
        entry |= {"documents": count, "sha256": checksum(part)}
        os.replace(part, folder / name)
    finally:
        part.unlink(missing_ok=True)
    write_json(folder / MANIFEST, dict(sorted({**read_json(folder / MANIFEST), name: entry}.items())))
    return count


def _load(source: TaskSource, split: str) -> tuple[str | None, Any]:
    import datasets
    from huggingface_hub import HfApi

    revision = HfApi().dataset_info(source.hub, revision="main").sha
    return revision, datasets.load_dataset(source.hub, source.config, split=split, revision=revision)


def _patiently(load: Callable[[], Any]) -> Any:
    """Tries again where the network, not the request, is at fault."""
    for wait in _WAITS:
        try:
            return load()
        except Exception as error:
            of_network = isinstance(error, ConnectionError | TimeoutError) or "TransportError" in _kin(error)
            if not of_network:
                raise
            time.sleep(wait)
    return load()


def _kin(error: Exception) -> set[str]:
    """Names of its classes: the hub's client comes with httpx or with httpx2."""
    return {kind.__name__ for kind in type(error).__mro__}
