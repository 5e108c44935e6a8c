"""The suites, their tasks and their files; checks of `config["evaluation"]` that need neither torch nor lm_eval.

`mini`: our own small sets, package data, so that every run exercises the whole path. Not comparable with any
published number. `full`: the real sets, from local files (`data_dir`) or from the hub. `none`: no evaluation.
"""

from __future__ import annotations

import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_opt.evaluation.freezing import check_frozen
from lightning_opt.evaluation.mmlu_subjects import TEST_DOCUMENTS
from lightning_opt.evaluation.task_table import SOURCES, TASKS, WORDS
from lightning_opt.plan import ConfigError, check_value, closest, one_of
from lightning_opt.run_folder import NoJson, read_json_lines

SUITES = ("mini", "full", "none")
ENGINES = ("hf", "vllm")
_HUB_SECONDS = 5.0
MINI_DIR = Path(__file__).resolve().parent / "mini"

# Options of config["evaluation"] and what holds when they are left out.
DEFAULTS: dict[str, Any] = {
    "suite": "mini",
    "tasks": list(TASKS),
    "limit": None,
    "data_dir": None,
    "batch_size": 16,
    "max_gen_toks": None,
    "samples": 1,
    "temperature": 0.8,
    "sandbox_seconds": 5.0,
    "engine": "hf",
    "engine_args": {},
    "cache": None,
}

# A model of minutes never writes a stop string, so every problem runs to the end: the stock 1024 tokens would be hours.
STOCK_MAX_GEN_TOKS = 1024
_MAX_GEN_TOKS = {"mini": 64, "full": 256}


def check(config: Mapping[str, Any]) -> None:
    """Refuses a `config["evaluation"]` that could not run, before anything heavy is imported.

    Raises:
        ConfigError: unknown suite, task or option, a bad number, a data folder or file that is not there, or the hub's
            sets wanted while the hub is switched off and nothing is cached.
    """
    resolve(config)


def check_samples(config: Mapping[str, Any], callbacks: Mapping[str, Any]) -> None:
    """Refuses scores while training of tasks that the evaluation does not have.

    Args:
        config: `config["evaluation"]`, checked.
        callbacks: `config["callbacks"]`.

    Raises:
        ConfigError: names the task, and the nearest that there is.
    """
    for label, spec in callbacks.items():
        scorer = (spec or {}).get("scorer")
        ours = isinstance(scorer, Mapping) and scorer.get("_target_") == "lightning_opt.evaluation.SampleScorer"
        if ours and spec.get("every_n_steps") != 0:
            check_sample(config, scorer.get("tasks"), f"callbacks.{label}.scorer.tasks")


def check_sample(config: Mapping[str, Any], tasks: Any, field: str) -> None:
    """Refuses `tasks`, null or a list of names, that are not all tasks of `config["evaluation"]`; `field` names it.

    Raises:
        ConfigError: as `check_samples`.
    """
    known = resolve(config)["tasks"]
    if tasks is not None and (isinstance(tasks, str) or not isinstance(tasks, Sequence)):
        raise ConfigError(field, tasks, f"must be null, or a list of some of {', '.join(known)}")
    for task in tasks or ():
        if task not in known:
            near = f"; did you mean {closest(task, known)}?" if closest(task, known) else ""
            raise ConfigError(field, task, f"must be some of evaluation.tasks: {', '.join(known)}{near}")


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """A checked `config["evaluation"]` (see `check`): what it leaves out as in `DEFAULTS`, whole numbers as int."""
    for key in config:
        if key not in DEFAULTS:
            raise ConfigError("evaluation", key, one_of(key, DEFAULTS))
    settings = {**DEFAULTS, **config}
    suite = settings["suite"]
    if suite not in SUITES:
        raise ConfigError("evaluation.suite", suite, one_of(suite, SUITES))
    settings["tasks"] = _tasks(settings["tasks"], suite)
    for key in ("limit", "batch_size", "samples", "temperature", "max_gen_toks", "sandbox_seconds"):
        settings[key] = check_value(f"evaluation.{key}", settings[key])
    _check_engine(settings["engine"], settings["engine_args"])
    if settings["cache"] is not None and Path(settings["cache"]).expanduser().is_file():
        raise ConfigError("evaluation.cache", str(settings["cache"]), "must be a folder, or null for no cache")
    if suite == "full":
        _check_data(settings["data_dir"], settings["tasks"], settings["limit"])
    return settings


def _tasks(tasks: Any, suite: str) -> list[str]:
    """The tasks, with words that stand for several spelled out."""
    if isinstance(tasks, str) or not isinstance(tasks, Sequence) or not tasks:
        raise ConfigError("evaluation.tasks", tasks, f"must be a list of some of {', '.join([*SOURCES, *WORDS])}")
    known = [*TASKS] if suite == "mini" else [*SOURCES, *WORDS]
    for task in tasks:
        if task not in known and task in [*SOURCES, *WORDS]:
            raise ConfigError("evaluation.tasks", task, f"must be one of {', '.join(TASKS)} in the mini suite")
        if task not in known:
            raise ConfigError("evaluation.tasks", task, one_of(task, known))
    if len(set(tasks)) != len(tasks):
        raise ConfigError("evaluation.tasks", list(tasks), "must name each task once")
    return list(dict.fromkeys(name for task in tasks for name in WORDS.get(task, (task,))))


def _check_engine(engine: Any, arguments: Any) -> None:
    if engine not in ENGINES:
        raise ConfigError("evaluation.engine", engine, one_of(str(engine), ENGINES))
    if not isinstance(arguments, Mapping):
        raise ConfigError("evaluation.engine_args", arguments, "must be a mapping of vLLM's own arguments")
    if arguments and engine != "vllm":
        raise ConfigError("evaluation.engine_args", dict(arguments), "must be empty: only engine=vllm takes arguments")
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError("evaluation.engine", "vllm", "must be hf here: vllm is not installed (pip install vllm)")


def _check_data(data_dir: Any, tasks: Sequence[str], limit: int | None) -> None:
    if data_dir is None:
        missing = [task for task in tasks if hub_is_off() and not in_hub_cache(task, limit)]
        if missing:
            names = ", ".join(dict.fromkeys(SOURCES[task].hub for task in missing))
            raise ConfigError(
                "evaluation.data_dir",
                None,
                f"must be a folder with {', '.join(needed_files(missing))}: the hub is switched off and its cache "
                f"lacks {names} (fetch them once where there is a network: python -m recipes.evaluate --freeze DIR; "
                "or take evaluation=mini)",
            )
        return
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            "evaluation.data_dir", str(data_dir), f"must be a folder with {', '.join(needed_files(tasks))}"
        )
    missing_files = [SOURCES[task].files[split] for task in tasks for split in missing_splits(folder, task)]
    if missing_files:
        raise ConfigError(
            "evaluation.data_dir", str(data_dir), f"must be a folder that also holds {', '.join(missing_files)}"
        )
    check_frozen(folder, [path.name for task in tasks for path in local_files(folder, task).values()])


def local_files(folder: Path, task: str) -> dict[str, Path]:
    """Split to file of a task in a folder: lm-eval's own splits, else those that stand in for them."""
    source = SOURCES[task]
    for files in (source.files, source.instead):
        found = {split: find_file(folder, name) for split, name in files.items()}
        if files and None not in found.values():
            return {split: path for split, path in found.items() if path is not None}
    return {}


def missing_splits(folder: Path, task: str) -> list[str]:
    """Splits of a task whose files are not in the folder; none where others stand in for them."""
    if local_files(folder, task):
        return []
    return [split for split, name in SOURCES[task].files.items() if find_file(folder, name) is None]


def needed_files(tasks: Sequence[str]) -> list[str]:
    """Names of the local files that these tasks read."""
    return [name for task in tasks for name in SOURCES[task].files.values()]


def find_file(folder: Path, name: str) -> Path | None:
    """The file of this name in the folder, compressed by gzip or not; None when it is not there."""
    plain = name.removesuffix(".gz")
    for candidate in (folder / plain, folder / f"{plain}.gz"):
        if candidate.is_file():
            return candidate.resolve()
    return None


def hub_is_off() -> bool:
    """Whether the environment forbids the Hugging Face hub (the libraries' own variables)."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def in_hub_cache(task: str, limit: int | None = None) -> bool:
    """Whether `datasets` has prepared all that lm-eval will ask for here before: MMLU's subjects are configurations.

    Its cache folder's layout is OWNER___NAME/CONFIGURATION/VERSION/HASH, the last one with `dataset_info.json`.
    """
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    cache = os.environ.get("HF_DATASETS_CACHE") or os.path.join(home, "datasets")
    folder = Path(cache).expanduser() / SOURCES[task].hub.replace("/", "___")
    wanted = spread(TEST_DOCUMENTS, limit) if task == "mmlu" else [SOURCES[task].config or "*"]
    return all(
        any(not info.parent.name.endswith(".incomplete") for info in folder.glob(f"{config}/*/*/dataset_info.json"))
        for config in wanted
    )


def out_of_reach(settings: Mapping[str, Any]) -> dict[str, str]:
    """Tasks whose documents can be had neither from the cache nor from the hub, and why; asks the hub if it must.

    Args:
        settings: as `resolve` gives them.
    """
    if settings["suite"] != "full" or settings["data_dir"] is not None:
        return {}
    unknown = [task for task in settings["tasks"] if not in_hub_cache(task, settings["limit"])]
    if not unknown or _hub_answers():
        return {}
    reason = "{} is not in the cache and the hub does not answer; give evaluation.data_dir or take evaluation=mini"
    return {task: reason.format(SOURCES[task].hub) for task in unknown}


def _hub_answers() -> bool:
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_HUB_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def data_folder(suite: str, data_dir: str | None) -> Path | None:
    """Folder of the local files of a suite; None when they come from the hub."""
    if suite == "mini":
        return MINI_DIR
    return Path(data_dir).expanduser().resolve() if data_dir is not None else None


def max_gen_toks(suite: str, wanted: int | None, context_length: int) -> int:
    """Tokens to write per HumanEval problem: at most half of the context, so that a prompt keeps the other half."""
    return max(1, min(wanted or _MAX_GEN_TOKS[suite], context_length // 2))


def read_documents(path: Path) -> Iterator[dict[str, Any]]:
    """Documents of a .jsonl or .jsonl.gz file.

    Raises:
        ConfigError: the file cannot be read, or is not JSON lines; names the line.
    """
    try:
        yield from read_json_lines(path)
    except NoJson as error:
        where = f"{path.name} line {error.line}"
        raise ConfigError("evaluation.data_dir", where, "must be one JSON object") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError("evaluation.data_dir", str(path), f"must be readable JSON lines ({error})") from None


def spread(sizes: Mapping[str, int], limit: int | None) -> dict[str, int]:
    """How many documents to take from each subject so that all together are `limit`.

    Every subject gives the same number, first documents first; what is left over, and a limit below the number of
    subjects, goes to subjects at even distances in alphabetical order. Subjects with too few give what they have.

    Args:
        sizes: documents per subject.
        limit: documents in all; None takes everything.

    Returns:
        Subject to count, without subjects that give nothing.
    """
    taken = dict.fromkeys(sorted(sizes), 0)
    left = sum(sizes.values()) if limit is None else min(limit, sum(sizes.values()))
    while left:
        open_subjects = [name for name in taken if taken[name] < sizes[name]]
        each = min(left // len(open_subjects), min(sizes[name] - taken[name] for name in open_subjects))
        if each:
            chosen = open_subjects
        else:
            each, chosen = 1, [open_subjects[index * len(open_subjects) // left] for index in range(left)]
        for name in chosen:
            taken[name] += each
        left -= each * len(chosen)
    return {name: count for name, count in taken.items() if count}
