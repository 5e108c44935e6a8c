"""Token shards: a corpus tokenised once into flat memory-mapped files.

Layout of one corpus folder (also what ``source: prepared`` expects, one such sub-folder per corpus)::

    train-00000.bin  val-00000.bin   tokens, uint16 where the vocabulary allows it, else uint32; parts of 2**28 tokens,
                                     or of what one file of the source gave (``recipes.prepare_data``)
    train.npy  val.npy               int64 (documents + 1,): where each document starts, and the end
    index.json                       corpus, tokenizer_sha256, eos, dtype, vocab_size; tokens, documents, bytes by
                                     split; of prepared ones also what they were made from
    MANIFEST.json                    size and sha256 of all of the above
    tokenizer.json                   beside the corpus folders: the tokenizer that wrote them

Every document ends with the end-of-text token.
"""

from __future__ import annotations

import bisect
import itertools
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_opt.data.cached import MANIFEST, Damaged

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = 1
SPLITS = ("train", "val")
INDEX = "index.json"
RECORD = "preparation.json"  # beside the corpus folders: what `recipes.prepare_data` was asked for; in WORK meanwhile
PLAN, WORK = "plan.json", ".preparing"  # its plan, which lies in WORK until all is made


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 while every id fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def part_file(folder: Path, split: str, number: int) -> Path:
    """The file of one part of a split's tokens."""
    return folder / f"{split}-{number:05d}.bin"


def size_of(tokenizer: Tokenizer) -> int:
    """Its largest token id plus one."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


@dataclass(frozen=True)
class TokenizerFacts:
    """What an index says of the tokenizer that wrote the tokens."""

    tokenizer_sha256: str
    eos: str
    eos_id: int
    vocab_size: int

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens on disk."""
        return token_dtype(self.vocab_size)


class TokenStream:
    """The tokens of one split as one long sequence over its memory-mapped parts; opened on first use, so it pickles."""

    def __init__(self, parts: list[Path], lengths: list[int], dtype: str) -> None:
        self.parts, self.lengths, self.dtype = parts, lengths, dtype
        self._ends = list(itertools.accumulate(lengths))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @cached_property
    def _maps(self) -> list[np.ndarray]:
        # as plain arrays: slicing numpy's memmap class costs more than copying what it shows
        return [np.memmap(part, dtype=self.dtype, mode="r").view(np.ndarray) for part in self.parts]

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_maps"}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), whatever parts they lie in; fewer at the end of the stream.

        In the shards' own integers and, where one part holds them all, a view of the file.
        """
        stop = min(stop, len(self))
        part = bisect.bisect_right(self._ends, start)
        pieces = []
        while start < stop:
            begin = self._ends[part] - self.lengths[part]
            end = min(stop, self._ends[part])
            pieces.append(self._maps[part][start - begin : end - begin])
            start, part = end, part + 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=self.dtype)


@dataclass(frozen=True)
class Shards:
    """One tokenised corpus, opened.

    ``unigram_entropy``: nats per token of the validation tokens under the unigram distribution of the training tokens
    with one added to every count (cross-entropy); ``val_entropy``: under their own distribution, the least any unigram
    model could reach. Both None without validation tokens; the first is the second where there are no training tokens.
    """

    folder: Path
    name: str
    tokenizer_sha256: str
    eos: str
    eos_id: int
    vocab_size: int
    dtype: str
    train_documents: int
    val_documents: int
    train_bytes: int
    val_bytes: int
    unigram_entropy: float | None
    val_entropy: float | None
    train: TokenStream
    val: TokenStream
    digest: str

    def documents(self, split: str) -> np.ndarray:
        """int64 (documents + 1,): first token of each document of ``train`` or ``val``, and the end."""
        return np.load(self.folder / f"{split}.npy", mmap_mode="r")


def read_index(folder: Path) -> dict:
    """The index of a corpus folder, with the size of every part checked against it (cheap: no file is read).

    Raises:
        Damaged: index or manifest are missing or unreadable, or a part is missing, truncated or too long.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise Damaged(f"{folder.name}/{INDEX} has format {index['format']}, this version reads {FORMAT}")
        itemsize = np.dtype(index["dtype"]).itemsize
        sizes = {
            part_file(folder, split, part): length * itemsize
            for split, entry in index["splits"].items()
            for part, length in enumerate(entry["parts"])
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{folder.name}/{INDEX} is missing or unreadable") from None
    for path, size in sizes.items():
        if not path.is_file():
            raise Damaged(f"{folder.name}/{path.name} is missing")
        if path.stat().st_size != size:
            raise Damaged(f"{folder.name}/{path.name} has {path.stat().st_size} bytes, the index says {size}")
    if not (folder / MANIFEST).is_file():
        raise Damaged(f"{folder.name}/{MANIFEST} is missing or unreadable")
    return index


def open_shards(folder: Path) -> Shards:
    """Opens a corpus folder; nothing is read but the index.

    Raises:
        Damaged: as ``read_index``.
    """
    index = read_index(folder)
    streams = {}
    for split, entry in index["splits"].items():
        parts = [part_file(folder, split, part) for part in range(len(entry["parts"]))]
        streams[split] = TokenStream(parts, entry["parts"], index["dtype"])
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise Damaged(f"{folder.name}/{MANIFEST} is missing or unreadable") from None
    bins = sorted((name, entry["sha256"]) for name, entry in manifest.items() if name.endswith(".bin"))
    train, val = index["splits"]["train"], index["splits"]["val"]
    return Shards(
        folder=folder,
        name=index["corpus"],
        tokenizer_sha256=index["tokenizer_sha256"],
        eos=index["eos"],
        eos_id=index["eos_id"],
        vocab_size=index["vocab_size"],
        dtype=index["dtype"],
        train_documents=train["documents"],
        val_documents=val["documents"],
        train_bytes=train["bytes"],
        val_bytes=val["bytes"],
        unigram_entropy=index["unigram_entropy"],
        val_entropy=index["val_entropy"],
        train=streams["train"],
        val=streams["val"],
        digest=json.dumps(bins),
    )
