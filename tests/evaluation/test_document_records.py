"""What is said of each document, against plain computations."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_opt.evaluation import document_records, evaluate
from lightning_opt.evaluation.mmlu_subjects import TEST_DOCUMENTS, article_groups
from lightning_opt.evaluation.suites import MINI_DIR, read_documents


def kept(folder: Path) -> list[dict[str, Any]]:
    with gzip.open(folder / "documents.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_bits_per_byte_of_a_uniform_model_over_bytes_is_eight() -> None:
    for text in (" yes", "no", " Straße", "  two blanks"):
        count = len(text.strip().encode())
        assert document_records.bits_per_byte(-count * math.log(256), text) == pytest.approx(8)


def test_a_model_that_finds_all_tokens_equal_has_known_bits(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    import torch

    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    entry = evaluate(model, tokenizer, {"tasks": ["hellaswag"]}, tmp_path)["hellaswag"]
    expected = []
    for item in read_documents(MINI_DIR / "hellaswag_val.jsonl"):
        gold = item["endings"][int(item["label"])]
        whole = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
        tokens = len(tokenizer.encode(f"{whole} {gold}")) - len(tokenizer.encode(whole))
        expected.append(tokens * math.log2(len(tokenizer)) / len(gold.encode()))
    assert entry["bits_per_byte"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert [one["bits_per_byte"] for one in kept(tmp_path)] == pytest.approx(expected, rel=1e-5)


def test_records_add_up_to_the_scores(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    config = {"tasks": ["hellaswag", "mmlu"], "limit": 20}
    block = evaluate(model, tokenizer, config, tmp_path)
    records = kept(tmp_path)
    mmlu = [one for one in records if one["task"].startswith("mmlu_")]
    assert len(mmlu) == 20
    assert block["mmlu"]["value"] == pytest.approx(sum(one["acc"] for one in mmlu) / 20)
    gold = [item["answer"] for item in read_documents(MINI_DIR / "mmlu_test.jsonl")]
    assert {one["gold"] for one in mmlu} <= set(gold)
    for one in mmlu:
        assert one["acc"] == float(max(range(4), key=one["loglikelihoods"].__getitem__) == one["gold"])


def test_always_the_same_answer_scores_the_most_frequent_place() -> None:
    golds = [0, 0, 1, 0, 2, 0]
    records = [{"loglikelihoods": [0.0, -1.0, -2.0, -3.0], "gold": gold} for gold in golds]
    about = document_records.described(records)
    assert (about["chance"], about["majority"], about["tied"]) == (0.25, pytest.approx(4 / 6), 0)


def test_article_groups_hold_every_subject_once() -> None:
    subjects = [name for names in article_groups().values() for name in names]
    assert sorted(subjects) == sorted(TEST_DOCUMENTS)


def test_groups_of_mmlu_count_documents_once(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, shared_data: Path
) -> None:
    config = {"suite": "full", "data_dir": str(shared_data / "eval"), "limit": 57, "tasks": ["mmlu"]}
    entry = evaluate(make_model(), tokenizer, config, tmp_path)["mmlu"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(entry["groups"]) == {"lm-eval", "article"}
    for groups in entry["groups"].values():
        assert sum(group["n"] for group in groups.values()) == 57
        right = sum(group["n"] * group["value"] for group in groups.values())
        assert right == pytest.approx(57 * entry["value"])
    for name, group in entry["groups"]["lm-eval"].items():
        assert group["value"] == pytest.approx(results["groups"][f"mmlu_{name}"]["acc,none"])
    assert results["data"]["mmlu_test.jsonl"]["sha256"]


def test_answers_kept_on_disk_are_not_asked_again(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_opt.evaluation.adapter import CountingLM

    ran: list[int] = []
    stock = CountingLM._logits
    monkeypatch.setattr(CountingLM, "_logits", lambda self, batch, cache: ran.append(1) or stock(self, batch, cache))
    config = {"tasks": ["mmlu"], "limit": 12, "cache": str(tmp_path / "answers")}
    first = evaluate(make_model(), tokenizer, config, tmp_path / "a")
    assert len(ran) > 0
    ran.clear()
    assert evaluate(make_model(), tokenizer, config | {"batch_size": 2}, tmp_path / "b") == first
    assert ran == []
    evaluate(make_model(seed=1), tokenizer, config, tmp_path / "c")
    assert len(ran) > 0
    assert len(list((tmp_path / "answers").glob("*.sqlite"))) == 2


def test_a_scoring_that_broke_off_goes_on(
    make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_opt.evaluation import adapter

    weigh, done = adapter._weigh, []

    def fail_later(*arguments: Any) -> None:
        if len(done) >= 10:
            raise MemoryError
        done.append(weigh(*arguments))

    config = {"tasks": ["mmlu"], "limit": 20, "cache": str(tmp_path / "answers")}
    monkeypatch.setattr(adapter, "_weigh", fail_later)
    assert "MemoryError" in evaluate(make_model(), tokenizer, config, tmp_path / "a")["mmlu"]["skipped"]
    left: list[int] = []
    monkeypatch.setattr(adapter, "_weigh", lambda *given: left.append(1) or weigh(*given))
    again = evaluate(make_model(), tokenizer, config, tmp_path / "b")["mmlu"]
    whole = evaluate(make_model(), tokenizer, config | {"cache": None}, tmp_path / "c")["mmlu"]
    assert again == whole | {
        "bits_per_byte": pytest.approx(whole["bits_per_byte"], abs=1e-4),
        "bits_per_byte_stderr": pytest.approx(whole["bits_per_byte_stderr"], abs=1e-4),
    }
    assert len(left) == 10 + 20  # what was left, then all of it
