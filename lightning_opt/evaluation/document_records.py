"""What a scoring says of each document, and the numbers that follow: bits per byte, chance, the most frequent answer.

Bits per byte of the gold answer: minus the base-2 logarithm of the probability that the model gives to the gold
continuation after its prompt (all tokens that lm-eval scores, the blank before it included), divided by the length of
that continuation in UTF-8 bytes without the blanks it starts with; a task's value is the mean over its documents.
This is `bpb` without the leading space of OLMo's in-loop evaluations (allenai/OLMo-in-loop-evals, `metrics.py`). For
questions answered by a letter it is the bits of that letter; for HumanEval the gold answer is the set's own solution.
It moves long before accuracy does in small models (arXiv 2412.04403).
"""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Record = dict[str, Any]


def bits_per_byte(loglikelihood: float, continuation: str) -> float:
    """Bits per UTF-8 byte.

    Args:
        loglikelihood: natural logarithm of the continuation's probability.
        continuation: the text, blanks at its start included.
    """
    return -loglikelihood / math.log(2) / max(1, len(continuation.lstrip().encode("utf-8")))


def records(tasks: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Record]:
    """One record for each document of a scoring, in order.

    Args:
        tasks: lm-eval's task objects by name.
        samples: lm-eval's logged samples by task name.

    Returns:
        `task`, `doc` (its number), `hash` (of its content), the metrics of its task, and for log-likelihoods
        `loglikelihoods`, `gold` (its place; None where the answer is no choice) and `bits_per_byte`; for programs
        their text.
    """
    return [_record(tasks[name], name, sample) for name, found in samples.items() for sample in found]


def _record(task: Any, name: str, sample: Mapping[str, Any]) -> Record:
    metrics = {key: float(sample[key]) for key in sample["metrics"] if isinstance(sample[key], int | float)}
    record: Record = {"task": name, "doc": sample["doc_id"], "hash": sample["doc_hash"][:16], **metrics}
    if task.OUTPUT_TYPE == "generate_until":
        identity = sample["doc"].get("task_id")
        return record | {"id": identity, "programs": sample["resps"][0]}
    values = [float(answer[0][0]) for answer in sample["resps"]]
    gold = _gold(task, sample["doc"]) if len(values) > 1 else 0
    if gold is not None and not 0 <= gold < len(values):
        gold = None
    record |= {"loglikelihoods": values, "gold": gold if len(values) > 1 else None}
    if gold is not None:
        record["bits_per_byte"] = bits_per_byte(values[gold], sample["arguments"][gold][1])
    return record


def _gold(task: Any, document: Any) -> int | None:
    """Place of the right choice, as lm-eval's own scoring finds it."""
    gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    if isinstance(gold, str):
        choices = task.doc_to_choice(document)
        gold = choices.index(gold) if gold in choices else None
    return gold if isinstance(gold, int) else None


def described(found: Iterable[Record]) -> dict[str, Any]:
    """What the records of a task say beside its score.

    Returns:
        `chance` (uniform guessing), `majority` (always the most frequent place of the gold answer; only of choices),
        `bits_per_byte` and `bits_per_byte_stderr`, `tied` (documents whose choices all got the same likelihood).
    """
    found = list(found)
    chosen = [record for record in found if len(record.get("loglikelihoods", ())) > 1]
    golds = Counter(record["gold"] for record in chosen)
    bits = [record["bits_per_byte"] for record in found if record.get("bits_per_byte") is not None]
    return {
        "chance": fmean(1 / len(record["loglikelihoods"]) for record in chosen) if chosen else 0.0,
        "majority": max(golds.values()) / len(chosen) if chosen else None,
        "bits_per_byte": fmean(bits) if bits else None,
        "bits_per_byte_stderr": stdev(bits) / math.sqrt(len(bits)) if len(bits) > 1 else None,
        "tied": sum(min(record["loglikelihoods"]) == max(record["loglikelihoods"]) for record in chosen),
    }


def shares(found: Sequence[Record], metric: str) -> dict[str, Any]:
    """Mean of a metric over documents with its standard error, and what `described` says of them."""
    values = [record[metric] for record in found]
    about = {key: value for key, value in described(found).items() if key != "tied"}
    stderr = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"value": fmean(values), "stderr": stderr, "n": len(values), **about}


def write(path: Path, found: Iterable[Record]) -> None:
    """Writes records as compressed JSON lines; the same records give the same bytes."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in found)
    path.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))
