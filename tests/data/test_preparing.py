"""`recipes.prepare_data` and what is below it: layouts, amounts, processes, estimates, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_samples import make_texts, write_jsonl
from prepare_samples import C4, CODE, DCLM, MATH, PROOFPILE, STARCODER, VAL, WEB, content, study, texts_of

from lightning_opt import data
from lightning_opt.data import estimating, orders, origins, preparing
from lightning_opt.data.shards import open_shards
from lightning_opt.plan import ConfigError

pytestmark = pytest.mark.usefixtures("small_quotas")


def test_the_studys_four_layouts_become_shards_that_a_run_reads(made: tuple[dict[str, Any], list]) -> None:
    config, report = made
    path = Path(config["path"])
    wanted = {"dclm": (3600, WEB), "starcoder": (1800, CODE), "proofpile": (600, MATH), "c4_en": (300, VAL)}
    for corpus in report:
        goal, source = wanted[corpus.name]
        split = "val" if corpus.name == "c4_en" else "train"
        texts = texts_of(path / corpus.name, split)
        assert set(texts) <= set(source)
        assert len(set(texts)) == len(texts) == corpus.documents[split]
        starts = open_shards(path / corpus.name).documents(split)
        assert starts[-2] < goal <= starts[-1] == corpus.tokens[split] or len(texts) == len(source)
    built = data.build(config, seed=1)
    assert {info.name: info.train_tokens for info in built.corpora} == {c.name: c.tokens["train"] for c in report}
    assert set(built.val) == {"c4_en"}
    index = json.loads((path / "starcoder" / "index.json").read_text())
    assert index["made_from"]["source"] == STARCODER
    assert index["made_from"]["asked_tokens"] == 1800
    assert not (path / preparing.WORK).exists()


def test_processes_change_nothing(made: tuple[dict[str, Any], list], tmp_path: Path) -> None:
    config, report = made
    other = {**config, "path": str(tmp_path / "shards")}
    assert preparing.prepare(other, tokens=6000, processes=3) == report
    assert content(tmp_path / "shards") == content(Path(config["path"]))


def test_weights_that_change_along_the_run_are_shared_out_by_their_mean(root: Path, tokenizer: Path) -> None:
    anneal = {"dclm": 0, "starcoder": 0.5, "proofpile": 0.5}
    config = study(root, Path("x"), tokenizer, phases={"start": {"until": 0.8}, "anneal": {"weights": anneal}})
    shares = orders.asked(config, 1000)["weights"]
    assert shares == pytest.approx({"dclm": 0.48, "starcoder": 0.34, "proofpile": 0.18})
    config["phases"]["start"]["until"] = 500
    with pytest.raises(ConfigError, match=r"data\.phases = .*must end its phases at fractions"):
        orders.asked(config, 1000)


def test_more_than_there_is_gives_every_document_once(
    root: Path, tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Quotas double from round to round until the files are exhausted."""
    config = study(root, tmp_path / "shards", tokenizer)
    report = preparing.prepare(config, tokens=1e6, processes=2)
    assert "dclm has no more than" in caplog.text
    for name, source in (("dclm", WEB), ("starcoder", CODE), ("proofpile", MATH)):
        assert sorted(texts_of(tmp_path / "shards" / name, "train")) == sorted(source)
    assert {corpus.name: corpus.asked for corpus in report}["dclm"] == 600_000


def test_held_out_by_hash_with_a_trained_tokenizer_from_a_plain_folder(tmp_path: Path) -> None:
    """Any folder by a few lines of YAML; the tokenizer is trained on what is prepared."""
    write_jsonl(tmp_path / "texts" / "a.jsonl", make_texts(200), "body")
    write_jsonl(tmp_path / "texts" / "deep" / "b.jsonl", make_texts(200, 500), "body")
    entry = {"path": str(tmp_path / "texts"), "files": "*.jsonl", "column": "body", "val_fraction": 0.2}
    changes = {"weights": None, "corpora": {"mine": entry}, "tokenizer": {"path": None, "vocab_size": 300}}
    config = study(None, tmp_path / "shards", tmp_path, **changes)
    preparing.prepare(config, tokens=8000, processes=1)
    train, val = (set(texts_of(tmp_path / "shards" / "mine", split)) for split in ("train", "val"))
    assert train
    assert val
    assert not train & val
    assert train | val <= set(make_texts(200) + make_texts(200, 500))
    assert 0.1 < len(val) / (len(train) + len(val)) < 0.3
    built = data.build(config, seed=1)
    assert built.vocab_size == 300


def test_a_fair_sample_of_the_files() -> None:
    """Drawn by size: of files of 1, 2 and 7 bytes, the first is the large one about 7 times in 10."""
    first = [origins.in_reading_order([(f"{k}a", 1), (f"{k}b", 2), (f"{k}c", 7)])[0][0][-1] for k in range(4000)]
    for name, share in zip("abc", (0.1, 0.2, 0.7), strict=True):
        assert first.count(name) / 4000 == pytest.approx(share, abs=0.025)


def test_a_dry_run_writes_nothing_and_reckons_right(
    root: Path, tokenizer: Path, tmp_path: Path, made: tuple[dict[str, Any], list]
) -> None:
    config = study(root, tmp_path / "shards", tokenizer)
    estimate = estimating.estimate(config, tokens=6000, processes=2)
    assert not list(tmp_path.iterdir())
    found = {corpus.plan.name: corpus for corpus in estimate.corpora}
    assert found["dclm"].bytes == sum(path.stat().st_size for path in (root / DCLM).rglob("*.zst"))
    real = data.build(made[0], seed=1)
    there = {info.name: info.train_tokens + info.val_tokens for info in real.corpora}
    disk = 2 * sum(there.values())
    assert disk / 2 < estimate.disk_bytes < disk * 2
    text = estimate.text()
    assert "nothing was written" in text
    assert f"from {root / PROOFPILE}" in text
    assert len(text.splitlines()) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "files"}, r"data\.source = files: only data=\.\.\. with source: prepared"),
        (
            {"corpora": {"dclm": {"repo": DCLM, "fils": "*"}}},
            r"data\.corpora\.dclm\.fils = \*: must be one of .*; did you mean files\?$",
        ),
        ({"corpora": {"dclm": {"files": "*"}}}, r"data\.corpora\.dclm = .*must name either repo"),
        ({"corpora": {"../x": {"repo": DCLM}}}, r"data\.corpora\.\.\./x = \.\./x: must be a name"),
        ({"corpora": {}}, r"data\.corpora = .*must name a corpus"),
        (
            {"corpora": {"dclm": {"repo": DCLM}}, "weights": None},
            r"data\.corpora = \[dclm\]: must hold a corpus with val_tokens.* data\.corpora\.dclm\.val_fraction=0\.001$",
        ),
        (
            {"corpora": {"dclm": {"repo": DCLM, "val_fraction": 0.1}, "proofpile": {"repo": PROOFPILE}}},
            r"data\.weights\.starcoder = 0\.3: .*; data\.weights\.starcoder=0 leaves it out$",
        ),
        (
            {"corpora": {"dclm": {"repo": DCLM, "val_fraction": 0.7}}},
            r"data\.corpora\.dclm\.val_fraction = 0\.7: must be",
        ),
        ({"tokenizer": {"path": None}}, r"data\.tokenizer\.vocab_size = null: must be a number"),
        ({"tokenizer": {"path": "no.json"}}, r"data\.tokenizer\.path = no\.json"),
        ({"weights": {"dclm": 1}}, r"data\.weights = .*must name starcoder"),
        ({"root": "/nowhere"}, r"data\.root = /nowhere/.*must be an existing folder"),
        ({"decontaminate": "/nowhere"}, r"data\.decontaminate = /nowhere"),
    ],
)
def test_refusals(root: Path, tokenizer: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = study(root, tmp_path / "shards", tokenizer, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        preparing.prepare(config, tokens=1000)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_and_folders_that_are(root: Path, tokenizer: Path, tmp_path: Path) -> None:
    config = study(root, tmp_path / "shards", tokenizer)
    entry = {"repo": C4, "files": "fr/*.json.gz", "val_tokens": 5}
    with pytest.raises(ConfigError, match=r"data\.corpora\.c4_en\.files = \[fr/\*\.json\.gz\]: must name files of"):
        preparing.prepare({**config, "corpora": {**config["corpora"], "c4_en": entry}}, tokens=1000)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"must be a new folder, or one that this command began"):
        preparing.prepare({**config, "path": str(tmp_path / "other")}, tokens=1000)
    with pytest.raises(ConfigError, match=r"tokens = null: must be a whole number"):
        preparing.prepare(config, tokens=None)


def test_a_broken_line_is_named_by_corpus_file_and_line(tokenizer: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "texts" / "a.jsonl", make_texts(5))
    with (tmp_path / "texts" / "a.jsonl").open("a") as file:
        file.write('{"text": "cut in the mid\n')
    entry = {"path": str(tmp_path / "texts"), "val_fraction": 0.1}
    config = study(None, tmp_path / "shards", tokenizer, weights=None, corpora={"mine": entry})
    with pytest.raises(ConfigError, match=r"data\.corpora\.mine = a\.jsonl:6: must be one JSON object per line"):
        preparing.prepare(config, tokens=10_000, processes=1)


def test_parts_are_read_as_one_stream(made: tuple[dict[str, Any], list]) -> None:
    shards = open_shards(Path(made[0]["path"], "dclm"))
    assert len(shards.train.parts) > 3
    raw = np.concatenate([np.fromfile(part, np.uint16) for part in shards.train.parts])
    assert np.array_equal(shards.train.read(0, 10**6), raw)


def test_rows_without_text_are_left_out_counted_and_said(tokenizer: Path, tmp_path: Path) -> None:
    texts: list[str | None] = list(make_texts(40))
    texts[3], texts[20], texts[39] = None, "", None
    entry = {"path": str(tmp_path / "texts"), "val_fraction": 0.2}
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "texts" / "b.parquet")
    config = study(None, tmp_path / "shards", tokenizer, weights=None, corpora={"mine": entry})
    (corpus,) = preparing.prepare(config, tokens=1e6, processes=1)
    assert corpus.empty == 6
    assert sum(corpus.documents.values()) == 2 * 37
    assert json.loads((tmp_path / "shards" / "mine" / "index.json").read_text())["made_from"]["rows_empty"] == 6


@pytest.mark.parametrize("act", [preparing.prepare, estimating.estimate])
def test_a_dry_run_refuses_what_the_real_one_does_and_nothing_is_left(
    act: Callable, root: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "place" / "thesis"
    theirs.mkdir(parents=True)
    (theirs / "thesis.tex").write_text("x")
    config = study(root, theirs, tokenizer)
    with pytest.raises(ConfigError, match=r"data\.path = .*must be a new folder, or one that this command began"):
        act(config, tokens=1000)
    with pytest.raises(ConfigError, match=r"data\.path = .*must be a folder we can write to"):
        act({**config, "path": str(theirs / "thesis.tex")}, tokens=1000)
    (tmp_path / "sets.jsonl").write_text("{")
    config["path"] = str(tmp_path / "place" / "new")
    with pytest.raises(ConfigError, match=r"data\.decontaminate = .*must be readable"):
        act({**config, "decontaminate": str(tmp_path / "sets.jsonl")}, tokens=1000)
    with pytest.raises(ConfigError, match=r"data\.corpora\.c4_en\.files = .*must name files"):
        act({**config, "path": str(tmp_path / "place" / "x"), "corpora": {
            **config["corpora"], "c4_en": {"repo": C4, "files": "no", "val_tokens": 5}}}, tokens=1000)  # fmt: skip
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(orders.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(ConfigError, match=r"data\.path = .*must lie on a disk with .* GB free"):
        act(config, tokens=1000)
    left = {path.name for path in (tmp_path / "place").iterdir()}
    assert left <= {"thesis", "new"}  # and work to go on with
    assert [path.name for path in theirs.iterdir()] == ["thesis.tex"]


def test_another_folder_of_shards_is_refused_dry(made: tuple[dict[str, Any], list]) -> None:
    with pytest.raises(ConfigError, match="holds shards of tokens = 6000"):
        estimating.estimate(made[0], tokens=6001)
