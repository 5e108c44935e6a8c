"""Other layouts give lm-eval's own definitions what the hub's would; on the real samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_opt.evaluation.layouts import as_on_hub
from lightning_opt.evaluation.offline import write_tasks
from lightning_opt.evaluation.suites import local_files, read_documents
from lightning_opt.evaluation.task_table import SOURCES, STUDY


@pytest.fixture(scope="module")
def tasks(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """lm-eval's task objects for the study's ten, on the files here."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, suite="full", tasks=list(STUDY), context_length=512, data_dir=str(shared_data / "eval"))
    return TaskManager(include_path=str(folder), include_defaults=False).load(list(STUDY))["tasks"]


def requests(task: Any) -> list[list[tuple[str, str]]]:
    """Prompt and continuation of every choice, by document."""
    task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    found: dict[int, list[tuple[str, str]]] = {}
    for one in task.instances:
        found.setdefault(one.doc_id, []).append(one.args)
    return [found[document] for document in sorted(found)]


def test_all_ten_load_with_a_right_answer_among_their_choices(tasks: dict[str, Any], shared_data: Path) -> None:
    from lightning_opt.evaluation.document_records import _gold

    for name in STUDY:
        task = tasks[name]
        paths = local_files(shared_data / "eval", name)
        first = next(iter(paths.values()))
        assert len(task.eval_docs) == sum(1 for _ in read_documents(first)), name
        if name != "lambada_openai":
            assert all(_gold(task, document) in range(len(task.doc_to_choice(document))) for document in task.eval_docs)


def test_wsc_asks_for_the_sentences_of_the_file(tasks: dict[str, Any], shared_data: Path) -> None:
    documents = list(read_documents(shared_data / "eval" / "winograd_wsc273.jsonl"))
    for document, asked in zip(documents, requests(tasks["wsc273"]), strict=True):
        assert [prompt for prompt, _ in asked] == document["context_options"]
        assert {last.strip() for _, last in asked} == {document["continuation"].strip()}


def test_lambada_asks_for_the_last_word(tasks: dict[str, Any], shared_data: Path) -> None:
    documents = list(read_documents(shared_data / "eval" / "lambada_openai.jsonl"))
    for document, [(prompt, last)] in zip(documents, requests(tasks["lambada_openai"]), strict=True):
        assert (prompt, last) == (document["context"], f" {document['continuation']}")


def test_arc_and_boolq_keep_question_choices_and_answer(tasks: dict[str, Any], shared_data: Path) -> None:
    for name in ("arc_easy", "arc_challenge"):
        documents = list(read_documents(shared_data / "eval" / f"{name}_test.jsonl"))
        for document, asked in zip(documents, requests(tasks[name]), strict=True):
            assert asked == [(f"{document['query']}\nAnswer:", f" {choice}") for choice in document["choices"]]
    documents = read_documents(shared_data / "eval" / "boolq_val.jsonl")
    for document, judged in zip(documents, tasks["boolq"].eval_docs, strict=True):
        assert tasks["boolq"].doc_to_target(judged) == int(document["answer"])


def test_the_hubs_own_columns_stay_as_they_are() -> None:
    hub = {
        "lambada_openai": {"text": "a b c"},
        "boolq": {"question": "q", "passage": "p", "idx": 0, "label": 1},
        "arc_easy": {"id": "x", "question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"},
        "wsc273": {"text": "t", "pronoun": "it", "pronoun_loc": 0, "options": ["a", "b"], "label": 0},
        "piqa": {"goal": "g", "sol1": "a", "sol2": "b", "label": 0},
    }
    assert all(as_on_hub(task, document) is document for task, document in hub.items())
    assert set(STUDY) <= set(SOURCES)
