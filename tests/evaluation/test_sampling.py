"""The sample that is scored while training, against the whole scoring with the same documents."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_opt.evaluation import SampleScorer, check_samples, evaluate, sandbox
from lightning_opt.plan import ConfigError

ISOLATED, WHY = sandbox.available()


def scorer_for(tokenizer: Any, evaluation: dict[str, Any] | None = None, **options: Any) -> SampleScorer:
    scorer = SampleScorer(**options)
    scorer.evaluation, scorer.tokenizer, scorer.context_length = evaluation or {"suite": "mini"}, tokenizer, 256
    return scorer


@pytest.mark.skipif(not ISOLATED, reason=WHY)
def test_numbers_are_those_of_the_whole_scoring(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    scorer = scorer_for(tokenizer, documents=6)
    found = scorer(SimpleNamespace(model=model))
    whole = evaluate(model, tokenizer, {"suite": "mini", "limit": 6, "max_gen_toks": 2}, tmp_path)
    assert found["score/hellaswag/acc_norm"] == pytest.approx(whole["hellaswag"]["value"])
    assert found["score/mmlu/acc"] == pytest.approx(whole["mmlu"]["value"])
    for task in ("hellaswag", "mmlu", "humaneval"):
        assert found[f"score/{task}/bits_per_byte"] == pytest.approx(whole[task]["bits_per_byte"], rel=1e-6)
    assert set(found) == set(scorer.columns)


def test_again_and_with_other_weights(make_model: Any, tokenizer: Any) -> None:
    """The prompts are kept, the answers are not."""
    import torch

    model = make_model(seed=3)
    scorer = scorer_for(tokenizer, documents=4, tasks=["hellaswag"])
    module = SimpleNamespace(model=model)
    first = scorer(module)
    assert scorer(module) == first
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert scorer(module)["score/hellaswag/bits_per_byte"] != first["score/hellaswag/bits_per_byte"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(1.5)
    assert scorer(module) == pytest.approx(first, rel=1e-4)


def test_columns_are_known_before_anything_is_loaded(tokenizer: Any) -> None:
    scorer = scorer_for(tokenizer, tasks=["hellaswag", "humaneval"])
    names = ("score/hellaswag/acc_norm", "score/hellaswag/bits_per_byte", "score/humaneval/bits_per_byte")
    assert scorer.columns == names


@pytest.mark.parametrize(
    ("evaluation", "tasks", "said"),
    [
        ({"suite": "none"}, None, "evaluation.suite = none: must be mini or full"),
        (
            {"suite": "mini", "tasks": ["mmlu"]},
            ["hellaswag"],
            "tasks = hellaswag: must be some of evaluation.tasks: mmlu",
        ),
        ({"suite": "mini"}, ["mmmlu"], r"tasks = mmmlu: must be some of .*; did you mean mmlu\?"),
    ],
)
def test_what_cannot_be_sampled_is_refused(tokenizer: Any, evaluation: Any, tasks: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _ = scorer_for(tokenizer, evaluation, tasks=tasks).columns


@pytest.mark.parametrize("tasks", [["mmmlu"], "mmlu", ["study"]])
def test_what_cannot_be_sampled_is_refused_before_a_job_starts(tasks: Any) -> None:
    scorer = {"_target_": "lightning_opt.evaluation.SampleScorer", "documents": 32, "tasks": tasks}
    callbacks = {"memory": None, "scores": {"every_n_steps": None, "scorer": scorer}}
    with pytest.raises(ConfigError, match=r"^callbacks\.scores\.scorer\.tasks = "):
        check_samples({"suite": "mini"}, callbacks)
    callbacks["scores"]["every_n_steps"] = 0  # off
    check_samples({"suite": "mini"}, callbacks)


def test_a_sample_has_documents() -> None:
    with pytest.raises(ConfigError, match=r"sample_scores.scorer.documents = 0"):
        SampleScorer(documents=0)
