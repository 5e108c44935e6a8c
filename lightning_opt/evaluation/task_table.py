"""The tasks: which set on the hub, which split, which local file, and what lm-eval's own definition of it is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TaskSource:
    """Where the documents of a task come from, and what its score is.

    Attributes:
        hub: data set on the Hugging Face hub that lm-eval's own task names.
        config: its configuration on the hub; None where it has one only.
        files: split of lm-eval's task to local file name (`.gz` may be there or not).
        stock: lm-eval's own definition, below its folder of tasks.
        metric: what the summary shows, with lm-eval's filter: `acc_norm` where lm-eval has it.
        documents: size of the whole real set; a score of fewer documents stands beside no published one.
        shots: examples in the prompt.
        instead: another split, with its file, that is taken where the first is not there; not comparable then.
    """

    hub: str
    config: str | None
    files: Mapping[str, str]
    stock: str
    metric: str
    documents: int
    shots: int = 0
    instead: Mapping[str, str] = field(default_factory=dict)


TASKS = ("hellaswag", "mmlu", "humaneval")
"""What a run is scored by when nothing else is asked, and all that the `mini` suite has."""

SOURCES: dict[str, TaskSource] = {
    "hellaswag": TaskSource(
        "Rowan/hellaswag",
        None,
        {"validation": "hellaswag_val.jsonl"},
        "hellaswag/hellaswag.yaml",
        "acc_norm,none",
        10_042,
    ),
    "mmlu": TaskSource(
        "cais/mmlu",
        "all",
        {"test": "mmlu_test.jsonl", "dev": "mmlu_dev.jsonl"},
        "mmlu/default",
        "acc,none",
        14_042,
        shots=5,
    ),
    "humaneval": TaskSource(
        "openai/openai_humaneval",
        None,
        {"test": "humaneval.jsonl.gz"},
        "humaneval/humaneval.yaml",
        "pass@1,create_test",
        164,
    ),
    "lambada_openai": TaskSource(
        "EleutherAI/lambada_openai",
        "default",
        {"test": "lambada_openai.jsonl"},
        "lambada/lambada_openai.yaml",
        "acc,none",
        5_153,
    ),
    "openbookqa": TaskSource(
        "allenai/openbookqa",
        "main",
        {"test": "openbookqa_test.jsonl"},
        "openbookqa/openbookqa.yaml",
        "acc_norm,none",
        500,
        instead={"validation": "openbookqa_val.jsonl"},
    ),
    "winogrande": TaskSource(
        "allenai/winogrande",
        "winogrande_xl",
        {"validation": "winogrande_val.jsonl"},
        "winogrande/default.yaml",
        "acc,none",
        1_267,
    ),
    "piqa": TaskSource("baber/piqa", None, {"validation": "piqa_val.jsonl"}, "piqa/piqa.yaml", "acc_norm,none", 1_838),
    "boolq": TaskSource(
        "aps/super_glue",
        "boolq",
        {"validation": "boolq_val.jsonl"},
        "super_glue/boolq/default.yaml",
        "acc,none",
        3_270,
    ),
    "wsc273": TaskSource(
        "lighteval/winograd_wsc",
        "wsc273",
        {"test": "winograd_wsc273.jsonl"},
        "wsc273/default.yaml",
        "acc,none",
        273,
    ),
    "arc_easy": TaskSource(
        "allenai/ai2_arc",
        "ARC-Easy",
        {"test": "arc_easy_test.jsonl"},
        "arc/arc_easy.yaml",
        "acc_norm,none",
        2_376,
        instead={"validation": "arc_easy_val.jsonl"},
    ),
    "arc_challenge": TaskSource(
        "allenai/ai2_arc",
        "ARC-Challenge",
        {"test": "arc_challenge_test.jsonl"},
        "arc/arc_challenge.yaml",
        "acc_norm,none",
        1_172,
        instead={"validation": "arc_challenge_val.jsonl"},
    ),
    "copa": TaskSource(
        "aps/super_glue",
        "copa",
        {"validation": "copa_val.jsonl"},
        "super_glue/copa/default.yaml",
        "acc,none",
        100,
    ),
}

STUDY = (
    "lambada_openai",
    "openbookqa",
    "winogrande",
    "piqa",
    "boolq",
    "wsc273",
    "hellaswag",
    "arc_easy",
    "arc_challenge",
    "copa",
)
"""The ten sets of "Fantastic Pretraining Optimizers and Where to Find Them", arXiv 2509.02046."""

WORDS: dict[str, tuple[str, ...]] = {
    "study": STUDY,
    "all": ("mmlu", "humaneval", *STUDY),
    "lambada": ("lambada_openai",),
}
"""Words that stand for tasks wherever tasks are named."""
