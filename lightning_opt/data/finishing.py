"""From finished units to a corpus folder of shards; repeatable at any point, like everything before it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_opt.data import cached
from lightning_opt.data.shards import SPLITS, TokenizerFacts, part_file
from lightning_opt.data.units import Progress, Unit
from lightning_opt.data.writing import Written, complete, read_lengths


@dataclass(frozen=True)
class Piece:
    """What is used of one unit: its first so many documents of each split.

    Attributes:
        unit: which.
        progress: of the whole unit.
        documents: used, by split.
    """

    unit: Unit
    progress: Progress
    documents: dict[str, int]

    @property
    def empty(self) -> int:
        """Rows of the whole unit without text."""
        progress = self.progress
        return progress.row - self.unit.first_row - sum(progress.documents.values()) - progress.removed

    def lengths(self, split: str) -> np.ndarray:
        """int64 (documents, 2): tokens and bytes of text of each."""
        return read_lengths(self.unit.path(split, "len"), self.documents[split])


def pieces(over: Sequence[tuple[Unit, Progress]], split: str, goal: int) -> list[Piece]:
    """The units, in their order, up to the document that brings the tokens of ``split`` to the goal."""
    used = []
    for unit, progress in over:
        piece = Piece(unit, progress, progress.documents)
        if progress.tokens[split] >= goal:
            needed = int(np.searchsorted(np.cumsum(piece.lengths(split)[:, 0]), goal)) + 1
            return [*used, Piece(unit, progress, {**progress.documents, split: needed})]
        used.append(piece)
        goal -= progress.tokens[split]
    return used


def finish(
    target: Path, making: Path, name: str, used: list[Piece], facts: TokenizerFacts, made_from: dict[str, Any]
) -> None:
    """Makes the corpus folder ``target`` of shards; what is there already is left as it is.

    Args:
        target: appears when it is complete.
        making: a folder on the same disk to work in.
        name: the corpus.
        used: of its units.
        facts: of the tokenizer.
        made_from: recorded in the index.
    """
    if target.is_dir():
        return
    making.mkdir(parents=True, exist_ok=True)
    complete(making, name, facts, {split: _move(making, split, used, facts) for split in SPLITS}, made_from=made_from)
    cached.seal(making)
    making.rename(target)


def _move(making: Path, split: str, used: list[Piece], facts: TokenizerFacts) -> Written:
    """Gives the units' tokens their names as parts, cut to what is used."""
    parts: list[int] = []
    used = [piece for piece in used if piece.documents[split]]
    for piece in used:
        source = piece.unit.path(split, "bin")
        tokens = int(piece.lengths(split)[:, 0].sum())
        if source.exists():
            os.truncate(source, tokens * facts.dtype.itemsize)
            source.replace(part_file(making, split, len(parts)))
        parts.append(tokens)
    documents = sum(piece.documents[split] for piece in used)
    return Written(parts, documents, (piece.lengths(split) for piece in used))
