"""Documents onto disk as shards: the one place that writes tokens, lengths and the index of a corpus.

`write_shards` writes a corpus in one go. `units` write the same two streams piece by piece, and `finishing` makes one
corpus of the pieces.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from lightning_opt.data.shards import FORMAT, INDEX, SPLITS, TokenizerFacts, part_file, size_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PART_TOKENS = 2**28
BATCH_CHARACTERS = 1_000_000
LENGTHS_BYTES = 16
"""Of one document in a file of lengths: int64 pairs, tokens and bytes of text."""
_CHUNK_TOKENS = 2**18

Key = TypeVar("Key")


class _Sink(Protocol):
    def write(self, content: bytes, /) -> object: ...


def write_shards(
    folder: Path,
    name: str,
    documents: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    *,
    eos: str,
    tokenizer_sha256: str,
    part_tokens: int = PART_TOKENS,
) -> None:
    """Tokenises documents into an empty folder (see `shards`; the manifest is left to ``cached.seal``).

    Args:
        folder: exists and is empty.
        name: the corpus.
        documents: pairs (``train`` or ``val``, text), consumed once, in bounded memory.
        tokenizer: what ``tokenizer.for_documents`` gives.
        eos: the token that ends every document.
        tokenizer_sha256: recorded, so that shards of another tokenizer are noticed.
        part_tokens: tokens per .bin file.
    """
    facts = TokenizerFacts(tokenizer_sha256, eos, tokenizer.token_to_id(eos), size_of(tokenizer))
    lengths = {split: folder / f"{split}.len" for split in SPLITS}
    with contextlib.ExitStack() as stack:
        parts = {split: stack.enter_context(_Parts(folder, split, part_tokens, facts.dtype)) for split in SPLITS}
        files = {split: stack.enter_context(path.open("wb")) for split, path in lengths.items()}
        outputs = {split: Output(parts[split], files[split], facts) for split in SPLITS}
        for batch in batches(documents):
            encodings = tokenizer.encode_batch_fast([text for _, text in batch], add_special_tokens=False)
            for (split, text), encoding in zip(batch, encodings, strict=True):
                outputs[split].add(encoding.ids, text)
    written = {}
    for split, path in lengths.items():
        found = read_lengths(path)
        written[split] = Written(parts[split].tokens, len(found), [found])
        path.unlink()
    complete(folder, name, facts, written)


def batches(texts: Iterable[tuple[Key, str]]) -> Iterator[list[tuple[Key, str]]]:
    """The texts, each with what stands beside it, about a million characters at a time."""
    batch: list[tuple[Key, str]] = []
    size = 0
    for key, text in texts:
        batch.append((key, text))
        size += len(text) + 1  # empty ones fill the memory too
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Output:
    """The two growing streams of one split.

    Args:
        tokens: takes the tokens.
        lengths: takes the lengths of the documents.
        facts: of the tokenizer.
    """

    def __init__(self, tokens: _Sink, lengths: _Sink, facts: TokenizerFacts) -> None:
        self._tokens, self._lengths, self._facts = tokens, lengths, facts

    def add(self, ids: list[int], text: str) -> int:
        """Appends a document, ended by the end-of-text token; how many tokens that were."""
        self._tokens.write(np.array([*ids, self._facts.eos_id], dtype=self._facts.dtype).tobytes())
        self._lengths.write(np.array([len(ids) + 1, len(text.encode("utf-8"))], dtype=np.int64).tobytes())
        return len(ids) + 1


class _Parts:
    """Tokens spread over files of ``limit`` each; a file appears with its first token."""

    def __init__(self, folder: Path, split: str, limit: int, dtype: np.dtype) -> None:
        self._folder, self._split, self._limit, self._width = folder, split, limit, dtype.itemsize
        self._file: IO[bytes] | None = None
        self.tokens: list[int] = []

    def __enter__(self) -> _Parts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()

    def write(self, content: bytes) -> None:
        while content:
            if self._file is None or self.tokens[-1] >= self._limit:
                self._next()
            piece = content[: (self._limit - self.tokens[-1]) * self._width]
            self._file.write(piece)
            self.tokens[-1] += len(piece) // self._width
            content = content[len(piece) :]

    def _next(self) -> None:
        if self._file:
            self._file.close()
        self._file = part_file(self._folder, self._split, len(self.tokens)).open("wb", buffering=1 << 20)
        self.tokens.append(0)


def read_lengths(path: Path, documents: int = -1) -> np.ndarray:
    """int64 (documents, 2): tokens and bytes of text of each; of the first so many, or of all."""
    return np.fromfile(path, dtype=np.int64, count=2 * documents if documents >= 0 else -1).reshape(-1, 2)


@dataclass(frozen=True)
class Written:
    """One split of a corpus whose tokens lie in its folder already.

    Attributes:
        parts: tokens of each part.
        documents: how many.
        lengths: of them, one array behind another (see `read_lengths`).
    """

    parts: list[int]
    documents: int
    lengths: Iterable[np.ndarray]


def complete(folder: Path, name: str, facts: TokenizerFacts, written: dict[str, Written], **more: object) -> None:
    """Writes what else belongs into a corpus folder: where each document starts, and the index.

    Args:
        folder: holds the parts.
        name: the corpus.
        facts: of the tokenizer that wrote the tokens.
        written: of ``train`` and ``val``.
        more: what else the index records.
    """
    splits, counts = {}, {}
    for split, content in written.items():
        splits[split] = {**_write_starts(folder / f"{split}.npy", content), "parts": content.parts}
        counts[split] = _counts(folder, split, len(content.parts), facts)
    entropy, own = unigram_entropies(counts["train"], counts["val"])
    index = {
        "format": FORMAT,
        "corpus": name,
        **asdict(facts),
        "dtype": facts.dtype.name,
        "splits": splits,
        "unigram_entropy": entropy,
        "val_entropy": own,
        **more,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _write_starts(path: Path, content: Written) -> dict[str, int]:
    """Writes the first token of each document, and the end; tokens, documents and bytes of text in all."""
    tokens = text_bytes = 0
    header = {"descr": "<i8", "fortran_order": False, "shape": (content.documents + 1,)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        np.zeros(1, dtype=np.int64).tofile(file)
        for some in content.lengths:
            (tokens + np.cumsum(some[:, 0])).tofile(file)
            tokens += int(some[:, 0].sum())
            text_bytes += int(some[:, 1].sum())
    return {"tokens": tokens, "documents": content.documents, "bytes": text_bytes}


def _counts(folder: Path, split: str, parts: int, facts: TokenizerFacts) -> np.ndarray:
    """(vocab,) how often each token occurs."""
    counts = np.zeros(facts.vocab_size, dtype=np.int64)
    for part in range(parts):
        for chunk in _chunks(part_file(folder, split, part), facts.dtype):
            counts += np.bincount(chunk, minlength=facts.vocab_size)
    return counts


def _chunks(path: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while len(chunk := np.fromfile(file, dtype=dtype, count=_CHUNK_TOKENS)):
            yield chunk


def unigram_entropies(train_counts: np.ndarray, val_counts: np.ndarray) -> tuple[float | None, float | None]:
    """(cross-entropy of val under train with add-one smoothing, entropy of val's own distribution), nats per token.

    Args:
        train_counts: (vocab,) how often each token occurs in training.
        val_counts: (vocab,) the same in validation.
    """
    total = val_counts.sum()
    if total == 0:
        return None, None
    share = val_counts / total
    seen = share > 0
    own = float(-(share[seen] * np.log(share[seen])).sum())
    if train_counts.sum() == 0:
        return own, own
    smoothed = (train_counts + 1.0) / (train_counts.sum() + len(train_counts))
    return float(-(share[seen] * np.log(smoothed[seen])).sum()), own
