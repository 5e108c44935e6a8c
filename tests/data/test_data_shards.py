"""Shards on disk: content, widths, parts, entropies, damage, kills and races."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from data_samples import make_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lightning_opt.data import cached
from lightning_opt.data import tokenizer as t
from lightning_opt.data.cached import Damaged
from lightning_opt.data.shards import TokenStream, open_shards, read_index, token_dtype
from lightning_opt.data.writing import unigram_entropies, write_shards


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return t.train_tokenizer(make_texts(200), 300)


def write(folder: Path, tokenizer: Tokenizer, documents: list[tuple[str, str]], **options: int) -> None:
    folder.mkdir(parents=True)
    write_shards(folder, "c", documents, tokenizer, eos=t.END_OF_TEXT, tokenizer_sha256="x", **options)
    cached.seal(folder)


def test_tokens_documents_and_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = make_texts(50)
    documents = [("val" if k % 5 == 0 else "train", text) for k, text in enumerate(texts)]
    write(tmp_path / "c", tokenizer, documents)
    shards = open_shards(tmp_path / "c")
    for split, stream in (("train", shards.train), ("val", shards.val)):
        wanted = [text for name, text in documents if name == split]
        tokens, starts = stream.read(0, len(stream)), shards.documents(split)
        assert len(starts) == len(wanted) + 1
        assert starts[-1] == len(stream)
        np.save(tmp_path / "starts.npy", np.array([0, *np.flatnonzero(tokens == shards.eos_id) + 1]))
        assert (tmp_path / "c" / f"{split}.npy").read_bytes() == (tmp_path / "starts.npy").read_bytes()
        for k, text in enumerate(wanted):
            piece = tokens[starts[k] : starts[k + 1]]
            assert piece[-1] == shards.eos_id
            assert tokenizer.decode(piece[:-1].tolist()) == text
    assert shards.train_bytes == sum(len(x.encode()) for s, x in documents if s == "train")
    assert (shards.train_documents, shards.val_documents) == (40, 10)
    left = {path.name for path in (tmp_path / "c").iterdir()}
    assert left == {"train-00000.bin", "val-00000.bin", "train.npy", "val.npy", "index.json", cached.MANIFEST}


def test_width_follows_the_vocabulary() -> None:
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def test_ids_above_16_bits_are_kept(tmp_path: Path) -> None:
    from tokenizers import models, pre_tokenizers

    vocabulary = {f"w{k}": k for k in range(70_000)} | {t.END_OF_TEXT: 70_000}
    wide = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    wide.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    write(tmp_path / "c", wide, [("train", "w1 w65535 w65536 w69999"), ("val", "w5")])
    shards = open_shards(tmp_path / "c")
    assert shards.dtype == "uint32"
    assert shards.train.read(0, 99).tolist() == [1, 65_535, 65_536, 69_999, 70_000]
    assert (tmp_path / "c" / "train-00000.bin").stat().st_size == 20


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 40), st.integers(0, 40))
def test_reading_across_parts_is_reading_one_array(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], start: int, more: int
) -> None:
    lengths = [length + 1 for length in lengths]
    folder, whole = tmp_path_factory.mktemp("parts"), np.arange(sum(lengths), dtype=np.uint16)
    parts = []
    for k, piece in enumerate(np.split(whole, np.cumsum(lengths)[:-1])):
        parts.append(folder / f"{k}.bin")
        piece.tofile(parts[-1])
    stream = TokenStream(parts, lengths, "uint16")
    assert stream.read(start, start + more).tolist() == whole[start : start + more].tolist()
    assert pickle.loads(pickle.dumps(stream)).read(0, 99).tolist() == whole.tolist()


def test_parts_hold_what_one_file_would(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [("train", text) for text in make_texts(30)] + [("val", "x")]
    write(tmp_path / "one", tokenizer, documents)
    write(tmp_path / "many", tokenizer, documents, part_tokens=100)
    one, many = open_shards(tmp_path / "one"), open_shards(tmp_path / "many")
    assert len(many.train.parts) > 5
    assert all(length == 100 for length in many.train.lengths[:-1])
    assert np.array_equal(one.train.read(0, 10**6), many.train.read(0, 10**6))


def test_entropies_agree_with_scipy(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "c", tokenizer, [("train", x) for x in make_texts(60)] + [("val", x) for x in make_texts(9, 500)])
    shards = open_shards(tmp_path / "c")
    train = np.bincount(shards.train.read(0, 10**6), minlength=300) + 1.0
    val = np.bincount(shards.val.read(0, 10**6), minlength=300) / len(shards.val)
    own = scipy.stats.entropy(val)
    assert shards.val_entropy == pytest.approx(own, rel=1e-12)
    assert shards.unigram_entropy == pytest.approx(own + scipy.stats.entropy(val, train / train.sum()), rel=1e-12)


def test_entropies_without_one_of_the_splits() -> None:
    some, none = np.array([1, 3]), np.zeros(2)
    own = scipy.stats.entropy(some)
    assert unigram_entropies(some, none) == (None, None)
    assert unigram_entropies(none, some) == pytest.approx((own, own))


def damage_cases() -> dict[str, object]:
    def flip(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)

    return {
        "flip": lambda folder: flip(folder / "train-00000.bin"),
        "truncate": lambda folder: os.truncate(folder / "train-00000.bin", 10),
        "longer": lambda folder: (folder / "val-00000.bin").open("ab").write(b"xx"),
        "missing": lambda folder: (folder / "val-00000.bin").unlink(),
        "index": lambda folder: (folder / "index.json").write_text("{"),
        "documents": lambda folder: flip(folder / "train.npy"),
        "manifest": lambda folder: (folder / cached.MANIFEST).unlink(),
        "empty manifest": lambda folder: (folder / cached.MANIFEST).write_text("[]"),
    }


@pytest.mark.parametrize("case", damage_cases())
def test_damage_is_found_and_in_the_cache_repaired(
    tmp_path: Path, tokenizer: Tokenizer, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        documents = [("train", "some text"), ("val", "more")]
        write_shards(folder, "c", documents, tokenizer, eos=t.END_OF_TEXT, tokenizer_sha256="x")

    folder = cached.folder_made_once(tmp_path, "c-1", make)
    good = open_shards(folder).train.read(0, 99).copy()
    assert cached.folder_made_once(tmp_path, "c-1", make) == folder
    assert len(made) == 1
    damage_cases()[case](folder)  # type: ignore[operator]
    with pytest.raises(Damaged, match="c-1"):
        cached.verify(folder)
    with caplog.at_level(logging.WARNING, "lightning_opt.data"):
        cached.folder_made_once(tmp_path, "c-1", make)
    assert len(made) == 2
    assert "made again" in caplog.text
    cached.verify(folder)
    assert np.array_equal(open_shards(folder).train.read(0, 99), good)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == ["c-1"]


@pytest.mark.parametrize("case", ["truncate", "longer", "missing", "index"])
def test_cheap_check_finds_wrong_sizes(tmp_path: Path, tokenizer: Tokenizer, case: str) -> None:
    write(tmp_path / "c", tokenizer, [("train", "some text"), ("val", "more")])
    damage_cases()[case](tmp_path / "c")  # type: ignore[operator]
    with pytest.raises(Damaged):
        read_index(tmp_path / "c")


def test_any_byte_of_a_large_file_counts_and_it_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "ALWAYS_READ_BYTES", 2**20)
    folder, memory = tmp_path / "c-1", tmp_path / "cache" / cached.VERIFIED
    folder.mkdir()
    big = folder / "big.bin"
    big.write_bytes(bytes(8 * 2**20))
    cached.seal(folder)
    cached.verify(folder, memory)
    with monkeypatch.context() as patch:
        patch.setattr(cached, "file_digest", None)
        cached.verify(folder, memory)
    for place in (0, 3_456_789, 8 * 2**20 - 1):
        raw = bytearray(8 * 2**20)
        raw[place] = 1
        big.write_bytes(raw)
        with pytest.raises(Damaged, match=r"c-1/big\.bin is not what was written"):
            cached.verify(folder, memory)
    big.write_bytes(bytes(8 * 2**20))
    cached.verify(folder, memory)


MAKER = """
import sys, time
from pathlib import Path
from lightning_opt.data import cached
def make(folder):
    (folder / "a.bin").write_bytes(b"x" * 1000)
    print("making", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "b.bin").write_bytes(b"y" * 1000)
cached.folder_made_once(Path(sys.argv[1]), "c-1", make)
cached.verify(Path(sys.argv[1]) / "c-1")
"""


def start_maker(cache: Path, seconds: float) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MAKER, str(cache), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_a_kill_in_the_middle_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    process = start_maker(tmp_path, 60)
    assert process.stdout
    assert process.stdout.readline() == "making\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "c-1").exists()
    assert list(tmp_path.glob(".c-1.making-*"))
    started = time.monotonic()
    after = start_maker(tmp_path, 0)
    assert after.communicate(timeout=30)[0] == "making\n"
    assert after.returncode == 0
    assert time.monotonic() - started < 20  # the dead process's lock does not hold us up
    assert not list(tmp_path.glob(".c-1.making-*"))


def test_two_processes_at_once_make_it_once(tmp_path: Path) -> None:
    processes = [start_maker(tmp_path, 0.5) for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(said) == ["", "", "making\n"]


def test_a_failure_while_making_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        cached.folder_made_once(tmp_path, "c-1", fail)
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]


def test_hashes_are_computed_once_per_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    file, memory = tmp_path / "a.txt", tmp_path / "cache" / "sources.json"
    file.write_text("one")
    first = cached.content_hashes([file], memory)
    assert first == [hashlib.sha256(b"one").hexdigest()]
    with monkeypatch.context() as patch:
        patch.setattr(cached, "file_digest", None)
        assert cached.content_hashes([file], memory) == first
    file.write_text("two!")
    assert cached.content_hashes([file], memory) == [hashlib.sha256(b"two!").hexdigest()]
    memory.write_text("broken")
    assert cached.content_hashes([file], memory) == [hashlib.sha256(b"two!").hexdigest()]
    assert json.loads(memory.read_text())
