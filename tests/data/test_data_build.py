"""``check`` and ``build``: from a config to data, on small and on real files."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from data_samples import make_texts, write_jsonl

from lightning_opt import data
from lightning_opt.data import cached, meter, token_data
from lightning_opt.data import tokenizer as t
from lightning_opt.data.writing import write_shards
from lightning_opt.plan import ConfigError, amount

Config = Callable[..., dict[str, Any]]


def test_build_gives_what_the_other_rooms_were_promised(config: Config) -> None:
    built = data.build(config(weights={"long": 3, "short": 1}), seed=1)
    item = built.train[0]
    assert set(item) == {"input_ids", "labels"}
    assert item["input_ids"].shape == (16,)
    assert set(built.val) == {"long", "short"}
    assert [(c.name, c.weight) for c in built.corpora] == [("long", 0.75), ("short", 0.25)]
    assert built.tokenizer.eos_token == "<|endoftext|>"
    assert built.vocab_size == len(built.tokenizer) == len(built.token_bytes) == 300
    assert built.token_bytes.dtype == np.int32
    assert built.tokenizer_kind == "trained"
    long, short = built.corpora
    assert (long.train_documents, long.val_documents) == (300, 20)
    assert short.train_documents + short.val_documents == 120
    assert 3 <= short.val_documents <= 30  # 10 % of 120, drawn by hash
    assert built.epochs(16 * 1000)["long"] == pytest.approx(750 / built.train.windows["long"])


def test_validation_text_is_the_validation_files(config: Config) -> None:
    built = data.build(config(), seed=1)
    labels = torch.cat([built.val["long"][k]["labels"] for k in range(len(built.val["long"]))])
    ids = [int(built.val["long"][0]["input_ids"][0]), *labels[labels >= 0].tolist()]
    assert built.tokenizer.decode(ids).split("<|endoftext|>")[:-1] == make_texts(20, 1000)
    assert (
        built.token_bytes[ids].sum() == built.corpora[0].val_bytes == sum(len(x.encode()) for x in make_texts(20, 1000))
    )


def test_held_out_documents_are_not_trained_on(config: Config, tmp_path: Path) -> None:
    built = data.build(config(), seed=1)
    shards = {path.name.split("-")[0]: path for path in (tmp_path / "cache").iterdir() if path.is_dir()}
    opened = data.open_shards(shards["short"])
    text = {
        s: built.tokenizer.decode(getattr(opened, s).read(0, 10**6)).split("<|endoftext|>")[:-1]
        for s in ("train", "val")
    }
    assert sorted(text["train"] + text["val"]) == sorted(make_texts(120, 2000))
    assert not set(text["train"]) & set(text["val"])


def test_the_second_build_makes_nothing_and_is_the_same(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    first = data.build(config(), seed=1)
    monkeypatch.setattr(token_data, "train_tokenizer", None)
    monkeypatch.setattr(token_data, "write_shards", None)
    second = data.build(config(), seed=1)
    assert second.fingerprint == first.fingerprint
    assert second.corpora == first.corpora
    for k in (0, 5, 1000):
        assert torch.equal(first.train[k]["input_ids"], second.train[k]["input_ids"])


def test_the_fingerprint_follows_what_matters(config: Config, folder: Path, tmp_path: Path) -> None:
    first = data.build(config(), seed=1).fingerprint
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert data.build(config(path=str(moved)), seed=2).fingerprint == first  # neither place, time nor seed
    others = {
        data.build(config(sequence_length=8), seed=1).fingerprint,
        data.build(config(weights={"long": 2, "short": 1}), seed=1).fingerprint,
        data.build(config(tokenizer={"vocab_size": 290}), seed=1).fingerprint,
        data.build(config(val_fraction=0.3), seed=1).fingerprint,
    }
    write_jsonl(folder / "short.jsonl", make_texts(121, 2000))
    others.add(data.build(config(), seed=1).fingerprint)
    assert len(others - {first}) == 5


def test_a_damaged_cache_is_repaired(config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = data.build(config(), seed=1)
    for part in (tmp_path / "cache").glob("*/train-00000.bin"):
        raw = bytearray(part.read_bytes())
        raw[100] ^= 4
        part.unlink()  # a new inode: the first build still has the old one mapped
        part.write_bytes(raw)
    with caplog.at_level(logging.WARNING, "lightning_opt.data"):
        second = data.build(config(), seed=1)
    assert caplog.text.count("made again") == 2
    assert second.fingerprint == first.fingerprint
    assert torch.equal(first.train[0]["input_ids"], second.train[0]["input_ids"])


def test_few_documents_still_give_a_validation_set(config: Config, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "few" / "a.jsonl", make_texts(4))
    built = data.build(config(path=str(tmp_path / "few"), val_fraction=0.001), seed=1)
    assert (built.corpora[0].train_documents, built.corpora[0].val_documents) == (3, 1)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "must not be an empty corpus"),
        (["one"], "empty corpus"),
        (["a", "b"], r"data\.sequence_length = 16: .* a has"),
    ],
)
def test_corpora_too_small_to_use(config: Config, tmp_path: Path, texts: list[str], message: str) -> None:
    write_jsonl(tmp_path / "few" / "a.jsonl", texts)
    with pytest.raises(ConfigError, match=message) as caught:
        data.build(config(path=str(tmp_path / "few")), seed=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "hub"}, r"data\.source = hub: must be one of embedded, files, prepared"),
        ({"path": None}, r"data\.path = null"),
        ({"path": "no/such/folder"}, r"data\.path = no/such/folder"),
        ({"weights": {"web": 1}}, r"data\.weights\.web = 1: .*long, short"),
        ({"sequence_length": 0}, r"data\.sequence_length = 0"),
        ({"num_workers": -1}, r"data\.num_workers = -1"),
        ({"val_fraction": 0.9}, r"data\.val_fraction = 0\.9"),
        ({"val_fraction": 0}, r"data\.val_fraction = 0"),
        ({"tokenizer": {"vocab_size": 100}}, r"data\.tokenizer\.vocab_size = 100: .*257"),
        ({"tokenizer": {"vocab_size": None}}, r"data\.tokenizer\.vocab_size = null"),
        ({"weights": {"long": 1}}, r"data\.weights = .*must name short too"),
        ({"tokenizer": {"path": "none.json"}}, r"data\.tokenizer\.path = none\.json"),
        ({"source": "embedded", "weights": {"web": 1}}, r"data\.weights\.web = 1: .*code, math, prose"),
    ],
)
def test_check_refuses(config: Config, changes: dict, message: str) -> None:
    data.check(config())
    with pytest.raises(ConfigError, match=message):
        data.check(config(**changes))


def test_check_imports_nothing_heavy(config: Config) -> None:
    code = (
        "import sys, json; from lightning_opt import data; data.check(json.loads(sys.argv[1]));"
        "heavy = {'torch', 'transformers', 'grain', 'datasets', 'tokenizers', 'pyarrow'};"
        "print(heavy & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(config())], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_an_unwritable_cache_is_named(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache_dir = .*file"):
        data.build(config(cache_dir=str(tmp_path / "file")), seed=1)


def test_a_given_tokenizer_is_used_as_it_is(config: Config, tmp_path: Path) -> None:
    t.train_tokenizer(make_texts(50), 270).save(str(tmp_path / "tokenizer.json"))
    built = data.build(config(tokenizer={"path": str(tmp_path), "vocab_size": 5000}), seed=1)
    assert (built.vocab_size, built.tokenizer_kind) == (270, "given")
    assert built.tokenizer_sha256 == t.tokenizer_hash(tmp_path / "tokenizer.json", "<|endoftext|>")


@pytest.fixture
def prepared(tmp_path: Path, config: Config) -> dict[str, Any]:
    """A folder as the preparing will leave it, and the config that uses it."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    file = folder / "tokenizer.json"
    t.train_tokenizer(make_texts(50), 280).save(str(file))
    for name, train, val in (("dclm", 50, 0), ("starcoder", 30, 0), ("proofpile", 20, 5), ("c4_en", 0, 10)):
        documents = [("train", x) for x in make_texts(train)] + [("val", x) for x in make_texts(val, 500)]
        (folder / name).mkdir()
        sha = t.tokenizer_hash(file, t.END_OF_TEXT)
        write_shards(folder / name, name, documents, t.for_documents(file), eos=t.END_OF_TEXT, tokenizer_sha256=sha)
        cached.seal(folder / name)
    weights = {"dclm": 0.9257, "starcoder": 0.0609, "proofpile": 0.0134}
    tokenizer = {"path": None, "vocab_size": None, "eos": None}
    name = "dclm_starcoder_proofpile"
    return config(name=name, source="prepared", path=str(folder), weights=weights, tokenizer=tokenizer)


def test_prepared_shards_are_used(prepared: dict[str, Any]) -> None:
    data.check(prepared)
    built = data.build(prepared, seed=1)
    assert set(built.val) == {"c4_en", "proofpile"}
    assert built.train.phases[0].shares == pytest.approx({"dclm": 0.9257, "starcoder": 0.0609, "proofpile": 0.0134})
    infos = {info.name: info for info in built.corpora}
    assert infos["c4_en"].weight == 0
    assert infos["c4_en"].unigram_entropy == infos["c4_en"].val_entropy
    assert not Path(prepared["cache_dir"]).exists()


def test_without_shards_the_command_is_given(prepared: dict[str, Any]) -> None:
    path = prepared["path"] + "_none"
    command = f"python -m recipes.prepare_data data=dclm_starcoder_proofpile data.path={path} tokens=1000$"
    with pytest.raises(ConfigError, match=command):
        data.check({**prepared, "path": path}, tokens=1000)
    with pytest.raises(ConfigError, match=r"corpus arxiv; .*recipes\.prepare_data"):
        data.check({**prepared, "weights": {**prepared["weights"], "arxiv": 1.0}})
    shutil.rmtree(Path(prepared["path"], "c4_en"))
    shutil.rmtree(Path(prepared["path"], "proofpile"))
    with pytest.raises(ConfigError, match="validation shards"):
        data.check({**prepared, "weights": {"dclm": 1.0, "starcoder": 0}})


def test_damaged_prepared_shards_are_refused(prepared: dict[str, Any]) -> None:
    part = Path(prepared["path"], "starcoder", "train-00000.bin")
    raw = bytearray(part.read_bytes())
    raw[7] ^= 1
    part.write_bytes(raw)
    data.check(prepared)  # sizes are right, so only reading it can tell
    with pytest.raises(ConfigError, match=r"data\.path = .*starcoder/train-00000\.bin is not what was written"):
        data.build(prepared, seed=1)
    part.write_bytes(raw[:-2])
    with pytest.raises(ConfigError, match=r"starcoder/train-00000\.bin has \d+ bytes, the index says"):
        data.check(prepared)


def test_shards_of_another_tokenizer_are_refused(prepared: dict[str, Any]) -> None:
    """And those without their manifest: both before torch is imported."""
    file = Path(prepared["path"], "tokenizer.json")
    t.train_tokenizer(make_texts(50), 281).save(str(file))
    with pytest.raises(ConfigError, match=r"tokenizer\.json beside them, which is another now; make it again: python"):
        data.check(prepared)
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json beside them"):
        data.check(prepared)
    Path(prepared["path"], "dclm", "MANIFEST.json").unlink()
    with pytest.raises(ConfigError, match=r"dclm/MANIFEST\.json is missing .*; make it again: python"):
        data.check(prepared)


def test_real_text(shared_data: Path, tmp_path: Path, config: Config) -> None:
    """Web, code and mathematics as they come, the first 250 documents of each; checked against numpy and scipy."""
    folder = tmp_path / "real"
    folder.mkdir()
    for source in sorted((shared_data / "text").glob("*.jsonl")):
        with source.open(encoding="utf-8") as lines:
            (folder / source.name).write_text("".join(line for _, line in zip(range(250), lines, strict=False)))
    changes = {"path": str(folder), "weights": "study", "tokenizer": {"vocab_size": 1024}, "sequence_length": 64}
    built = data.build(config(**changes), seed=1)
    assert [c.name for c in built.corpora] == ["code", "math", "web"]
    for info in built.corpora:
        rows = (folder / f"{info.name}_val.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(row)["text"] for row in rows]
        labels = torch.cat([built.val[info.name][k]["labels"] for k in range(len(built.val[info.name]))])
        ids = np.array([int(built.val[info.name][0]["input_ids"][0]), *labels[labels >= 0].tolist()])
        assert built.tokenizer.decode(ids) == "".join(text + "<|endoftext|>" for text in texts)
        assert built.token_bytes[ids].sum() == info.val_bytes == sum(len(text.encode()) for text in texts)
        assert info.val_entropy == pytest.approx(scipy.stats.entropy(np.bincount(ids)))
        assert info.val_entropy < info.unigram_entropy < np.log(1024)


def test_real_text_with_gpt2s_tokenizer(shared_data: Path, tmp_path: Path, config: Config) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    for name in ("math_train.jsonl", "math_val.jsonl"):
        with (shared_data / "text" / name).open(encoding="utf-8") as lines:
            (folder / name).write_text("".join(line for _, line in zip(range(40), lines, strict=False)))
    given = {"path": str(shared_data / "tokenizers" / "gpt2.tokenizer.json")}
    built = data.build(config(path=str(folder), tokenizer=given), seed=1)
    assert built.vocab_size == 50_257
    assert built.tokenizer.eos_token_id == 50_256
    assert built.corpora[0].train_bytes / built.corpora[0].train_tokens > 2


def test_a_tokenizer_that_drops_text_is_told(
    shared_data: Path, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    """The test tokenizer of torchtitan has no byte alphabet: spaces and non-ASCII letters get lost."""
    given = {"path": str(shared_data / "tokenizers" / "torchtitan_test_tokenizer.json")}
    with caplog.at_level(logging.WARNING, "lightning_opt.data"):
        data.build(config(tokenizer=given), seed=1)
    assert "of the bytes of long" in caplog.text


@pytest.mark.slow
def test_killed_at_any_moment_the_next_build_is_right(shared_data: Path, config: Config, tmp_path: Path) -> None:
    settings = config(path=str(shared_data / "text"), tokenizer={"vocab_size": 512})
    wanted = data.build({**settings, "cache_dir": str(tmp_path / "whole")}, seed=1).fingerprint
    code = (
        "import sys, json; from lightning_opt import data;"
        "print('go', flush=True); print(data.build(json.loads(sys.argv[1]), seed=1).fingerprint)"
    )
    command = [sys.executable, "-c", code, json.dumps(settings)]
    for pause in (0.2, 0.8, 1.5, 2.5, 3.5, 4.0, 4.5):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        process.stdout.readline()
        time.sleep(pause)
        process.kill()
        process.wait()
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].split() for process in both] == [["go", wanted]] * 2
    left = [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")]
    assert sorted(name.split("-")[0] for name in left) == ["code", "math", "sources.json", "tokenizer", "web"]


def test_progress_is_plain_lines_off_a_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(meter, "LINE_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO, "lightning_opt.data"), meter.Meter("tokenising x", 2_000_000, unit="B") as told:
        told.advance(1_000_000)
    assert caplog.records[0].getMessage().startswith("tokenising x: 1 MB of 2 MB (50 %), ")
    assert "done in" in caplog.text


def test_progress_says_what_is_left() -> None:
    tokens = meter.Meter("preparing", 3_000_000_000, unit="tokens", done=500_000)
    tokens.done += 1_000_000
    said = "preparing: 1.5 Mtokens of 3 Gtokens (0 %), 250 ktokens/s, 3 h 19 min left"  # 2.9985e9 / 2.5e5 s
    assert tokens.line(4.0) == said
    assert meter.Meter("preparing", 10, unit="B").line(4.0) == "preparing: 0 B of 10 B (0 %)"
    shares = meter.Meter("weighing", 8)
    shares.done = 2
    assert shares.line(41.0) == "weighing: 25 %, 2 min 03 s left"
    assert (amount(999, "B"), amount(12_345, "B")) == ("999 B", "12.3 kB")


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import pty

    reading, writing = pty.openpty()
    with os.fdopen(writing, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        with meter.Meter("tokenising x", 2_000_000, unit="B") as told:
            told.advance(1_000_000)
        shown = b""
        while b"tokenising x" not in shown:  # a terminal hands on what it has
            shown += os.read(reading, 10_000)
    os.close(reading)
