"""What makes a folder a checkpoint: a manifest, and files that still are what it says (no torch)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "MANIFEST.json"
FORMAT = 1
_NAME = re.compile(r"step-(\d+)")


class Damaged(ValueError):
    """A checkpoint that cannot be used; ``str()`` is one line with its path and the reason.

    Args:
        path: the checkpoint's folder.
        reason: which file, and what is wrong with it.
        unreadable: nothing says that it is damaged: it could not be read, or is of another version's format.
    """

    def __init__(self, path: Path, reason: str, unreadable: bool = False) -> None:
        self.path, self.reason, self.unreadable = Path(path), " ".join(reason.split()), unreadable
        super().__init__(self.path, self.reason, unreadable)

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk.

    Attributes:
        path: its folder, ``step-000300``.
        step: optimizer steps done when it was saved.
        manifest: ``MANIFEST.json`` as it was read.
    """

    path: Path
    step: int
    manifest: dict[str, Any]

    @property
    def meta(self) -> dict[str, Any]:
        """What the caller of the save said about it."""
        return self.manifest["meta"]

    @property
    def bytes(self) -> int:
        """Size of its files without the manifest."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    def metric(self, name: str) -> float | None:
        """The value of the metric that it was saved with; None where that is unknown or another metric."""
        saved = self.manifest["metric"]
        return saved["value"] if saved["name"] == name else None


def folder_name(step: int) -> str:
    """The folder of one step's checkpoint."""
    return f"step-{step:06d}"


def find(root: Path | str) -> list[Checkpoint]:
    """The checkpoints below a folder whose manifest is whole, highest step first; no other file is looked into.

    Args:
        root: a run's ``checkpoints/``; it need not exist.
    """
    found = []
    for path in _folders(Path(root)):
        with contextlib.suppress(Damaged):
            found.append(read_manifest(path))
    return found


def verify(path: Path | str) -> Checkpoint:
    """Compares the size and the sha256 of every file with the manifest.

    Args:
        path: a checkpoint's folder.

    Raises:
        Damaged: one is missing, cannot be read, or is not what was written.
    """
    path = Path(path)
    checkpoint = read_manifest(path)
    for name, entry in checkpoint.manifest["files"].items():
        try:
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                raise Damaged(path, f"{name} is {size} bytes long, its manifest says {entry['bytes']}")
            if digest(path / name) != entry["sha256"]:
                raise Damaged(path, f"{name} is not what was written (its sha256 differs)")
        except OSError as error:
            raise _not_read(path, name, error) from error
    return checkpoint


def newest_good(root: Path | str, on_bad: Callable[[Damaged], None]) -> Checkpoint | None:
    """The checkpoint of the highest step whose every byte is as written; None if there is none.

    Args:
        root: a run's ``checkpoints/``; it need not exist.
        on_bad: told of each worse one that is newer; those stay where they are.
    """
    for path in _folders(Path(root)):
        try:
            return verify(path)
        except Damaged as error:
            on_bad(error)
    return None


def read_manifest(path: Path) -> Checkpoint:
    """Reads a checkpoint's manifest, which carries its own sha256.

    Raises:
        Damaged: missing, unreadable, changed, or of a format that this version does not know.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise Damaged(path, f"{MANIFEST} has format {manifest['format']}; this version reads {FORMAT}", True)
        if manifest.pop("sha256") != _own_digest(manifest):
            raise Damaged(path, f"{MANIFEST} is not what was written (its sha256 differs)")
        return Checkpoint(path, manifest["step"], manifest)
    except Damaged:
        raise
    except FileNotFoundError:
        raise Damaged(path, f"{MANIFEST} is missing: the checkpoint is not complete") from None
    except OSError as error:
        raise _not_read(path, MANIFEST, error) from error
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged(path, f"{MANIFEST} is no manifest ({type(error).__name__})") from error


def manifest_text(
    *, step: int, created: str, versions: dict[str, str], metric: dict[str, Any], files: dict[str, Any], meta: Any
) -> str:
    """The text of ``MANIFEST.json``; its own sha256 is over the canonical JSON of all the rest."""
    manifest = plain_json(
        {
            "format": FORMAT,
            "step": step,
            "created": created,
            "versions": versions,
            "metric": metric,
            "files": files,
            "meta": meta,
        }
    )
    return json.dumps(manifest | {"sha256": _own_digest(manifest)}, indent=2) + "\n"


def plain_json(value: Any) -> Any:
    """A value as it comes back from strict JSON: keys are strings, NaN and infinities None.

    Raises:
        TypeError: it holds something that JSON has no word for.
    """
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def digest(path: Path) -> str:
    """The sha256 of a file in hex digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _not_read(path: Path, name: str, error: OSError) -> Damaged:
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    return Damaged(path, f"{name} cannot be read ({error.strerror or error})", unreadable=not missing)


def _own_digest(manifest: dict[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _folders(root: Path) -> list[Path]:
    """What is called ``step-<digits>`` below a folder, highest first."""
    try:
        names = list(root.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = {path: int(match[1]) for path in names if (match := _NAME.fullmatch(path.name))}
    return sorted(steps, key=steps.__getitem__, reverse=True)
