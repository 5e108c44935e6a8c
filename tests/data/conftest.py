"""Small corpora every data test may use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_samples import make_texts, write_jsonl


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
