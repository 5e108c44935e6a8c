"""One stretch of one source file, tokenised onto disk; what was interrupted goes on where it was last written down.

Files of a unit, in the folder of its corpus::

    000012.train.bin  000012.val.bin    tokens, as in shards
    000012.train.len  000012.val.len    int64 pairs, one per document: tokens, bytes of text
    000012.json                         how much of all that counts: `Progress`

Every document stands for itself, and what ends a unit is a document too: so the files do not depend on where the work
was cut, nor on how many processes did it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from lightning_opt.data.cached import replace_text
from lightning_opt.data.decontamination import Ngrams
from lightning_opt.data.origins import Origin
from lightning_opt.data.shards import SPLITS, TokenizerFacts
from lightning_opt.data.text_files import Reading, draw, suffix_of
from lightning_opt.data.writing import LENGTHS_BYTES, Output, batches

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHECKPOINT_TOKENS = 2**21


@dataclass(frozen=True)
class Unit:
    """What one unit is: so many tokens of one file from a row on.

    Attributes:
        number: of the unit within its corpus; names its files.
        folder: where they lie.
        origin: of the corpus.
        file: name within the origin.
        size: bytes of the file.
        column: where the text stands, or None.
        first_row: rows before it belong to an earlier unit.
        quota: it ends with the document that brings its tokens of ``split`` to this.
        split: ``train``, or ``val`` for a corpus that is for validation alone.
        val_fraction: share of the documents held out of training.
    """

    number: int
    folder: Path
    origin: Origin
    file: str
    size: int
    column: str | None
    first_row: int
    quota: int
    split: str
    val_fraction: float

    def path(self, split: str, kind: str) -> Path:
        """Its file of tokens (``bin``) or lengths (``len``)."""
        return self.folder / f"{self.number:06d}.{split}.{kind}"

    @property
    def record(self) -> Path:
        """Its file of `Progress`."""
        return self.folder / f"{self.number:06d}.json"


@dataclass
class Progress:
    """How far a unit is.

    Attributes:
        row: rows of the file up to here are done with.
        tokens: by split.
        documents: by split.
        removed: documents left out because they share a run of words with an evaluation set.
        done: whether it is over.
        exhausted: whether the file is, too.
    """

    row: int
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    removed: int = 0
    done: bool = False
    exhausted: bool = False


def progress_of(unit: Unit) -> Progress:
    """What was written down of a unit; a fresh one where nothing was."""
    try:
        return Progress(**json.loads(unit.record.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Progress(unit.first_row)


class Writer:
    """Tokenises units.

    Args:
        tokenizer: what ``tokenizer.for_documents`` gives.
        facts: of it.
        ngrams: documents that touch them are left out; None: all are kept.
        on_tokens: told how many tokens of the unit's own split each batch added.
        checkpoint_tokens: what a kill loses at most.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        facts: TokenizerFacts,
        ngrams: Ngrams | None,
        on_tokens: Callable[[int], None],
        checkpoint_tokens: int = CHECKPOINT_TOKENS,
    ) -> None:
        self._tokenizer, self._facts, self._ngrams = tokenizer, facts, ngrams
        self._on_tokens, self._checkpoint_tokens = on_tokens, checkpoint_tokens

    def fill(self, unit: Unit) -> Progress:
        """Brings a unit to its end, from wherever it is.

        Raises:
            ConfigError: the file cannot be read (further).
        """
        progress = progress_of(unit)
        if progress.done:
            return progress
        if not _is_there(unit, progress, self._facts.dtype):
            progress = Progress(unit.first_row)
        with contextlib.ExitStack() as stack:
            streams = {split: _streams(unit, split, progress, self._facts.dtype, stack) for split in SPLITS}
            outputs = {split: Output(*pair, self._facts) for split, pair in streams.items()}
            files = [file for pair in streams.values() for file in pair]
            raw = stack.enter_context(unit.origin.open(unit.file, unit.size))
            suffix = suffix_of(Path(unit.file))
            assert suffix
            reading = Reading(unit.file, suffix, unit.origin.field, unit.column, skip=progress.row)
            written = sum(progress.tokens.values())
            for batch in batches(enumerate(reading.rows(raw), progress.row + 1)):
                before = progress.tokens[unit.split]
                progress.done = self._add(unit, progress, outputs, [(row, text) for row, text in batch if text])
                self._on_tokens(progress.tokens[unit.split] - before)
                if progress.done:
                    break
                progress.row, _ = batch[-1]
                if sum(progress.tokens.values()) - written >= self._checkpoint_tokens:
                    _write_down(unit, progress, files)
                    written = sum(progress.tokens.values())
            else:
                progress.done = progress.exhausted = True
            _write_down(unit, progress, files)
        return progress

    def _add(self, unit: Unit, progress: Progress, outputs: dict[str, Output], batch: list[tuple[int, str]]) -> bool:
        """Appends a batch of (row, text); whether that ended the unit."""
        clean = [(row, text) for row, text in batch if not (self._ngrams and self._ngrams.touches(text))]
        encodings = self._tokenizer.encode_batch_fast([text for _, text in clean], add_special_tokens=False)
        kept = {row for row, _ in clean}
        for (row, text), encoding in zip(clean, encodings, strict=True):
            split = "val" if unit.split == "val" or (unit.val_fraction and draw(text) < unit.val_fraction) else "train"
            progress.tokens[split] += outputs[split].add(encoding.ids, text)
            progress.documents[split] += 1
            if progress.tokens[unit.split] >= unit.quota:
                progress.row = row
                progress.removed += sum(other not in kept for other, _ in batch if other <= row)
                return True
        progress.removed += len(batch) - len(clean)
        return False


def _is_there(unit: Unit, progress: Progress, dtype: np.dtype) -> bool:
    """Whether the files hold what the record says, which a machine that lost its power may have kept alone."""
    sizes = {
        unit.path(split, kind): size
        for split in SPLITS
        for kind, size in zip(("bin", "len"), _sizes(split, progress, dtype), strict=True)
    }
    return all(size == 0 or (path.is_file() and path.stat().st_size >= size) for path, size in sizes.items())


def _sizes(split: str, progress: Progress, dtype: np.dtype) -> tuple[int, int]:
    """Bytes of tokens and of lengths that count."""
    return progress.tokens[split] * dtype.itemsize, progress.documents[split] * LENGTHS_BYTES


def _streams(
    unit: Unit, split: str, progress: Progress, dtype: np.dtype, stack: contextlib.ExitStack
) -> list[IO[bytes]]:
    """The files of tokens and of lengths, to be appended to, with all that does not count cut off."""
    files = []
    for kind, size in zip(("bin", "len"), _sizes(split, progress, dtype), strict=True):
        files.append(stack.enter_context(unit.path(split, kind).open("ab", buffering=1 << 20)))
        files[-1].truncate(size)
    return files


def _write_down(unit: Unit, progress: Progress, files: list[IO[bytes]]) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    replace_text(unit.record, json.dumps(asdict(progress)))
