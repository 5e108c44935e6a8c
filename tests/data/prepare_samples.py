"""Tiny copies of real data sets, file by file in their own layout, and what is common to tests that prepare them."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard
from data_samples import make_texts
from tokenizers import Tokenizer

from lightning_opt.data.shards import open_shards

DCLM, STARCODER, PROOFPILE, C4 = (
    "mlfoundations/dclm-baseline-1.0", "bigcode/starcoderdata", "EleutherAI/proof-pile-2", "allenai/c4",
)  # fmt: skip
WEB, CODE, MATH, VAL = make_texts(80), make_texts(60, 1000), make_texts(60, 2000), make_texts(20, 3000)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _lines(texts: Sequence[str], **more: Any) -> bytes:
    return "".join(json.dumps({"text": text, **more}) + "\n" for text in texts).encode()


def make_hub(root: Path, web: Sequence[str], code: Sequence[str], math: Sequence[str], val: Sequence[str]) -> None:
    """The study's four data sets with some of their neighbours' files, which are not to be read."""
    dclm = {"bff_contained_ngram_count_before_dedupe": 3, "metadata": {"WARC-Type": "response"}, "url": "http://x"}
    for shard in range(4):
        name = f"global-shard_0{shard // 2 + 1}_of_10/local-shard_{shard}_of_10/shard_0000000{shard}_processed"
        _write(root / DCLM / f"{name}.jsonl.zst", zstandard.compress(_lines(web[shard::4], **dclm)))
    for number, language in enumerate(("ada", "python", "rust")):
        table = {"max_stars_count": [5] * len(code[number::3]), "content": list(code[number::3])}
        path = root / STARCODER / language / f"train-0000{number}-of-00059.parquet"
        path.parent.mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=7)
    names = ("algebraic-stack/train/agda0000", "arxiv/train/arXiv_000", "open-web-math/train/shard-0000")
    for number, name in enumerate(names):
        _write(root / PROOFPILE / f"{name}.jsonl.zst", zstandard.compress(_lines(math[number::3], meta={"score": 1})))
    _write(root / PROOFPILE / "arxiv/test/arXiv_000.jsonl.zst", zstandard.compress(_lines(["not to be trained on"])))
    _write(root / PROOFPILE / "proof-pile-2.py", b"import datasets")
    for number in range(2):
        name = f"en/c4-validation.0000{number}-of-00008.json.gz"
        _write(root / C4 / name, gzip.compress(_lines(val[number::2], timestamp="2019-04-25T12:57:54Z")))
    _write(root / C4 / "en/c4-train.00000-of-01024.json.gz", gzip.compress(_lines(["not for validation"])))


def study(hub: Path | None, shards: Path, tokenizer_file: Path, **changes: Any) -> dict[str, Any]:
    """``config["data"]`` of the study's mixture, as conf/ has it."""
    return {
        "name": "dclm_starcoder_proofpile",
        "source": "prepared",
        "path": str(shards),
        "weights": {"dclm": 0.6, "starcoder": 0.3, "proofpile": 0.1},
        "sequence_length": 16,
        "corpora": {
            "dclm": {"repo": DCLM, "files": "global-shard_*.jsonl.zst"},
            "starcoder": {"repo": STARCODER, "files": "*.parquet", "column": "content"},
            "proofpile": {"repo": PROOFPILE, "files": ["*/train/*.jsonl.zst"]},
            "c4_en": {"repo": C4, "files": "en/c4-validation.*.json.gz", "val_tokens": 300},
        },
        "root": str(hub) if hub else None,
        "decontaminate": None,
        "tokenizer": {"path": str(tokenizer_file), "vocab_size": None, "eos": None},
        "cache_dir": str(shards.parent / "cache"),
        "num_workers": 0,
        **changes,
    }


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder and its sha256."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def texts_of(folder: Path, split: str) -> list[str]:
    """The documents of a corpus folder, in order, through its own document index."""
    shards = open_shards(folder)
    stream = getattr(shards, split)
    tokens, starts = stream.read(0, len(stream)), shards.documents(split)
    assert starts[-1] == len(stream)
    decoder = Tokenizer.from_file(str(folder.parent / "tokenizer.json"))
    pieces = [tokens[a:b] for a, b in itertools.pairwise(starts)]
    assert all(piece[-1] == shards.eos_id for piece in pieces)
    return [decoder.decode(piece[:-1].tolist()) for piece in pieces]
