"""Training documents that share a run of 13 words with an evaluation set, found so that they can be left out.

The rule is that of GPT-3 (Brown et al. 2020, appendix C: 13-grams of words, without regard to case, punctuation and
white space), which Llama's and lm-eval's reports follow too, with one difference: GPT-3 cut 200 characters around each
match and kept the rest; here the whole document goes. A text of fewer than 13 words can match nothing.

An item is compared as it may be shown: every string by itself, all of them in a row, and one field behind another
wherever it stands in the file: a question and its choices or any one of them, a context and any of its endings, though
a column of labels may lie between.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lightning_opt.data.cached import file_digest
from lightning_opt.data.text_files import suffix_of
from lightning_opt.plan import ConfigError
from lightning_opt.run_folder import read_json_lines

WORDS = 13
_WORD = re.compile(r"\w+")
_FIELD = "data.decontaminate"
_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_CHOICES = 32


def words_of(text: str) -> list[str]:
    """Runs of letters, digits and underscores, in lower case."""
    return _WORD.findall(text.lower())


def evaluation_files(path: str | Path) -> list[Path]:
    """The files of the evaluation sets in a folder (or the one file), sorted.

    Raises:
        ConfigError: there is none.
    """
    path = Path(path)
    found = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    found = [file for file in found if file.is_file() and suffix_of(file) in _SUFFIXES]
    if not found:
        raise ConfigError(_FIELD, str(path), f"must be a folder (or file) of evaluation sets: {', '.join(_SUFFIXES)}")
    return found


def identity(path: str | Path) -> list[list[str]]:
    """What the evaluation sets are, wherever they lie: [name below the folder, sha256 of its content] of each, sorted.

    Raises:
        ConfigError: there is none.
    """
    files, top = evaluation_files(path), Path(path)
    names = [file.relative_to(top).as_posix() if top.is_dir() else file.name for file in files]
    return sorted([name, file_digest(file)] for name, file in zip(names, files, strict=True))


class Ngrams:
    """The 13-grams of some evaluation sets, as sorted 64-bit hashes.

    Only words that occur in the sets get a number, so a document costs a dictionary look-up per word and a few
    operations on whole arrays; two different runs of words fall together about once in 2**64.

    Args:
        vocabulary: the words; word i has number i + 1, 0 stands for all others.
        hashes: uint64, sorted.
    """

    def __init__(self, vocabulary: Sequence[str], hashes: np.ndarray) -> None:
        self.vocabulary, self.hashes = list(vocabulary), hashes

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.vocabulary, 1)}

    @cached_property
    def _mixed(self) -> np.ndarray:
        """A random 64-bit value for each word, the same everywhere."""
        return np.random.default_rng(13).integers(0, 2**64, len(self.vocabulary) + 1, dtype=np.uint64)

    @classmethod
    def of(cls, files: Sequence[Path]) -> Ngrams:
        """Reads evaluation sets.

        Raises:
            ConfigError: a file cannot be read.
        """
        numbers: dict[str, int] = {}
        runs = []
        for file in files:
            texts = (words for item in _items(file) for words in shown(item) if len(words) >= WORDS)
            runs.extend([numbers.setdefault(word, len(numbers) + 1) for word in words] for words in texts)
        made = cls(list(numbers), np.zeros(0, np.uint64))
        found = [made._hashed(np.array(run)) for run in runs]
        made.hashes = np.unique(np.concatenate(found)) if found else made.hashes
        return made

    def save(self, path: Path) -> None:
        """Writes them into one .npz file."""
        with path.open("wb") as file:
            np.savez(file, hashes=self.hashes, words=np.frombuffer("\n".join(self.vocabulary).encode(), np.uint8))

    @classmethod
    def load(cls, path: Path) -> Ngrams:
        """Reads what `save` wrote."""
        with np.load(path) as file:
            words = file["words"].tobytes().decode()
            return cls(words.split("\n") if words else [], file["hashes"])

    def touches(self, text: str) -> bool:
        """Whether the text shares a run of 13 words with the sets."""
        number = self._numbers.get
        run = np.array([number(word, 0) for word in words_of(text)], dtype=np.int64)
        if len(run) < WORDS or not len(self.hashes):
            return False
        hashes = self._hashed(run)[_all_known(run)]
        places = np.searchsorted(self.hashes, hashes)
        places[places == len(self.hashes)] = 0
        return bool((self.hashes[places] == hashes).any())

    def _hashed(self, run: np.ndarray) -> np.ndarray:
        """uint64 (words - 12,): the hash of every 13 words in a row, as a polynomial of the words' random values."""
        values, count = self._mixed[run], len(run) - WORDS + 1
        total = np.zeros(count, dtype=np.uint64)
        for place in range(WORDS):
            total = total * np.uint64(0x9E3779B97F4A7C15) + values[place : place + count]
        return total ^ (total >> np.uint64(29))


def _all_known(run: np.ndarray) -> np.ndarray:
    """bool (words - 12,): whether none of 13 words in a row is foreign to the sets."""
    foreign = np.concatenate([[0], np.cumsum(run == 0)])
    return foreign[WORDS:] == foreign[:-WORDS]


def shown(item: Any) -> Iterator[list[str]]:
    """The words of an item as it may be shown: each string, all in a row, and of two fields the words around the seam.

    Args:
        item: a row of an evaluation set: strings in objects and lists.
    """
    values = item.values() if isinstance(item, dict) else item if isinstance(item, list) else [item]
    fields = [texts for texts in ([words_of(text) for text in _strings(value)] for value in values) if texts]
    yield from (words for texts in fields for words in texts)
    yield [word for texts in fields for words in texts for word in words]
    ends, starts = [], []
    for texts in fields:
        whole = [word for words in texts for word in words]
        parts = [whole, *texts] if 1 < len(texts) <= _CHOICES else [whole]
        ends.append({tuple(words[1 - WORDS :]) for words in parts})
        starts.append({tuple(words[: WORDS - 1]) for words in parts})
    for one, other in itertools.permutations(range(len(fields)), 2):
        yield from ([*end, *start] for end in ends[one] for start in starts[other])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _items(file: Path) -> Iterator[Any]:
    try:
        if suffix_of(file) == ".parquet":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=512):
                yield from batch.to_pylist()
            return
        yield from read_json_lines(file)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(_FIELD, str(file), f"must be readable, one JSON object per line ({error})") from None
