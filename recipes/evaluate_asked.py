"""What `recipes.evaluate` is asked: its command line and its PATHs, found right or refused before torch is imported."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_opt.evaluation.suites import DEFAULTS, ENGINES, SUITES, resolve
from lightning_opt.evaluation.task_table import SOURCES, TASKS, WORDS
from lightning_opt.plan import ConfigError, is_hub_id, near_path, one_of
from lightning_opt.run_folder import read_json

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")
_SUITES = tuple(suite for suite in SUITES if suite != "none")  # which scores nothing
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


@dataclass(frozen=True)
class Model:
    """One PATH.

    Attributes:
        path: as the user gave it.
        folder: the checkpoint; the path itself where results are all that is asked of it.
        results: where its results lie; None for a plain checkpoint, which has them below ``--out``.
    """

    path: Path
    folder: Path
    results: Path | None

    def results_in(self, out: Path) -> Path:
        """Where its results lie, whatever models stand beside it."""
        if self.results is not None:
            return self.results
        whole = self.path.resolve()
        name = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in whole.name)
        return out / f"{name}-{hashlib.sha256(str(whole).encode()).hexdigest()[:8]}"


def parse(about: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line.

    Args:
        about: the text of its help: what it does, a blank line, examples.
        arguments: None: those of the process.
    """
    about, _, rest = about.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evaluate",
        description=about,
        epilog="examples:\n" + rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("paths", nargs="*", type=Path, metavar="PATH", help="run folder, or checkpoint folder (has config.json)")
    add(
        "--suite",
        metavar="|".join(_SUITES),
        help="which sets (default: full with --data-dir or --tasks of it, else mini)",
    )
    add(
        "--tasks",
        metavar="A,B",
        help=f"some of {','.join(SOURCES)}, or {', '.join(WORDS)} (default: {','.join(TASKS)})",
    )
    add("--data-dir", metavar="DIR", help="suite full: folder with the real sets (default: from the hub)")
    add("--limit", type=int, metavar="N", help="documents per task (MMLU: in all)")
    add("--batch-size", type=int, default=DEFAULTS["batch_size"], metavar="N", help="prompts of full context at once")
    add("--max-gen-toks", type=int, metavar="N", help="tokens written per HumanEval problem")
    add("--samples", type=int, default=1, metavar="N", help="programs per HumanEval problem; above 1 they are drawn")
    add("--temperature", type=float, default=DEFAULTS["temperature"], help="of the draws (default: %(default)s)")
    seconds = DEFAULTS["sandbox_seconds"]
    add("--sandbox-seconds", type=float, default=seconds, metavar="S", help="of each program (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--engine", default="hf", metavar="|".join(ENGINES), help="vllm for large models (default: hf)")
    add("--engine-args", default="", metavar="K=V,...", help="vLLM's own, for example tensor_parallel_size=8")
    add("--cache", type=Path, metavar="DIR", help="where answers are kept (default: your cache folder)")
    add("--no-cache", action="store_true", help="keep no answers, and ask everything again")
    add("--out", type=Path, metavar="DIR", help="the page, and the results of plain checkpoints")
    add(
        "--report-only",
        action="store_true",
        help="score nothing: draw the page of what was kept; PATH may be any folder with results.json",
    )
    add("--freeze", type=Path, metavar="DIR", help="fetch the sets of --tasks (default: all) from the hub into DIR")
    add("--export-tasks", type=Path, metavar="DIR", help="write lm-eval task files for one PATH, do not score")
    return parser.parse_args(arguments)


def model_folder(path: Path) -> tuple[Path, bool]:
    """The folder with the checkpoint, and whether `path` is a run folder.

    Raises:
        ConfigError: there is no checkpoint, or a part of it is missing.
    """
    for folder, is_run in ((path / "model", True), (path, False)):
        if (folder / "config.json").is_file():
            lacking = [
                what
                for what, patterns in (("weights", _WEIGHTS), ("a tokenizer", _TOKENIZERS))
                if not any(next(folder.glob(pattern), None) for pattern in patterns)
            ]
            if lacking:
                raise ConfigError("PATH", str(folder), f"must also hold {' and '.join(lacking)}")
            return folder, is_run
    if (path / "config.yaml").is_file():
        raise ConfigError("PATH", str(path), "must be a run that is over: this run folder has no model/ yet")
    expected = "must be a run folder with model/ or a Hugging Face checkpoint folder with config.json"
    if is_hub_id(str(path)):
        expected += f"; one of the hub is fetched by: hf download {path} --local-dir {path.name}"
    elif not path.exists():
        expected += f"; it is not there{near_path(path)}"
    raise ConfigError("PATH", str(path), expected)


def check_place(field: str, folder: Path) -> None:
    """Refuses a folder that cannot be written, before hours go into what belongs there; makes it where it is missing.

    Raises:
        ConfigError: names it by the option that did.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = f"must be a folder we can write to ({error.strerror or error})"
        raise ConfigError(field, str(folder), why) from None


def check_results(file: Path) -> None:
    """Refuses a results.json that is no whole one.

    Raises:
        ConfigError: names it.
    """
    try:
        whole = isinstance(read_json(file).get("summary"), dict)
    except (OSError, ValueError, AttributeError):
        whole = False
    if not whole:
        raise ConfigError("--report-only", str(file), "must be whole, and is cut or no results: score the model again")


def found_models(options: argparse.Namespace) -> list[Model]:
    """All PATHs; says of every one that will not do what is wrong, not only of the first.

    Raises:
        ConfigError: the last of several that were wrong; the others are printed.
    """
    models, wrong = [], []
    for path in options.paths:
        try:
            models.append(_found(path, options.report_only))
        except ConfigError as error:
            wrong.append(error)
    for error in wrong[:-1]:
        print(error, file=sys.stderr)
    if wrong:
        raise wrong[-1]
    return models


def _found(path: Path, report_only: bool) -> Model:
    if report_only:
        for kept in (path / "evaluation", path):
            if (kept / "results.json").is_file():
                return Model(path, path, kept)
    folder, is_run = model_folder(path)
    return Model(path, folder, path / "evaluation" if is_run else None)


def tasks(options: argparse.Namespace, default: str) -> list[str]:
    """Names on the command line, words not yet spelled out."""
    return [name.strip() for name in (options.tasks or default).split(",") if name.strip()]


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """`config["evaluation"]` from the command line, checked."""
    wanted = tasks(options, ",".join(TASKS))
    real = options.data_dir is not None or any(name not in TASKS and name in {*SOURCES, *WORDS} for name in wanted)
    if options.suite is not None and options.suite not in _SUITES:
        raise ConfigError("--suite", options.suite, one_of(options.suite, _SUITES))
    config = {
        "suite": options.suite or ("full" if real else "mini"),
        "tasks": wanted,
        "limit": options.limit,
        "data_dir": options.data_dir,
        "batch_size": options.batch_size,
        "max_gen_toks": options.max_gen_toks,
        "samples": options.samples,
        "temperature": options.temperature,
        "sandbox_seconds": options.sandbox_seconds,
        "engine": options.engine,
        "engine_args": engine_arguments(options.engine_args),
        "cache": None if options.no_cache or options.engine == "vllm" else str(options.cache or cache_folder()),
    }
    return resolve(config)


def engine_arguments(text: str) -> dict[str, Any]:
    """`a=1,b=auto` as a mapping; values are JSON where they can be read as such.

    Raises:
        ConfigError: a part is not `name=value`.
    """
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, sign, value = part.partition("=")
        if not sign or not name.strip():
            raise ConfigError("--engine-args", part, "must be name=value, several parted by commas")
        try:
            found[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            found[name.strip()] = value
    return found


def cache_folder() -> Path:
    """Where answers are kept when nobody says where."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_opt" / "answers"
