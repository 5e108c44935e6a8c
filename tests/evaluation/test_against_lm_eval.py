"""Our path against lm-eval's own `hf` model on the exported checkpoint, document by document."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_opt.evaluation import evaluate, sandbox
from lightning_opt.evaluation.quiet import quiet
from lightning_opt.evaluation.task_table import STUDY

ISOLATED, WHY = sandbox.available()
WITHIN, APART = 1e-3, 2e-3


def theirs(checkpoint: Path, folder: Path, tasks: list[str], length: int) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's samples by task: its `hf` model loads the checkpoint, nothing of ours but the task files runs."""
    with quiet():
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager

        return simple_evaluate(
            model="hf",
            model_args={"pretrained": str(checkpoint), "dtype": "float32", "max_length": length},
            tasks=tasks,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            batch_size=4,
            device="cpu",
            bootstrap_iters=0,
            confirm_run_unsafe_code=True,
        )["samples"]


def ours(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Our records by task."""
    found: dict[str, list[dict[str, Any]]] = {}
    with gzip.open(folder / "documents.jsonl.gz", "rt", encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            found.setdefault(record["task"], []).append(record)
    return found


def compare(records: dict[str, list[dict[str, Any]]], samples: dict[str, list[dict[str, Any]]]) -> int:
    """Asserts that both say the same of every document; the number of documents with choices."""
    assert records.keys() == samples.keys()
    weighed = 0
    for name, found in samples.items():
        for record, sample in zip(records[name], found, strict=True):
            assert (record["doc"], record["hash"]) == (sample["doc_id"], sample["doc_hash"][:16])
            if "programs" in record:
                assert record["programs"] == sample["resps"][0]
                assert record["pass@1"] == sample["pass@1"]
                continue
            values = [float(answer[0][0]) for answer in sample["resps"]]
            np.testing.assert_allclose(record["loglikelihoods"], values, atol=WITHIN, rtol=0)
            weighed += 1
            best = sorted(values)[-2:]
            if len(best) == 1 or best[1] - best[0] > APART:
                assert record["acc"] == sample["acc"]
    return weighed


@pytest.mark.parametrize("batch_size", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_a_few_of_each_set(
    batch_size: int, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, shared_data: Path
) -> None:
    """At a context of 1024 some MMLU prompts are cut and some share their examples; both must come out the same."""
    model, tasks = make_model(context=1024), ["hellaswag", "mmlu", "winogrande", "lambada_openai"]
    tasks += ["humaneval"] if ISOLATED else []
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = {"suite": "full", "data_dir": str(shared_data / "eval"), "limit": 8, "tasks": tasks, "max_gen_toks": 8}
    evaluate(model, tokenizer, config | {"batch_size": batch_size}, tmp_path / "out")
    samples = theirs(tmp_path / "model", tmp_path / "out" / "tasks", tasks, 1024)
    assert compare(ours(tmp_path / "out"), samples) == 32


def test_a_shared_prompt_changes_nothing(make_model: Callable[..., Any], tokenizer: Any) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from lightning_opt.evaluation.adapter import CountingLM

    model = make_model(context=1024)
    examples = " ".join(f"question {n}: {n} + {n} = {2 * n}." for n in range(40))
    pairs = [(f"{examples} question: {n} + 1 =", f" {last}") for n in range(12) for last in ("A", "B", "seven or so")]
    requests = [Instance("loglikelihood", {}, pair, 0, ("task", place, 1)) for place, pair in enumerate(pairs)]
    with quiet():
        lm = CountingLM(model, tokenizer, batch_size=4, max_length=1024)
        once: list[int] = []
        keep = lm._cache
        lm._cache = lambda prefix: once.append(len(prefix)) or keep(prefix)
        answers = lm.loglikelihood(requests)
        stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=1024).loglikelihood(requests)
    assert len(once) == 1
    assert once[0] > 200
    np.testing.assert_allclose([value for value, _ in answers], [value for value, _ in stock], atol=WITHIN, rtol=0)
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in stock]


def test_a_batch_that_does_not_fit_goes_in_halves(model: Any, tokenizer: Any) -> None:
    import torch
    from lm_eval.api.instance import Instance

    from lightning_opt.evaluation.adapter import CountingLM

    pairs = [(f"{n} + {n} =", f" {last}") for n in range(9) for last in ("one", "seven or so")]
    requests = [Instance("loglikelihood", {}, pair, 0, ("task", place, 1)) for place, pair in enumerate(pairs)]
    with quiet():
        lm = CountingLM(model, tokenizer, batch_size=8, max_length=256)
    whole, rows = lm.loglikelihood(requests), []

    def refuse(_: Any, arguments: tuple[Any, ...]) -> None:
        rows.append(len(arguments[0]))
        if rows[-1] > 3:
            raise torch.OutOfMemoryError

    hook = model.register_forward_pre_hook(refuse)
    try:
        parts = lm.loglikelihood(requests)
    finally:
        hook.remove()
    assert max(rows) > 3
    np.testing.assert_allclose([value for value, _ in parts], [value for value, _ in whole], atol=1e-4)


@pytest.mark.parametrize("start", [None, "added", "forced"])
def test_texts_encoded_in_bulk_are_lm_evals(start: str | None, model: Any, tokenizer: Any) -> None:
    """Also where the tokenizer begins every text with a special token, and where a text has it already."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers.processors import TemplateProcessing

    from lightning_opt.evaluation.adapter import CountingLM

    mine = copy.deepcopy(tokenizer)
    if start:
        token = ("<|end|>", mine.convert_tokens_to_ids("<|end|>"))
        mine._tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[token])
        mine.bos_token = "<|end|>"
    texts = [
        ("a question", " answer"),
        ("blank at the end \n", "x"),
        ("<|end|>told", " so"),
        ("tab\t", "\tb"),
        ("é", "ß"),
    ]
    with quiet():
        lm = CountingLM(model, mine, batch_size=1, max_length=64)
        stock = HFLM(pretrained=model, tokenizer=copy.deepcopy(mine), batch_size=1, max_length=64)
    if start == "forced":
        lm.add_bos_token = stock.add_bos_token = True
    assert list(lm._pairs(texts)) == [stock._encode_pair(*pair) for pair in texts]
    assert (lm._pairs(texts[:1]).__next__()[0][0] == mine.bos_token_id) == bool(start)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "glm"])
def test_other_families(family: str, tokenizer: Any) -> None:
    """Learned positions; a sliding window, whose cache is not taken over; experts."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, GPT2Config, GPT2LMHeadModel, MistralConfig
    from transformers.models.mistral import MistralForCausalLM

    from lightning_opt.evaluation.adapter import CountingLM

    torch.manual_seed(0)
    small = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 512}
    if family == "gpt2":
        shape = {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**small, sliding_window=64, initializer_range=0.2))
    else:
        experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
        model = Glm4MoeForCausalLM(Glm4MoeConfig(**small, **experts, first_k_dense_replace=1, initializer_range=0.2))
    examples = " ".join(f"{n} + {n} = {2 * n}." for n in range(30))
    pairs = [(f"{examples} {n} + 1 =", f" {last}") for n in range(9) for last in ("A", "seven or so")]
    requests = [Instance("loglikelihood", {}, pair, 0, ("task", place, 1)) for place, pair in enumerate(pairs)]
    with quiet():
        answers = CountingLM(model, tokenizer, batch_size=8, max_length=512).loglikelihood(requests)
        stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=512).loglikelihood(requests)
    np.testing.assert_allclose([value for value, _ in answers], [value for value, _ in stock], atol=WITHIN, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("context", [512, 2048])
def test_whole_samples(
    context: int, make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path, shared_data: Path
) -> None:
    model = make_model(context=context)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tasks = ["mmlu", *STUDY, *(["humaneval"] if ISOLATED else [])]
    config = {"suite": "full", "data_dir": str(shared_data / "eval"), "limit": 100, "max_gen_toks": 16, "tasks": tasks}
    evaluate(model, tokenizer, config | {"batch_size": 4}, tmp_path / "out")
    samples = theirs(tmp_path / "model", tmp_path / "out" / "tasks", tasks, context)
    assert compare(ours(tmp_path / "out"), samples) > 800
