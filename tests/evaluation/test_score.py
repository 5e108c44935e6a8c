"""Scores of a tiny model in memory, against computations that share nothing with ours."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_opt.data import meter
from lightning_opt.evaluation import evaluate, sandbox, score, suites
from lightning_opt.evaluation.suites import MINI_DIR, read_documents
from lightning_opt.plan import ConfigError

ISOLATED, WHY = sandbox.available()


@pytest.fixture(scope="module")
def scored(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict, Path]:
    output = tmp_path_factory.mktemp("run") / "evaluation"
    block = evaluate(model, tokenizer, {"suite": "mini", "max_gen_toks": 16}, output)
    return block, json.loads((output / "results.json").read_text()), output


def direct_loglikelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """By one token at a time from a plain softmax; the split is at the context's number of tokens."""
    blank = len(context) - len(context.rstrip())
    start = len(tokenizer.encode(context[: len(context) - blank]))
    tokens = tokenizer.encode(context + continuation)
    room = model.config.max_position_embeddings
    total = 0.0
    offset = max(0, len(tokens) - 1 - room)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([tokens[offset:-1]])).logits[0].double()
    for position in range(start, len(tokens)):
        row = logits[position - 1 - offset]
        total += float(row[tokens[position]] - torch.logsumexp(row, 0))
    return total


def test_summary_has_what_other_rooms_were_promised(scored: tuple[dict, dict, Path]) -> None:
    block, results, output = scored
    assert block["suite"] == "mini"
    assert block["comparable"] is False
    for task, metric, n, shots, chance in (("hellaswag", "acc_norm", 64, 0, 0.25), ("mmlu", "acc", 60, 5, 0.25)):
        entry = block[task]
        assert (entry["metric"], entry["n"], entry["shots"], entry["chance"]) == (metric, n, shots, chance)
        assert entry["majority"] == chance  # gold places of the mini sets are balanced
        assert 0 <= entry["value"] <= 1
        assert entry["stderr"] > 0
    assert results["summary"] == block
    assert {"results", "groups", "configs", "versions", "n-shot", "n-samples", "higher_is_better"} <= results.keys()
    assert results["suite"] == "mini"
    assert results["n-shot"]["mmlu_sums"] == 5
    assert results["truncated"]["hellaswag"] == block["hellaswag"]["truncated"]
    assert (output / "tasks" / "_mmlu.yaml").is_file()


@pytest.mark.skipif(not ISOLATED, reason=WHY)
def test_humaneval_is_scored(scored: tuple[dict, dict, Path]) -> None:
    entry = scored[0]["humaneval"]
    assert (entry["metric"], entry["n"], entry["chance"], entry["value"]) == ("pass@1", 40, 0.0, 0.0)


def test_hellaswag_equals_a_direct_computation(model: Any, tokenizer: Any, scored: tuple[dict, dict, Path]) -> None:
    plain, normed = [], []
    for item in read_documents(MINI_DIR / "hellaswag_val.jsonl"):
        context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
        values = [direct_loglikelihood(model, tokenizer, context, f" {ending}") for ending in item["endings"]]
        gold = int(item["label"])
        plain.append(int(np.argmax(values)) == gold)
        per_byte = [value / len(ending) for value, ending in zip(values, item["endings"], strict=True)]
        normed.append(int(np.argmax(per_byte)) == gold)
    entry = scored[0]["hellaswag"]
    assert entry["acc"] == pytest.approx(np.mean(plain))
    assert entry["value"] == pytest.approx(np.mean(normed))
    assert entry["stderr"] == pytest.approx(np.std(normed, ddof=1) / np.sqrt(len(normed)))


def test_mmlu_equals_a_direct_computation_with_left_cut_prompts(
    model: Any, tokenizer: Any, scored: tuple[dict, dict, Path]
) -> None:
    shots: dict[str, list[dict]] = {}
    for item in read_documents(MINI_DIR / "mmlu_dev.jsonl"):
        shots.setdefault(item["subject"], []).append(item)

    def asked(item: dict) -> str:
        lettered = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", item["choices"], strict=True))
        return f"{item['question']}{lettered}\nAnswer:"

    right, cut = [], 0
    for item in read_documents(MINI_DIR / "mmlu_test.jsonl"):
        subject = item["subject"]
        prompt = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        prompt += "".join(f"{asked(shot)} {'ABCD'[shot['answer']]}\n\n" for shot in shots[subject]) + asked(item)
        values = [direct_loglikelihood(model, tokenizer, prompt, f" {letter}") for letter in "ABCD"]
        right.append(int(np.argmax(values)) == item["answer"])
        cut += len(tokenizer.encode(f"{prompt} A")) > model.config.max_position_embeddings + 1
    entry = scored[0]["mmlu"]
    assert entry["value"] == pytest.approx(np.mean(right))
    assert entry["truncated"] == cut > 0


def test_loglikelihood_does_not_depend_on_the_batch(model: Any, tokenizer: Any) -> None:
    from lm_eval.api.instance import Instance

    from lightning_opt.evaluation.adapter import CountingLM

    pairs = [
        ("The file is", " opened for reading."),
        ("It", " returns"),
        ("x" * 600, " is cut"),
        ("", "nothing before"),
    ]
    pairs += [(f"{left} + {left} =", f" {right}") for left in range(4) for right in range(4)]
    answers = {}
    for size in (1, 8):
        lm = CountingLM(model, tokenizer, batch_size=size, max_length=256)
        requests = [Instance("loglikelihood", {}, pair, 0, ("task", index, 1)) for index, pair in enumerate(pairs)]
        answers[size] = lm.loglikelihood(requests)
        assert lm.cut["task"] == {2}
    for one, many, (context, continuation) in zip(answers[1], answers[8], pairs, strict=True):
        assert one[0] == pytest.approx(many[0], abs=1e-3)
        assert one[1] == many[1]
        if context:
            assert one[0] == pytest.approx(direct_loglikelihood(model, tokenizer, context, continuation), abs=1e-3)


def test_no_continuation_crashes_the_scoring(model: Any, tokenizer: Any) -> None:
    from lm_eval.api.instance import Instance

    from lightning_opt.evaluation.adapter import CountingLM

    lm = CountingLM(model, tokenizer, batch_size=4, max_length=256)
    pairs = [("a", " word" * 700), ("word", ""), (" ", "x"), ("\N{SNOWMAN}", "\0")]
    requests = [Instance("loglikelihood", {}, pair, 0, ("task", index, 1)) for index, pair in enumerate(pairs)]
    assert all(np.isfinite(value) for value, _ in lm.loglikelihood(requests))
    assert 0 in lm.cut["task"]


def test_batch_size_does_not_change_scores(
    model: Any, tokenizer: Any, tmp_path: Path, scored: tuple[dict, dict, Path]
) -> None:
    one = evaluate(model, tokenizer, {"batch_size": 1, "tasks": ["hellaswag", "mmlu"]}, tmp_path)
    assert one["humaneval"] == {"skipped": "not in evaluation.tasks"}
    for task in ("hellaswag", "mmlu"):
        many = scored[0][task]
        assert one[task] == many | {key: pytest.approx(many[key], abs=1e-4) for key in many if "bits" in key}


def test_model_and_randomness_are_left_as_they_were(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model().train()
    model.lm_head.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pad = tokenizer.pad_token
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    evaluate(model, tokenizer, {"limit": 4, "tasks": ["hellaswag"]}, tmp_path)
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected
    assert model.training
    assert not model.lm_head.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert tokenizer.pad_token == pad


def test_nothing_is_said_on_the_terminal(
    model: Any, tokenizer: Any, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluate(model, tokenizer, {"limit": 4, "max_gen_toks": 4}, tmp_path / "evaluation")
    assert capfd.readouterr() == ("", "")


def test_equal_choices_are_reported_as_a_broken_scorer(
    make_model: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = evaluate(model, tokenizer, {"tasks": ["mmlu"]}, tmp_path)["mmlu"]
    first_is_right = np.mean([item["answer"] == 0 for item in read_documents(MINI_DIR / "mmlu_test.jsonl")])
    assert found["degenerate"] is True
    assert found["value"] == pytest.approx(first_is_right)
    assert "broken" in caplog.text


def test_without_a_sandbox_humaneval_is_skipped_before_any_generation(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "available", lambda: (False, "no sandbox for generated code: no namespaces"))
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: pytest.fail("generated"))
    block = evaluate(model, tokenizer, {"limit": 4, "tasks": ["hellaswag", "humaneval"]}, tmp_path)
    assert block["humaneval"] == {"skipped": "no sandbox for generated code: no namespaces"}
    assert block["hellaswag"]["n"] == 4
    assert json.loads((tmp_path / "results.json").read_text())["skipped"]["humaneval"].startswith("no sandbox")


@pytest.mark.skipif(not ISOLATED, reason=WHY)
def test_one_failing_task_does_not_lose_the_others(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(type(model), "generate", fail)
    block = evaluate(model, tokenizer, {"limit": 4}, tmp_path)
    assert block["humaneval"] == {"skipped": "failed: MemoryError: no room"}
    assert block["hellaswag"]["n"] == block["mmlu"]["n"] == 4


def test_a_scoring_that_measures_nothing_leaves_earlier_results(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"limit": 4, "tasks": ["hellaswag"]}
    evaluate(model, tokenizer, config, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"results.json", "documents.jsonl.gz", "hellaswag.yaml"} <= {path.name for path in before}
    plain = type(model).forward

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(type(model), "forward", fail)
    block = evaluate(model, tokenizer, config | {"tasks": ["mmlu"]}, tmp_path)
    assert block["mmlu"] == {"skipped": "failed: MemoryError: no room"}
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert f"nothing was scored: {tmp_path / 'results.json'} stays as it was" in caplog.text
    monkeypatch.setattr(type(model), "forward", plain)
    evaluate(model, tokenizer, config | {"tasks": ["mmlu"]}, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["summary"]["mmlu"]["n"] == 4
    assert not (tmp_path / "tasks" / "hellaswag.yaml").exists()


@pytest.mark.skipif(not ISOLATED, reason=WHY)
def test_a_model_that_writes_the_solutions_gets_full_marks(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    answers = {item["prompt"]: item["canonical_solution"] for item in read_documents(MINI_DIR / "humaneval.jsonl")}
    monkeypatch.setattr(HFLM, "generate_until", lambda _, requests, **__: [answers[each.args[0]] for each in requests])
    entry = evaluate(model, tokenizer, {"tasks": ["humaneval"]}, tmp_path)["humaneval"]
    assert (entry["value"], entry["n"]) == (1.0, 40)


@pytest.mark.skipif(not ISOLATED, reason=WHY)
def test_drawn_programs_give_the_unbiased_pass_at_k(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of ten programs of the first problem are right, none of the others: 1 - C(7, 1) / C(10, 1), and 1."""
    from lm_eval.models.huggingface import HFLM

    first = next(iter(read_documents(MINI_DIR / "humaneval.jsonl")))

    def write(_: Any, requests: list[Any], **__: Any) -> list[str]:
        assert all(each.args[1]["do_sample"] and each.args[1]["temperature"] == 0.6 for each in requests)
        mine = iter([first["canonical_solution"]] * 3)
        return [next(mine, "    pass\n") if each.args[0] == first["prompt"] else "    pass\n" for each in requests]

    monkeypatch.setattr(HFLM, "generate_until", write)
    config = {"tasks": ["humaneval"], "limit": 4, "samples": 10, "temperature": 0.6, "cache": str(tmp_path / "kept")}
    entry = evaluate(model, tokenizer, config, tmp_path)["humaneval"]
    assert entry["value"] == pytest.approx(0.3 / 4)
    assert entry["pass@10"] == pytest.approx(1 / 4)
    assert entry["bits_per_byte"] > 0


def test_none_scores_nothing(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    block = evaluate(model, tokenizer, {"suite": "none"}, tmp_path / "evaluation")
    assert block["suite"] == "none"
    assert all("skipped" in block[task] for task in ("hellaswag", "mmlu", "humaneval"))
    assert not (tmp_path / "evaluation").exists()


def test_tokenizer_without_special_tokens_is_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(ConfigError, match="end-of-text"):
        evaluate(model, bare, {}, tmp_path)


def test_real_sets_with_a_limit(model: Any, tokenizer: Any, tmp_path: Path, shared_data: Path) -> None:
    config = {"suite": "full", "data_dir": str(shared_data / "eval"), "limit": 10, "tasks": ["hellaswag", "mmlu"]}
    block = evaluate(model, tokenizer, config, tmp_path)
    assert block["comparable"] is False
    assert block["hellaswag"]["n"] == block["mmlu"]["n"] == 10
    assert block["mmlu"]["stderr"] > 0
    assert block["mmlu"]["truncated"] == 10
    assert len(list((tmp_path / "tasks").glob("mmlu_*.yaml"))) == 10


@pytest.mark.parametrize(
    ("task", "changed", "why"),
    [
        ("hellaswag", {}, ""),
        ("mmlu", {}, ""),
        ("humaneval", {}, ""),
        ("hellaswag", {"suite": "mini"}, "suite mini"),
        ("hellaswag", {"n": 400}, "400 of 10042 documents"),
        ("mmlu", {"truncated": 3}, "3 of 14042 prompts cut to the context"),
        ("humaneval", {"tokens": 256}, "answers of 256 tokens, stock 1024"),
        ("humaneval", {"samples": 20}, "20 programs drawn at temperature 0.8, stock one greedy"),
    ],
)
def test_only_the_published_setting_is_comparable(task: str, changed: dict[str, Any], why: str) -> None:
    entry = {"n": suites.SOURCES[task].documents, "truncated": 0} | changed
    settings = suites.DEFAULTS | {"suite": "full"} | changed
    results = {"configs": {"humaneval": {"generation_kwargs": {"max_gen_toks": changed.get("tokens", 1024)}}}}
    assert score._why_not(task, entry, settings, results) == why


def test_whole_sets_with_cut_prompts_are_not_comparable(
    make_model: Any, tokenizer: Any, tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the sizes of the whole sets set to what is here, only the cut prompts and the answers' length are left."""
    sizes = {task: dataclasses.replace(suites.SOURCES[task], documents=10) for task in suites.SOURCES}
    monkeypatch.setattr(score, "SOURCES", sizes)
    config = {"suite": "full", "data_dir": str(shared_data / "eval"), "limit": 10, "max_gen_toks": 4}
    block = evaluate(make_model(context=512), tokenizer, config, tmp_path)
    assert block["hellaswag"]["comparable"] is True
    assert block["mmlu"]["why_not"] == f"{block['mmlu']['truncated']} of 10 prompts cut to the context"
    if ISOLATED:
        assert block["humaneval"]["why_not"] == "answers of 4 tokens, stock 1024"
    assert block["comparable"] is False
    block = evaluate(make_model(context=512), tokenizer, config | {"tasks": ["hellaswag"]}, tmp_path)
    assert block["comparable"] is True


def test_a_very_short_context_is_no_obstacle(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    block = evaluate(make_model(context=24), tokenizer, {"limit": 8}, tmp_path)
    assert block["hellaswag"]["truncated"] > 0
    assert block["mmlu"]["truncated"] == 8
    if ISOLATED:
        assert block["humaneval"]["truncated"] == 8
        assert "max_gen_toks: 12" in (tmp_path / "tasks" / "humaneval.yaml").read_text()


def test_a_given_context_length_serves_models_that_name_none(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    config, model = {"limit": 8, "tasks": ["hellaswag"]}, make_model()
    assert evaluate(model, tokenizer, config, tmp_path, context_length=8)["hellaswag"]["truncated"] == 0
    model.config.__dict__["max_position_embeddings"] = None  # its class would refuse
    assert evaluate(model, tokenizer, config, tmp_path, context_length=8)["hellaswag"]["truncated"] == 8
    with pytest.raises(ConfigError, match="context_length"):
        evaluate(model, tokenizer, config, tmp_path)


def test_long_scoring_says_where_it_is(
    model: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter, "LINE_EVERY_S", 0.0)
    caplog.set_level("INFO", "lightning_opt.evaluation")
    evaluate(model, tokenizer, {"limit": 8, "tasks": ["hellaswag"]}, tmp_path)
    assert "32 answers to weigh: 100 %, 0.0 s left" in caplog.text


@pytest.mark.skipif(not ISOLATED, reason=WHY)
def test_running_programs_says_where_it_is(
    model: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(meter, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(HFLM, "generate_until", lambda _, requests, **__: ["    pass\n"] * len(requests))
    ran, run = [], sandbox.Rooms.run
    monkeypatch.setattr(sandbox.Rooms, "run", lambda self, some, *told: ran.append(len(some)) or run(self, some, *told))
    caplog.set_level("INFO", "lightning_opt.evaluation")
    evaluate(model, tokenizer, {"limit": 3, "samples": 2, "tasks": ["humaneval"]}, tmp_path)
    told = [line for line in caplog.messages if "programs to run" in line]
    assert [line.split(" %, ")[0] for line in told] == [
        f"evaluation, 6 programs to run: {round(100 * done / 6)}" for done in range(1, 7)
    ]
    assert told[-1].endswith("100 %, 0.0 s left")
    assert ran == [6]  # all at once


def test_hub_that_does_not_answer_skips_with_the_reason(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    block = evaluate(model, tokenizer, {"suite": "full", "tasks": ["hellaswag", "mmlu"]}, tmp_path / "evaluation")
    assert "the hub does not answer" in block["hellaswag"]["skipped"]
    assert "cais/mmlu" in block["mmlu"]["skipped"]
    assert json.loads((tmp_path / "evaluation" / "results.json").read_text())["summary"] == block
