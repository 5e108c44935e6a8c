"""Answers that are kept while a scoring goes on: what a stopped one leaves, who else may write, nothing asked twice."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_opt.evaluation import evaluate, sandbox
from lightning_opt.evaluation.answers import UNUSED_DAYS, Answers, answers_file

ISOLATED, WHY = sandbox.available()


def test_an_answer_is_there_at_once_and_for_others_once_saved(tmp_path: Path) -> None:
    mine, yours = (Answers(tmp_path / "deep" / "kept.sqlite") for _ in range(2))
    mine.keep(["loglikelihood", "a", "b"], [-1.5, True, False])
    assert mine.find(["loglikelihood", "a", "b"]) == [-1.5, True, False]
    assert yours.find(["loglikelihood", "a", "b"]) is None
    mine.save()
    assert yours.find(["loglikelihood", "a", "b"]) == [-1.5, True, False]
    assert yours.find(["loglikelihood", "a", "c"]) is None


def test_answers_that_nobody_wanted_for_long_are_dropped(tmp_path: Path) -> None:
    asked, forgotten, young = (tmp_path / f"{letter * 32}.sqlite" for letter in "abc")
    theirs = tmp_path / "notes.sqlite"
    long_ago = time.time() - 86_400 * (UNUSED_DAYS + 1)
    for file in (asked, forgotten, young, theirs):
        file.touch()
        os.utime(file, (long_ago, time.time() if file == young else long_ago))
    assert answers_file(tmp_path, "a" * 64) == asked
    assert sorted(tmp_path.iterdir()) == [asked, young, theirs]
    assert asked.stat().st_mtime > long_ago + 86_400
    assert answers_file(tmp_path / "new", "a" * 64) == tmp_path / "new" / asked.name


def test_another_scoring_may_write_while_the_model_computes(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every forward pass the file is free, and holds the answers of all passes before."""
    plain, rows, passes = type(model).forward, [], []

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        (file,) = (tmp_path / "kept").iterdir()
        with sqlite3.connect(file, timeout=0) as other:
            other.execute("BEGIN IMMEDIATE")
            rows.append(other.execute("SELECT count(*) FROM answers").fetchone()[0])
        other.close()
        passes.append(arguments[0].shape[0])
        return plain(self, *arguments, **options)

    monkeypatch.setattr(type(model), "forward", watched)
    config = {"tasks": ["mmlu"], "limit": 12, "batch_size": 4, "cache": str(tmp_path / "kept")}
    evaluate(model, tokenizer, config, tmp_path / "out")
    assert sum(passes) == 12
    assert len(passes) >= 3
    assert rows == [4 * sum(passes[:place]) for place in range(len(passes))]  # four letters a question


@pytest.mark.skipif(not ISOLATED, reason=WHY)
def test_stopped_writing_goes_on_where_it_was(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, asked = type(model).generate, []

    def stopped(self: Any, input_ids: Any, *arguments: Any, **options: Any) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(input_ids))
        return plain(self, input_ids, *arguments, **options)

    config = {"tasks": ["humaneval"], "limit": 12, "batch_size": 4, "max_gen_toks": 4}
    monkeypatch.setattr(type(model), "generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tokenizer, config | {"cache": str(tmp_path / "kept")}, tmp_path / "out")
    assert asked == [4, 4]
    asked[:] = [0, 0, 0]
    block = evaluate(model, tokenizer, config | {"cache": str(tmp_path / "kept")}, tmp_path / "out")
    assert asked == [0, 0, 0, 4]
    monkeypatch.undo()
    assert block == evaluate(model, tokenizer, config, tmp_path / "whole")


@pytest.mark.skipif(not ISOLATED, reason=WHY)
def test_a_failing_task_does_not_ask_the_others_again(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cache too: the passes are those of the good tasks alone and of HumanEval's solutions never."""
    plain, sizes = type(model).forward, []

    def counted(self: Any, tokens: Any, *arguments: Any, **options: Any) -> Any:
        sizes.append(tokens.numel())
        return plain(self, tokens, *arguments, **options)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(type(model), "forward", counted)
    config: dict[str, Any] = {"limit": 8, "tasks": ["hellaswag", "mmlu"]}
    alone = evaluate(model, tokenizer, config, tmp_path / "alone")
    wanted, sizes[:] = sum(sizes), []
    monkeypatch.setattr(type(model), "generate", fail)
    block = evaluate(model, tokenizer, config | {"tasks": ["hellaswag", "mmlu", "humaneval"]}, tmp_path / "bad")
    assert sum(sizes) == wanted
    assert block["humaneval"] == {"skipped": "failed: MemoryError: no room"}
    assert alone["mmlu"]["truncated"] > 0
    assert {task: block[task] for task in config["tasks"]} == {task: alone[task] for task in config["tasks"]}
