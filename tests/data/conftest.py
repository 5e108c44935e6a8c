"""Small corpora every data test may use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_samples import make_texts, write_jsonl
from prepare_samples import CODE, MATH, VAL, WEB, make_hub, study

from lightning_opt.data import orders, preparing
from lightning_opt.data import tokenizer as t


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two corpora: ``long`` with validation files, ``short`` without."""
    root = tmp_path / "texts"
    write_jsonl(root / "long_train.jsonl", make_texts(300))
    write_jsonl(root / "long_val.jsonl", make_texts(20, 1000))
    write_jsonl(root / "short.jsonl", make_texts(120, 2000))
    return root


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """``config["data"]`` for the small folder; keywords replace fields."""

    def make(**changes: Any) -> dict[str, Any]:
        base = {
            "name": "files",
            "source": "files",
            "path": str(folder),
            "weights": None,
            "sequence_length": 16,
            "tokenizer": {"path": None, "vocab_size": 300, "eos": None},
            "val_fraction": 0.1,
            "cache_dir": str(tmp_path / "cache"),
            "num_workers": 0,
        }
        return {**base, **changes}

    return make


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``tokenizer.json``, trained."""
    folder = tmp_path_factory.mktemp("tokenizer")
    t.save_trained(t.train_tokenizer(make_texts(200), 300), folder)
    return folder / "tokenizer.json"


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the study's data sets, small, as a folder that stands for the hub."""
    folder = tmp_path_factory.mktemp("hub")
    make_hub(folder, WEB, CODE, MATH, VAL)
    return folder


@pytest.fixture
def small_quotas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are left for others after a few documents."""
    monkeypatch.setattr(orders, "LEAST_QUOTA", 100)


@pytest.fixture(scope="session")
def made(root: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list]:
    """``config["data"]`` of shards that are made of `root`, and what their making told."""
    config = study(root, tmp_path_factory.mktemp("made") / "shards", tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orders, "LEAST_QUOTA", 100)
        return config, preparing.prepare(config, tokens=6000, processes=1)
