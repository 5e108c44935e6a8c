"""Writes lm-eval task files: lm-eval's own definitions, with only the source of the documents (and how many)
redirected.

A file written here includes the stock one by its absolute path in the installed lm-eval, and names `load_documents`
as its data set. The same files therefore give the same numbers in memory and by lm-eval's own command line::

    lm-eval run --model hf --model_args pretrained=MODEL --include_path DIR --tasks hellaswag,mmlu,humaneval \
        --confirm_run_unsafe_code

`limit` is part of the files (`take`), not of the call: lm-eval's own limit counts per subject, so 50 would mean 57 x 50
documents of MMLU; here it is 50 in all, spread evenly over the subjects (see `suites.spread`).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_opt.evaluation.layouts import as_on_hub
from lightning_opt.evaluation.mmlu_subjects import TEST_DOCUMENTS
from lightning_opt.evaluation.suites import (
    data_folder,
    local_files,
    max_gen_toks,
    missing_splits,
    read_documents,
    spread,
)
from lightning_opt.evaluation.task_table import SOURCES
from lightning_opt.plan import ConfigError

_LOADER = "!function lightning_opt.evaluation.offline.load_documents"
_HERE = "!function lightning_opt.evaluation.humaneval."
_TOP_P = 0.95  # arXiv 2107.03374, section 3.2


def stock_tasks() -> Path:
    """Folder of lm-eval's own task files."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "evaluation", "lm_eval", "must be installed: pip install 'lightning_opt[run]' (or evaluation=none)"
        )
    return Path(spec.origin).parent / "tasks"


@functools.lru_cache(maxsize=8)
def _documents(path: str, _changed_ns: int) -> tuple[dict[str, Any], ...]:
    return tuple(read_documents(Path(path)))


def documents_of(path: Path) -> tuple[dict[str, Any], ...]:
    """All documents of a file, read once."""
    return _documents(str(path), path.stat().st_mtime_ns)


def load_documents(
    files: dict[str, str] | None = None,
    hub: list[str | None] | None = None,
    task: str = "",
    subject: str | None = None,
    take: dict[str, int] | None = None,
    **_: Any,
) -> dict[str, Any]:
    """The data set of a task file, as lm-eval's `custom_dataset` wants it.

    Args:
        files: split to local .jsonl or .jsonl.gz file.
        hub: instead of files, a data set's name on the hub and its configuration.
        task: the task, whose documents may come in another layout than the hub's (see `layouts`).
        subject: keep only documents with this `subject`.
        take: split to how many of its first documents are kept.

    Returns:
        Split to `datasets.Dataset`.
    """
    import datasets

    if hub is not None:
        found = datasets.load_dataset(*hub)
        return {
            split: data.select(range(min(len(data), (take or {}).get(split, len(data)))))
            for split, data in found.items()
        }
    splits = {}
    for split, name in (files or {}).items():
        kept = [item for item in documents_of(Path(name)) if subject is None or item["subject"] == subject]
        kept = [as_on_hub(task, item) for item in kept[: (take or {}).get(split)]]
        splits[split] = datasets.Dataset.from_list(kept)
    return splits


def write_tasks(
    folder: Path,
    *,
    suite: str,
    tasks: list[str],
    context_length: int,
    limit: int | None = None,
    data_dir: str | None = None,
    max_new_tokens: int | None = None,
    samples: int = 1,
    temperature: float = 0.8,
    sandbox_seconds: float = 5.0,
) -> None:
    """Writes one task file per task and subject, and MMLU's groups, into `folder`.

    Args:
        folder: made when it is not there.
        suite: `mini` or `full`.
        tasks: names of `task_table.SOURCES`.
        context_length: the model's, in tokens; bounds what HumanEval may generate.
        limit: documents per task.
        data_dir: folder of the real sets' files; None with `full` means the hub.
        max_new_tokens: tokens per HumanEval problem, None for the suite's default.
        samples: programs per HumanEval problem; 1 is greedy, more are drawn.
        temperature: of the draws, from the smallest set of tokens that holds 0.95 of the probability.
        sandbox_seconds: time limit of a generated program.

    Raises:
        ConfigError: a data file has no documents, or lm-eval is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = data_folder(suite, data_dir)
    for task in tasks:
        if task == "mmlu":
            _write_mmlu(folder, source, limit)
        elif task == "humaneval":
            length = max_gen_toks(suite, max_new_tokens, context_length)
            body = _humaneval(length, samples, temperature, sandbox_seconds)
            _write(folder / "humaneval.yaml", [*body, *_redirected(task, source, limit)])
        else:
            body = [f"include: {stock_tasks() / SOURCES[task].stock}", f"task: {task}"]
            _write(folder / f"{task}.yaml", [*body, *_redirected(task, source, limit)])


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("# Written by lightning_opt; the definition is lm-eval's own.\n" + "\n".join(lines) + "\n", "utf-8")


def _local_files(task: str, source: Path) -> dict[str, str]:
    lacking = [SOURCES[task].files[split] for split in missing_splits(source, task)]
    if lacking:
        raise ConfigError("evaluation.data_dir", str(source), f"must hold {', '.join(lacking)}")
    found = local_files(source, task)
    for path in found.values():
        if not documents_of(path):
            raise ConfigError("evaluation.data_dir", str(path), "must hold documents, it is empty")
    return {split: str(path) for split, path in found.items()}


def _data_lines(kwargs: dict[str, Any]) -> list[str]:
    """Lines that redirect the data; JSON is YAML."""
    return [f"custom_dataset: {_LOADER}", f"dataset_kwargs: {json.dumps(kwargs)}"]


def _redirected(task: str, source: Path | None, limit: int | None) -> list[str]:
    """Lines that make a task read local files, or only so many documents of the hub's."""
    known = SOURCES[task]
    files = None if source is None else _local_files(task, source)
    take = {} if limit is None else {"take": {next(iter(files or known.files)): limit}}
    if files is None:
        return _data_lines({"hub": [known.hub, known.config], **take}) if take else []
    absent = [split for split in ("training", "validation", "test") if split not in files]
    lines = [f"{split}_split: null" for split in absent] + [f"{split}_split: {split}" for split in files]
    return [*lines, *_data_lines({"task": task, "files": files, **take})]


def _humaneval(length: int, samples: int, temperature: float, seconds: float) -> list[str]:
    # Including the stock file would import its utils.py, which calls evaluate.load (needs the hub, isolates nothing):
    # its text is taken, with our functions in place of those two.
    text = (stock_tasks() / SOURCES["humaneval"].stock).read_text("utf-8")
    draws = [k for k in (1, 10, 100) if k <= samples]
    changes = [
        (r"!function utils\.pass_at_k", f"{_HERE}pass_at_k"),
        (r"!function utils\.build_predictions", f"{_HERE}build_predictions"),
        (r"max_gen_toks: \d+", f"max_gen_toks: {length}"),
        (r"^(\s+)k: \[1\]$", rf"\1k: {draws}\n\1seconds: {float(seconds)}"),
    ]
    if samples > 1:
        drawn = f"do_sample: true\n  temperature: {float(temperature)}\n  top_p: {_TOP_P}"
        changes += [(r"do_sample: false", drawn), (r"^repeats: 1$", f"repeats: {samples}")]
    for old, new in changes:
        text, times = re.subn(old, new, text, flags=re.MULTILINE)
        if times != 1:
            raise RuntimeError(
                f"lm-eval's humaneval.yaml has {times} lines like {old!r}: this version of lm-eval is not supported"
            )
    return text.splitlines()


def _write_mmlu(folder: Path, source: Path | None, limit: int | None) -> None:
    stock = stock_tasks() / "mmlu" / "default"
    subjects = {path.stem.removeprefix("mmlu_"): path for path in sorted(stock.glob("mmlu_*.yaml"))}
    files = None if source is None else _local_files("mmlu", source)
    if files is None:
        taken = dict.fromkeys(subjects, None) if limit is None else spread(TEST_DOCUMENTS, limit)
    else:
        sizes = Counter(item["subject"] for item in documents_of(Path(files["test"])))
        taken = spread(sizes, limit)
        _check_shots(Path(files["dev"]), taken)
    groups: dict[str, list[str]] = {}
    for subject, count in taken.items():
        kwargs: dict[str, Any] = {} if count is None else {"take": {"test": count}}
        if files is not None:
            kwargs |= {"files": files, "subject": subject}
        elif kwargs:
            kwargs["hub"] = [SOURCES["mmlu"].hub, subject]
        lines = _subject_head(subject, subjects.get(subject), stock)
        # The stock group hands 5 shots nowhere: the paper's setting (arXiv 2009.03300) is the caller's duty.
        lines += [f"num_fewshot: {SOURCES['mmlu'].shots}", *(_data_lines(kwargs) if kwargs else [])]
        _write(folder / f"mmlu_{subject}.yaml", lines)
        groups.setdefault(_category(subjects.get(subject)), []).append(f"mmlu_{subject}")
    _write_groups(folder, groups)


def _check_shots(dev: Path, subjects: Iterable[str]) -> None:
    shots = Counter(item["subject"] for item in documents_of(dev))
    for subject in subjects:
        if shots[subject] < SOURCES["mmlu"].shots:
            expected = f"must hold {SOURCES['mmlu'].shots} examples of every subject; {subject} has {shots[subject]}"
            raise ConfigError("evaluation.data_dir", str(dev), expected)


def _subject_head(subject: str, stock_file: Path | None, stock: Path) -> list[str]:
    if stock_file is not None:
        return [f"include: {stock_file}", f"task: mmlu_{subject}"]
    words = subject.replace("_", " ")
    described = f"The following are multiple choice questions (with answers) about {words}.\n\n"
    return [
        f"include: {stock / '_default_template_yaml'}",
        f"task: mmlu_{subject}",
        f"task_alias: {subject}",
        f"description: {json.dumps(described)}",
    ]


def _category(stock_file: Path | None) -> str:
    """lm-eval's group of a subject (its `tag: mmlu_stem_tasks`), or `other` for subjects that lm-eval does not know."""
    if stock_file is None:
        return "other"
    tag = next(line for line in stock_file.read_text("utf-8").splitlines() if line.startswith(('"tag"', "tag")))
    return tag.split("mmlu_")[1].split("_tasks")[0]


def _write_groups(folder: Path, groups: dict[str, list[str]]) -> None:
    """lm-eval's groups, naming only subjects that have documents (the stock files fail on an empty tag)."""
    aggregate = ["aggregate_metric_list:", "  - metric: acc", "    weight_by_size: true", "metadata:", "  version: 2"]
    for category, members in sorted(groups.items()):
        body = [
            f"group: mmlu_{category}",
            f"group_alias: {category.replace('_', ' ')}",
            f"task: {json.dumps(sorted(members))}",
        ]
        _write(folder / f"_mmlu_{category}.yaml", body + aggregate)
    members = [f"mmlu_{category}" for category in sorted(groups)]
    _write(folder / "_mmlu.yaml", ["group: mmlu", f"task: {json.dumps(members)}", *aggregate])
