"""Finding corpora and reading every file format."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_samples import make_texts, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from lightning_opt.data import text_files
from lightning_opt.plan import ConfigError, HubLost


def read(path: Path) -> list[str]:
    return list(text_files.read_documents(path))


def as_jsonl(texts: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({column: text, "n": 1}, ensure_ascii=False) + "\n" for text in texts).encode()


@pytest.mark.parametrize("column", ["text", "content"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_every_format_gives_the_same_corpus(tmp_path: Path, suffix: str, column: str) -> None:
    texts = [*make_texts(700), "\u2028 line separator", "zwj 👩‍👩‍👧", "nul \0 inside", " spaces kept \n"]
    path = tmp_path / f"a{suffix}"
    raw = as_jsonl(texts, column)
    if suffix == ".jsonl":
        path.write_bytes(raw)
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(raw))
    elif suffix == ".jsonl.zst":
        half = len(raw) // 2  # two frames, as `cat a.zst b.zst` makes them
        path.write_bytes(
            zstandard.ZstdCompressor().compress(raw[:half]) + zstandard.ZstdCompressor().compress(raw[half:])
        )
    else:
        pq.write_table(pa.table({"n": list(range(len(texts))), column: texts}), path, row_group_size=100)
    assert read(path) == texts


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt"])
def test_progress_adds_up_to_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    raw = as_jsonl(make_texts(2000))
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": make_texts(2000)}), path)
    else:
        path.write_bytes({".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}.get(suffix, bytes)(raw))
    told: list[int] = []
    list(text_files.read_documents(path, on_bytes=told.append))
    size = path.stat().st_size
    assert size * 0.99 <= sum(told) <= size
    assert min(told) >= 0


@given(st.lists(st.sampled_from(["a line", "", "wörd 🙂", "x" * 9000, "\r"]), max_size=60), st.booleans())
def test_a_text_file_is_cut_but_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], bom: bool
) -> None:
    path = tmp_path_factory.mktemp("txt") / "a.txt"
    text = "\n".join(lines)
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    pieces = read(path)
    assert "".join(pieces) == text or (not text[len("".join(pieces)) :].strip() and text.startswith("".join(pieces)))
    assert all(len(piece) <= 2 * text_files.PIECE_CHARACTERS + 4 * text_files.PIECE_CHARACTERS for piece in pieces)


def test_one_endless_line_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "é🙂" * 200_000
    path.write_text(text, encoding="utf-8")
    pieces = read(path)
    assert "".join(pieces) == text
    assert len(pieces) > 5


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "broken', "JSON"),
        (b'{"title": "no text"}', "text or content"),
        (b'{"text": 3}', "string"),
        (b'["text"]', "text or content"),
        (b'{"text": "\xff"}', "UTF-8"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, expected: str) -> None:
    path = tmp_path / "web_train.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(ConfigError, match=rf"^data.path = web_train.jsonl:3: .*{expected}") as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_file_cut_short_is_refused_not_read_as_a_shorter_one(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": make_texts(500)}), path)
        raw = path.read_bytes()
    else:
        raw = {".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix](as_jsonl(make_texts(3000)))
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ConfigError, match=r"data.path = a\."):
        read(path)


def test_parquet_without_a_text_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="column text or content"):
        read(tmp_path / "a.parquet")


def test_lone_surrogates_become_valid_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ok \\ud83d\\ude42 bad \\ud83d end"}\n')
    assert read(tmp_path / "a.jsonl") == ["ok 🙂 bad \ufffd end"]


def test_corpora_of_a_folder(tmp_path: Path) -> None:
    for name in (
        "web_train.jsonl", "web_val.jsonl", "notes.txt", "books/one.txt", "books/two.jsonl", "books/validation/v.txt",
        "code/train-00000-of-00002.parquet", "code/train-00001-of-00002.parquet", "code/code_val.jsonl",
        "big-00000-of-00002.jsonl.zst", "big-00001-of-00002.jsonl.zst", "papers_train/a.txt", "papers_val/a.txt",
        "retrieval.txt", "ignored.csv", ".hidden.txt",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("x")
    found = {
        name: (
            [p.relative_to(tmp_path).as_posix() for p in c.train],
            [p.relative_to(tmp_path).as_posix() for p in c.val],
        )
        for name, c in text_files.discover(tmp_path).items()
    }
    assert found == {
        "big": (["big-00000-of-00002.jsonl.zst", "big-00001-of-00002.jsonl.zst"], []),
        "books": (["books/one.txt", "books/two.jsonl"], ["books/validation/v.txt"]),
        "code": (["code/train-00000-of-00002.parquet", "code/train-00001-of-00002.parquet"], ["code/code_val.jsonl"]),
        "notes": (["notes.txt"], []),
        "papers": (["papers_train/a.txt"], ["papers_val/a.txt"]),
        "retrieval": (["retrieval.txt"], []),
        "web": (["web_train.jsonl"], ["web_val.jsonl"]),
    }


def test_folders_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data.path = .*none: must be an existing folder"):
        text_files.discover(tmp_path / "none")
    with pytest.raises(ConfigError, match="at least one"):
        text_files.discover(tmp_path)
    write_jsonl(tmp_path / "a_val.jsonl", ["x"])
    with pytest.raises(ConfigError, match=r"training files beside a_val\.jsonl"):
        text_files.discover(tmp_path)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": -1, "b": 2}, r"data\.weights\.a = -1: .*>= 0"),
        ({"a": float("nan"), "b": 2}, r"data\.weights\.a = nan"),
        ({"a": float("inf")}, r"data\.weights\.a = inf"),
        ({"b": 1}, r"data\.weights = .*must name a too; 0 leaves"),
        ({"a": True}, r"data\.weights\.a = true"),
        ({"a": 0, "b": 0}, r"data\.weights = .* above 0"),
        ({"c": 1}, r"data\.weights\.c = 1: .*a, b"),
        ("study", r"data\.weights\.web = 0\.9257: .*a, b"),
        ("equal", r"data\.weights = equal"),
        ({}, r"data\.weights"),
    ],
)
def test_wrong_weights(weights: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        text_files.check_weights(weights, ["a", "b"])


def test_weights_become_shares() -> None:
    assert text_files.check_weights(None, ["a", "b"]) == {"a": 0.5, "b": 0.5}
    assert text_files.check_weights({"a": 0, "b": 3, "c": 0}, ["a", "b"]) == {"a": 0.0, "b": 1.0}
    study = text_files.check_weights("study", ["code", "math", "web"])
    assert study == pytest.approx({"web": 0.9257, "code": 0.0609, "math": 0.0134})


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"])
def test_a_hub_lost_while_a_file_is_read_is_no_fault_of_the_file(name: str) -> None:
    class Lost(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def seekable(self) -> bool:
            return True

        at = 0

        def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
            self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: 1000}[whence]
            return self.at

        def tell(self) -> int:
            return self.at

        def readinto(self, buffer: Any) -> int:
            raise HubLost("gave up")

    with pytest.raises(HubLost, match="gave up"):
        list(text_files.Reading(name, name[1:]).rows(io.BufferedReader(Lost())))
