"""The `mini` suite: where its files come from. Written by us; deterministic, so a test makes them again and compares.

    python -m lightning_opt.evaluation.mini_sets lightning_opt/evaluation/mini

- `hellaswag_val.jsonl`: two sentences, the second to be finished: its true words against the same words shuffled (a
  model of minutes learns word order), and sums and counting with the right number against near ones.
- `mmlu_test.jsonl`, `mmlu_dev.jsonl`: questions with four lettered choices, five examples per subject; short, so that
  five examples and a question fit a context of 256 tokens. Gold letters are balanced.
- `humaneval.jsonl`: one-line functions with tests, in HumanEval's format.
"""

from __future__ import annotations

import ast
import json
import random
import sys
from pathlib import Path
from typing import Any

from lightning_opt.evaluation.mini_texts import FUNCTIONS, SENTENCES

_NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
]
_THINGS = ["cups", "books", "coins", "keys", "apples", "chairs", "stones", "letters"]


def build() -> dict[str, list[dict[str, Any]]]:
    """All documents, by file name."""
    rng = random.Random(20_240_601)
    stories = [*_shuffled_items(rng), *_number_items(rng)]
    questions = {"sums": _sums(rng), "counting": _counting(rng), "sequences": _sequences(rng)}
    return {
        "hellaswag_val.jsonl": [{"ind": index, **item} for index, item in enumerate(stories)],
        "mmlu_dev.jsonl": [item for items in questions.values() for item in items[:5]],
        "mmlu_test.jsonl": [item for items in questions.values() for item in items[5:]],
        "humaneval.jsonl": [_problem(index, *function) for index, function in enumerate(FUNCTIONS)],
    }


def write(folder: Path) -> None:
    """Writes the files of the suite."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in build().items():
        text = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
        (folder / name).write_text(text, encoding="utf-8")


def _story(label: str, first: str, second: str, right: str, wrong: list[str], gold: int) -> dict[str, Any]:
    endings = list(wrong)
    endings.insert(gold, right)
    parts = {"activity_label": label, "ctx_a": first, "ctx_b": second, "ctx": f"{first} {second}"}
    return {**parts, "endings": endings, "split": "val", "label": str(gold)}


def _shuffled_items(rng: random.Random) -> list[dict[str, Any]]:
    items = []
    for index, (label, first, second, right) in enumerate(SENTENCES):
        words = right.rstrip(".").split()
        wrong: list[str] = []
        while len(wrong) < 3:
            shuffled = " ".join(rng.sample(words, len(words))) + "."
            if shuffled != right and shuffled not in wrong:
                wrong.append(shuffled)
        items.append(_story(label, first, second, right, wrong, index % 4))
    return items


def _number_items(rng: random.Random) -> list[dict[str, Any]]:
    items = []
    for index, thing in enumerate(_THINGS):
        left, right = rng.randint(2, 6), rng.randint(2, 6)
        total = left + right
        endings = [f"there are {_NUMBERS[number]} {thing} on the table." for number in _near(rng, total, 0)]
        first = f"There are {_NUMBERS[left]} old {thing} and {_NUMBERS[right]} new {thing} on the table."
        items.append(_story("Sums", first, "together", endings[0], endings[1:], index % 4))
    for index in range(8):
        start = index + 1
        counted = ", ".join(_NUMBERS[start : start + 5])
        endings = [f"comes {_NUMBERS[number]}." for number in _near(rng, start + 5, 0)]
        items.append(_story("Counting", f"We count: {counted}.", "next", endings[0], endings[1:], (index + 2) % 4))
    return items


def _near(rng: random.Random, value: int, least: int) -> list[int]:
    """The value, then three others close to it."""
    others = [
        number for number in range(max(least, value - 4), value + 5) if number != value and number < len(_NUMBERS)
    ]
    return [value, *rng.sample(others, 3)]


def _question(subject: str, text: str, right: Any, wrong: list[Any], index: int) -> dict[str, Any]:
    choices = [str(choice) for choice in wrong]
    gold = index % 4
    choices.insert(gold, str(right))
    return {"question": text, "subject": subject, "choices": choices, "answer": gold}


def _numeric(rng: random.Random, subject: str, text: str, value: int, index: int) -> dict[str, Any]:
    others = [number for number in range(max(0, value - 5), value + 6) if number != value]
    return _question(subject, text, value, rng.sample(others, 3), index)


def _sums(rng: random.Random) -> list[dict[str, Any]]:
    pairs = [(left, right) for left in range(1, 10) for right in range(1, 10)]
    chosen = rng.sample(pairs, 25)
    return [
        _numeric(rng, "sums", f"{left} + {right} =", left + right, index) for index, (left, right) in enumerate(chosen)
    ]


def _counting(rng: random.Random) -> list[dict[str, Any]]:
    cases = [(letter, times) for letter in "abcdexyz" for times in range(1, 8)]
    chosen = rng.sample(cases, 25)
    return [
        _numeric(rng, "counting", f"How many letters: {' '.join(letter * times)}", times, index)
        for index, (letter, times) in enumerate(chosen)
    ]


def _sequences(rng: random.Random) -> list[dict[str, Any]]:
    cases = [(start, step) for start in range(1, 10) for step in range(1, 6)]
    return [
        _numeric(rng, "sequences", f"{start}, {start + step}, {start + 2 * step}, ?", start + 3 * step, index)
        for index, (start, step) in enumerate(rng.sample(cases, 25))
    ]


def _problem(index: int, signature: str, says: str, expression: str, cases: list[tuple[Any, ...]]) -> dict[str, Any]:
    name = signature.split("(")[0]
    parameters = [part.split(":")[0].strip() for part in signature[len(name) + 1 : -1].split(",")]
    run = eval(f"lambda {', '.join(parameters)}: {expression}")
    results = [run(*case) for case in cases]
    call = ", ".join(repr(value) for value in cases[0])
    prompt = f'def {signature}:\n    """{says}\n\n    >>> {name}({call})\n    {results[0]!r}\n    """\n'
    asserts = "".join(
        f"    assert candidate({', '.join(map(repr, case))}) == {result!r}\n"
        for case, result in zip(cases, results, strict=True)
    )
    document = {
        "task_id": f"mini/{index}",
        "prompt": prompt,
        "entry_point": name,
        "canonical_solution": f"    return {expression}\n",
        "test": f"\n\ndef check(candidate):\n{asserts}\n",
    }
    ast.parse(prompt + document["canonical_solution"] + document["test"])
    return document


if __name__ == "__main__":
    write(Path(sys.argv[1]))
