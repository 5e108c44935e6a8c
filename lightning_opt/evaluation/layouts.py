"""Documents in other layouts than the hub's, brought to the columns that lm-eval's own task definitions read.

Known beside the hub's own: the JSON lines of MosaicML's llm-foundry (`scripts/eval/local_data`, commit 8c8dd48) for
LAMBADA, WSC273 and ARC, and BoolQ with its native true or false.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

Document = dict[str, Any]


def as_on_hub(task: str, document: Document) -> Document:
    """The document with the hub's columns; one that has them already comes back as it is.

    Args:
        task: a name of `task_table.SOURCES`.
        document: one line of the task's file.
    """
    known = _LAYOUTS.get(task)
    return known(document) if known else document


def _lambada(document: Document) -> Document:
    if "text" in document or "continuation" not in document:
        return document
    # lm-eval asks for the last word after the last blank, so one blank stands between the two.
    return {"text": f"{document['context'].rstrip(' ')} {document['continuation'].lstrip(' ')}"}


def _boolq(document: Document) -> Document:
    return document if "label" in document else {**document, "label": int(document["answer"])}


def _arc(document: Document) -> Document:
    if "query" not in document:
        return document
    letters = [chr(ord("A") + index) for index in range(len(document["choices"]))]
    return {
        "question": document["query"].removeprefix("Question: "),
        "choices": {"text": document["choices"], "label": letters},
        "answerKey": letters[document["gold"]],
    }


def _wsc273(document: Document) -> Document:
    if "context_options" not in document:
        return document
    contexts = document["context_options"]
    # Cut at a blank, and before the last word of the shorter: "his" and "his father" leave something of both.
    start = os.path.commonprefix(contexts).rstrip().rfind(" ") + 1  # noqa: RUF071
    pronoun = "they"  # lm-eval looks at it only to add a possessive, which these options have
    return {
        "text": f"{contexts[0][:start]}{pronoun} {document['continuation'].lstrip()}",
        "pronoun": pronoun,
        "pronoun_loc": start,
        "options": [context[start:] for context in contexts],
        "label": document["gold"],
    }


_LAYOUTS: dict[str, Callable[[Document], Document]] = {
    "lambada_openai": _lambada,
    "boolq": _boolq,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "wsc273": _wsc273,
}
