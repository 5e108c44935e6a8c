"""One stretch of a file onto disk: cut anywhere and gone on with, it is the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_samples import make_texts, write_jsonl
from prepare_samples import content

from lightning_opt.data import tokenizer as t
from lightning_opt.data import units, writing
from lightning_opt.data.origins import Origin
from lightning_opt.data.shards import TokenizerFacts


def unit_of(folder: Path, source: Path, **changes: Any) -> units.Unit:
    folder.mkdir(exist_ok=True)
    origin = Origin("data.corpora.x", folder=str(source.parent))
    settings = {"first_row": 0, "quota": 10**9, "split": "train", "val_fraction": 0.3, "column": None, **changes}
    return units.Unit(7, folder, origin, source.name, source.stat().st_size, **settings)


@pytest.fixture(scope="module")
def writer(tokenizer: Path) -> Callable[..., units.Writer]:
    loaded = t.for_documents(tokenizer)
    facts = TokenizerFacts("x", t.END_OF_TEXT, loaded.token_to_id(t.END_OF_TEXT), 300)

    def make(on_tokens: Callable[[int], None] = lambda _: None, checkpoint: int = 500) -> units.Writer:
        return units.Writer(loaded, facts, None, on_tokens, checkpoint)

    return make


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_unit_cut_anywhere_and_gone_on_with_is_the_same(
    tmp_path: Path, writer: Callable[..., units.Writer], monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(writing, "BATCH_CHARACTERS", 600)
    texts = [text if k % 9 else "" for k, text in enumerate(make_texts(150))]
    source = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write_jsonl(source, texts)
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), source, row_group_size=11)
    whole = unit_of(tmp_path / "whole", source, quota=4000)
    writer().fill(whole)
    wanted = content(tmp_path / "whole")
    draw = random.Random(1)
    for attempt in range(5):
        unit = unit_of(tmp_path / f"cut{attempt}", source, quota=4000)
        while not units.progress_of(unit).done:
            left = draw.randint(1, 12)

            def cut(_: int) -> None:
                nonlocal left
                left -= 1
                if not left:
                    raise InterruptedError

            try:
                writer(cut, checkpoint=draw.choice([100, 700])).fill(unit)
            except InterruptedError:
                for path in unit.folder.glob("*.bin"):  # what came behind the last record may be anything
                    with path.open("ab") as file:
                        file.write(b"junk")
        assert content(unit.folder) == wanted


def test_a_unit_whose_tokens_did_not_reach_the_disk_starts_over(
    tmp_path: Path, writer: Callable[..., units.Writer]
) -> None:
    write_jsonl(tmp_path / "a.jsonl", make_texts(60))
    unit = unit_of(tmp_path / "unit", tmp_path / "a.jsonl")
    writer().fill(unit)
    wanted = content(unit.folder)
    record = json.loads(unit.record.read_text())
    unit.record.write_text(json.dumps({**record, "done": False, "exhausted": False}))
    unit.path("train", "bin").write_bytes(b"")
    writer().fill(unit)
    assert content(unit.folder) == wanted
