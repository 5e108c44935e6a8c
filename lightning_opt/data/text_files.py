"""Folders of text: which corpora they hold, and their documents one after another in bounded memory."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from lightning_opt.plan import ConfigError, check_value

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".parquet")
TEXT_COLUMNS = ("text", "content")
STUDY_WEIGHTS = {"web": 0.9257, "code": 0.0609, "math": 0.0134}
PIECE_CHARACTERS = 16_384
_NUMBERED_PIECE = re.compile(r"[-_.]\d{4,}(-of-\d{4,})?$")
_VALIDATION = re.compile(r"(^|[_.-])(val|valid|validation)$")
_TRAINING = re.compile(r"(^|[_.-])train$")


@dataclass
class CorpusFiles:
    """The files of one corpus; without ``val`` files a share of the documents is held out."""

    name: str
    train: list[Path] = field(default_factory=list)
    val: list[Path] = field(default_factory=list)


def suffix_of(path: Path) -> str | None:
    """The known ending of a file's name (``.jsonl.gz`` counts as one), or None for a file that is not ours."""
    name = path.name.lower()
    if name.startswith("."):
        return None
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _split_name(stem: str) -> tuple[str, str]:
    """``web_val`` -> ("web", "val"), ``web_train-00000-of-00002`` -> ("web", "train"), ``web`` -> ("web", "train")."""
    stem = _NUMBERED_PIECE.sub("", stem)
    if _VALIDATION.search(stem):
        return _VALIDATION.sub("", stem), "val"
    return _TRAINING.sub("", stem), "train"


def discover(folder: str | Path, *, field_name: str = "data.path") -> dict[str, CorpusFiles]:
    """Finds the corpora of a folder: one per file, or one per sub-folder (with all text files below it).

    ``X_train.*`` and ``X_val.*`` (files or sub-folders; ``validation`` and ``valid`` are understood too) are one corpus
    ``X`` with its validation set. Numbered pieces (``X-00000-of-00008.parquet``) belong together.

    Args:
        folder: where to look.
        field_name: the config field an error names.

    Returns:
        Corpora by name, names and files sorted, so the order does not depend on the file system.

    Raises:
        ConfigError: the folder is missing, holds no text file, or a validation set has no training files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "a file" if folder.is_file() else "nothing there"
        raise ConfigError(
            field_name, str(folder), f"must be an existing folder of {', '.join(SUFFIXES)} files ({what})"
        )
    found: dict[str, CorpusFiles] = {}

    def add(name: str, split: str, path: Path) -> None:
        corpus = found.setdefault(name, CorpusFiles(name))
        (corpus.val if split == "val" else corpus.train).append(path)

    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            name, folder_split = _split_name(entry.name)
            for path in sorted(entry.rglob("*")):
                if path.is_file() and (suffix := suffix_of(path)):
                    inner = [_split_name(part)[1] for part in path.relative_to(entry).parent.parts]
                    inner.append(_split_name(path.name[: -len(suffix)])[1])
                    add(name, "val" if "val" in [folder_split, *inner] else "train", path)
        elif entry.is_file() and (suffix := suffix_of(entry)):
            name, split = _split_name(entry.name[: -len(suffix)])
            add(name or entry.name[: -len(suffix)], split, entry)
    if not found:
        raise ConfigError(field_name, str(folder), f"must be a folder with at least one {', '.join(SUFFIXES)} file")
    for corpus in found.values():
        if not corpus.train:
            raise ConfigError(field_name, str(folder), f"must have training files beside {corpus.val[0].name}")
    return dict(sorted(found.items()))


def check_weights(weights: object, names: list[str], *, field_name: str = "data.weights") -> dict[str, float]:
    """Turns ``data.weights`` into one share per corpus that adds up to 1.

    Args:
        weights: None (equal shares), the word ``study`` (0.9257/0.0609/0.0134 for web/code/math), or corpus -> weight.
        names: the corpora there are; one with weight 0 is not trained on (it is still validated).
        field_name: the config field an error names.

    Returns:
        Corpus -> share, in the order of ``names``.

    Raises:
        ConfigError: an unknown corpus, one left out, a negative or non-finite weight, or nothing above zero.
    """
    if weights is None:
        return {name: 1.0 / len(names) for name in names}
    if weights == "study":
        weights = STUDY_WEIGHTS
    if not isinstance(weights, dict) or not weights:
        raise ConfigError(
            field_name, weights, "must be null (equal), study, or {corpus: weight}, e.g. {web: 0.9, code: 0.1}"
        )
    for name, weight in weights.items():
        if check_value("data.weights.*", weight, field=f"{field_name}.{name}") and name not in names:
            what = f"must name a corpus that is there: {', '.join(names)}; {field_name}.{name}=0 leaves it out"
            raise ConfigError(f"{field_name}.{name}", weight, what)
    missing = [name for name in names if name not in weights]
    if missing:
        raise ConfigError(field_name, weights, f"must name {', '.join(missing)} too; 0 leaves a corpus out on purpose")
    total = float(sum(weights.values()))
    if total <= 0:
        raise ConfigError(field_name, weights, "must have a weight above 0")
    return {name: float(weights[name]) / total for name in names}


def draw(text: str) -> float:
    """A number in [0, 1) that depends on the document's text alone; below ``val_fraction`` the document is held out.

    So equal documents fall on the same side, and adding documents moves none.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


@dataclass(frozen=True)
class Reading:
    """How the rows of one file are read.

    Attributes:
        name: what an error calls the file.
        suffix: one of `SUFFIXES`.
        field: the config field an error names.
        column: where the text stands; None: the first of `TEXT_COLUMNS` that is there.
        skip: so many rows are left out at the start, as cheaply as the format allows.
        on_bytes: told now and then how many more bytes of the file were consumed (for a progress bar).
    """

    name: str
    suffix: str
    field: str = "data.path"
    column: str | None = None
    skip: int = 0
    on_bytes: Callable[[int], None] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Where the text may stand, the first that is there counts."""
        return TEXT_COLUMNS if self.column is None else (self.column,)

    def broken(self, row: int, expected: str) -> ConfigError:
        """What is said of a row (or line), counted from 1."""
        return ConfigError(self.field, f"{self.name}:{row}", expected)

    def rows(self, raw: IO[bytes]) -> Iterator[str]:
        """Yields the text of every row of an open file, also where it is empty or null; in bounded memory.

        jsonl and parquet: a document per row. txt: pieces of about 16 thousand characters cut at an empty line (or
        line end), so that a book neither fills the memory nor is one single document.

        Raises:
            ConfigError: a broken line, missing column or undecodable byte; names the file and the line or row.
        """
        if self.suffix == ".parquet":
            return _parquet_rows(raw, self)
        stream = raw
        if self.suffix.endswith(".gz"):
            stream = gzip.open(raw)  # noqa: SIM115 - closed with raw
        elif self.suffix.endswith(".zst"):
            import pyarrow  # zstandard's own reader takes a file cut short for a complete one

            stream = io.BufferedReader(
                pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"), 1 << 20
            )
        limit = 4 * PIECE_CHARACTERS if self.suffix == ".txt" else -1  # a text may be one endless line
        lines = _watched(stream, raw, self, limit)
        if self.suffix == ".txt":
            return itertools.islice(_text_pieces(lines, self), self.skip, None)
        return _json_rows(lines, self)


def read_documents(path: Path, *, on_bytes: Callable[[int], None] | None = None) -> Iterator[str]:
    """Yields the documents of one file as they are read (see `Reading.rows`); empty ones are left out.

    Args:
        path: a file with a known suffix.
        on_bytes: told now and then how many more bytes of the file were consumed (for a progress bar).

    Raises:
        ConfigError: a broken line, missing column or undecodable byte; names the file and the line or row.
    """
    suffix = suffix_of(path)
    assert suffix
    with path.open("rb") as raw:
        yield from filter(None, Reading(path.name, suffix, on_bytes=on_bytes).rows(raw))


def _watched(stream: IO[bytes], raw: IO[bytes], reading: Reading, limit: int) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line or up to ``limit`` bytes of it); reports how far the file below was read."""
    told, number, reads = 0, 1, 0
    while True:
        try:
            line = stream.readline(limit)
        except ConfigError:  # of the place it is read from; a ValueError too
            raise
        except (EOFError, OSError, ValueError, zlib.error) as error:
            raise reading.broken(number, f"must be readable from there on ({error})") from None
        reads += 1
        if reading.on_bytes and (not line or reads % 256 == 0) and (now := raw.tell()) > told:
            reading.on_bytes(now - told)
            told = now
        if not line:
            return
        yield number, line
        number += line.endswith(b"\n")


def _json_rows(lines: Iterator[tuple[int, bytes]], reading: Reading) -> Iterator[str]:
    skip = reading.skip
    for number, raw_line in lines:
        if not raw_line.strip():
            continue
        if skip:
            skip -= 1
            continue
        try:
            row = json.loads(raw_line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise reading.broken(number, f"must be UTF-8 (byte {error.start} of the line is not)") from None
        except json.JSONDecodeError as error:
            expected = f"must be one JSON object per line ({error.msg} at column {error.colno})"
            raise reading.broken(number, expected) from None
        text = _text_of(row, reading.columns)
        if text is None:
            raise reading.broken(number, f"must be an object with a string under {' or '.join(reading.columns)}")
        yield text


def _text_of(row: object, columns: tuple[str, ...]) -> str | None:
    if isinstance(row, dict):
        for column in columns:
            if column in row:
                text = "" if row[column] is None else row[column]
                return _clean(text) if isinstance(text, str) else None
    return None


def _clean(text: str) -> str:
    """Lone surrogates (JSON may hold them) cannot be written as UTF-8; they become the replacement character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _text_pieces(lines: Iterator[tuple[int, bytes]], reading: Reading) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    piece: list[str] = []
    size = number = 0
    try:
        for number, line in lines:  # noqa: B007 - the error names the line it came to
            part = decoder.decode(line)
            piece.append(part)
            size += len(part)
            if size >= 2 * PIECE_CHARACTERS or (size >= PIECE_CHARACTERS and not part.strip()):
                yield "".join(piece)
                piece, size = [], 0
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise reading.broken(number, f"must be UTF-8 ({error.reason})") from None
    if "".join(piece).strip():
        yield "".join(piece)


def _parquet_rows(raw: IO[bytes], reading: Reading) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(raw)
        column = next((name for name in reading.columns if name in table.schema_arrow.names), None)
        if column is None:
            raise reading.broken(1, f"must have a column {' or '.join(reading.columns)}")
        size = raw.seek(0, io.SEEK_END)
        total, row = max(table.metadata.num_rows, 1), 0
        for group in range(table.num_row_groups):
            if row + table.metadata.row_group(group).num_rows <= reading.skip:
                row += table.metadata.row_group(group).num_rows
                continue
            for batch in table.iter_batches(batch_size=512, row_groups=[group], columns=[column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if row <= reading.skip:
                        continue
                    if not isinstance(text, str | None):
                        raise reading.broken(row, f"must be a string in column {column}")
                    yield text or ""
                if reading.on_bytes:
                    reading.on_bytes(size * batch.num_rows // total)
    except (pyarrow.ArrowException, OSError) as error:
        raise reading.broken(1, f"must be a readable parquet file ({str(error).splitlines()[0]})") from None
