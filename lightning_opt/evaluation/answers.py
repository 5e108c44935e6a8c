"""A model's answers on disk: what was asked before, of the same model, is not asked again.

One SQLite file for each model; a scoring that was killed goes on where it was, and several scorings of one model may
share the file: it is locked only while a batch of answers is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

UNUSED_DAYS = 90
"""A model's answers are dropped when nobody has asked for them for so long."""


class Answers:
    """Answers by question.

    Args:
        file: made when it is missing; None keeps the answers in memory.
    """

    def __init__(self, file: Path | None = None) -> None:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        self._store = sqlite3.connect(file or ":memory:", timeout=60)
        self._fresh: dict[bytes, str] = {}
        with self._store:
            self._store.execute("CREATE TABLE IF NOT EXISTS answers (question BLOB PRIMARY KEY, answer TEXT)")

    def find(self, question: Sequence[Any]) -> Any:
        """The answer to a question, or None."""
        key = _key(question)
        if key in self._fresh:
            return json.loads(self._fresh[key])
        row = self._store.execute("SELECT answer FROM answers WHERE question = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def keep(self, question: Sequence[Any], answer: Any) -> None:
        """Remembers an answer: at once for this process, from `save` on for others."""
        self._fresh[_key(question)] = json.dumps(answer)

    def save(self) -> None:
        """Writes what is not written yet."""
        with self._store:
            self._store.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", self._fresh.items())
        self._fresh.clear()

    def close(self) -> None:
        """Writes what is not written yet, and lets the file go."""
        self.save()
        self._store.close()


def answers_file(folder: Path, identity: str) -> Path:
    """Where the answers of a model lie that has this `identity`; those that nobody wanted for so long go."""
    file, now = folder / f"{identity[:32]}.sqlite", time.time()
    with contextlib.suppress(OSError):  # another scoring may be clearing up too
        if file.exists():
            os.utime(file)
        for other in folder.glob(f"{'?' * 32}.sqlite"):
            if now - other.stat().st_mtime > 86_400 * UNUSED_DAYS:
                other.unlink()
    return file


def _key(question: Sequence[Any]) -> bytes:
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).digest()


def identity(model: torch.nn.Module, tokenizer: Any, context: int) -> str:
    """A checksum of all that a model's answers depend on: weights, configuration, tokenizer, context, where it runs."""
    digest = hashlib.sha256()
    config = {**model.config.to_dict(), "_name_or_path": None}
    settings = [type(model).__name__, config, context, torch.__version__, transformers.__version__]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    text = getattr(getattr(tokenizer, "backend_tokenizer", None), "to_str", lambda: repr(tokenizer))()
    digest.update(f"{text}{tokenizer.special_tokens_map}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device.type}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
