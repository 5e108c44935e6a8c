"""Scores finished runs and any Hugging Face checkpoint folders with lm-eval, several side by side.

    python -m recipes.evaluate runs/lion_nano/20260101T120000Z-1a2b3c4d
    python -m recipes.evaluate --freeze my_eval_sets                      # fetch every real set once, then offline
    python -m recipes.evaluate runs/*/* --suite full --data-dir my_eval_sets --limit 50
    python -m recipes.evaluate runs/lion/x ./my-llama --suite full --data-dir my_eval_sets --tasks all --out scores
    python -m recipes.evaluate ./my-llama --suite full --tasks humaneval --samples 20 --temperature 0.8
    python -m recipes.evaluate ./my-70b --suite full --engine vllm --engine-args tensor_parallel_size=8
    python -m recipes.evaluate ./my-llama --suite full --data-dir my_eval_sets --export-tasks ./tasks
    python -m recipes.evaluate runs/lion/x runs/adamw/y --report-only --out scores

A run folder gets its evaluation/results.json, summary.json and report anew. Several PATHs, or --out, give a page that
compares them task by task over the same documents (scores.html, scores.csv); a plain checkpoint's results lie beside
it, in a folder of their own (NAME-xxxxxxxx, by its path). Without --out one plain checkpoint's scores are only
printed, and several go to runs/scores/TIME. Tasks: hellaswag, mmlu, humaneval, lambada_openai, openbookqa, winogrande,
piqa, boolq, wsc273, arc_easy, arc_challenge, copa; "study" stands for the ten of the optimizer study, "all" for all.
Answers are kept on disk: a scoring that was stopped goes on where it was. Exits with 0 when every task of every model
has a score, 1 when some have none, 2 for wrong input.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning_opt.evaluation.suites import hub_is_off, out_of_reach, resolve
from lightning_opt.plan import ConfigError
from recipes.evaluate_asked import Model, check_place, check_results, found_models, parse, settings, tasks


def export(folder: Path, target: Path, config: dict[str, Any]) -> None:
    """Writes the task files for one checkpoint and prints the lm-eval command that uses them."""
    from lightning_opt.evaluation.offline import write_tasks

    text = json.loads((folder / "config.json").read_text("utf-8"))
    length = text.get("max_position_embeddings") or text.get("n_positions")
    if not isinstance(length, int):
        raise ConfigError("PATH", str(folder), "must have max_position_embeddings in its config.json")
    write_tasks(
        target,
        suite=config["suite"],
        tasks=config["tasks"],
        context_length=length,
        limit=config["limit"],
        data_dir=config["data_dir"],
        max_new_tokens=config["max_gen_toks"],
        samples=config["samples"],
        temperature=config["temperature"],
        sandbox_seconds=config["sandbox_seconds"],
    )
    unsafe = " --confirm_run_unsafe_code" if "humaneval" in config["tasks"] else ""
    print(
        f"lm-eval run --model hf --model_args pretrained={folder} --include_path {target} --tasks "
        f"{','.join(config['tasks'])} --batch_size {config['batch_size']}{unsafe}"
    )


def freeze_sets(options: argparse.Namespace) -> int:
    """Fetches the real sets once; 0 when all are there, 1 when some could not be had."""
    if options.paths:
        raise ConfigError("--freeze", str(options.freeze), "must come without PATH: it fetches, and scores nothing")
    wanted = resolve({"suite": "none", "tasks": tasks(options, "all")})["tasks"]
    if hub_is_off():
        raise ConfigError("--freeze", str(options.freeze), "must have the hub: HF_HUB_OFFLINE or its like is set")
    check_place("--freeze", options.freeze)
    from lightning_opt.evaluation.freezing import freeze
    from lightning_opt.evaluation.quiet import quiet

    with quiet():
        failed = freeze(options.freeze, wanted, lambda text: print(text, file=sys.__stdout__, flush=True))
    if failed:
        print(f"{len(failed)} sets could not be had; the same command tries them again", file=sys.stderr)
        return 1
    print(f"frozen: from now on --data-dir {options.freeze} needs no network")
    return 0


def usable(device: str) -> str:
    """The device that this name stands for.

    Raises:
        ConfigError: there is none, or it does not work.
    """
    import torch

    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ConfigError("--device", device, f"must be auto, cpu or an accelerator that is here ({why})") from None
    return name


def score(folder: Path, output: Path, config: dict[str, Any], device: str) -> dict[str, Any]:
    """Loads one checkpoint and scores it; the summary of `lightning_opt.evaluation.evaluate`.

    Raises:
        ConfigError: transformers cannot load it.
    """
    from lightning_opt.evaluation import evaluate
    from lightning_opt.evaluation.quiet import quiet

    model: Any = folder
    with quiet():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            if config["engine"] != "vllm":
                model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
        except Exception as error:  # of many libraries, each with its own
            why = f"must be whole, and transformers cannot load it ({type(error).__name__}: {error})"
            raise ConfigError("PATH", str(folder), why) from error
    return evaluate(model if model is folder else model.to(device), tokenizer, config, output)


def refresh(run: Path) -> None:
    """Makes summary.json and the report of a run folder anew."""
    from lightning_opt import reports
    from lightning_opt.run_folder import RunFolder, summarize, write_json

    folder = RunFolder(run)
    write_json(folder.summary, summarize(folder))
    reports.write(run)


def unscored(block: dict[str, Any]) -> dict[str, str]:
    """Tasks that were asked for and have no score, and why."""
    reasons = {task: entry.get("skipped") for task, entry in block.items() if isinstance(entry, dict)}
    return {task: reason for task, reason in reasons.items() if reason not in (None, "not in evaluation.tasks")}


def show(name: str, block: dict[str, Any]) -> None:
    """Prints one checkpoint's scores as a table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    note = "" if block["comparable"] else " (not comparable with published numbers)"
    table = Table(
        title=f"{name}: suite {block['suite']}{note}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in ("task", "metric", "score", "stderr", "chance", "bits/byte", "n", "shots", "cut"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right", no_wrap=column != "task")
    entries = {task: entry for task, entry in block.items() if isinstance(entry, dict) and "skipped" not in entry}
    for task, entry in entries.items():
        bits = entry.get("bits_per_byte")
        cells = [f"{entry['value']:.4f}", _four(entry["stderr"]), f"{entry['chance']:.4f}", _four(bits)]
        table.add_row(task, entry["metric"], *cells, *(str(entry[key]) for key in ("n", "shots", "truncated")))
    if block["suite"] == "full":
        reasons = [f"{task}: {entry['why_not']}" for task, entry in entries.items() if "why_not" in entry]
        table.caption, table.caption_justify = "; ".join(reasons) or None, "left"
    if table.rows:
        Console().print(table)
    for task, reason in unscored(block).items():
        print(f"{name}: {task} skipped: {reason}")


def _four(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def run(options: argparse.Namespace) -> int:
    """Does what the command line says; 0, or 1 where a task of a model has no score."""
    if options.freeze is not None:
        return freeze_sets(options)
    if not options.paths:
        raise ConfigError("PATH", "", "must name at least one run or checkpoint folder")
    models = found_models(options)
    if options.report_only:
        return compare(models, options.out)
    config = settings(options)
    if options.export_tasks is not None:
        if len(models) != 1:
            raise ConfigError("--export-tasks", str(options.export_tasks), "must go with one PATH")
        check_place("--export-tasks", options.export_tasks)
        export(models[0].folder, options.export_tasks, config)
        return 0
    out = options.out
    if out is None and len(models) > 1:
        out = Path("runs") / "scores" / time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    lacking = out_of_reach(config)
    for task, reason in lacking.items():
        print(f"{task}: {reason}", file=sys.stderr)
    if lacking:
        return 1
    for model in models:
        if model.results is not None:
            check_place("PATH", model.path)
    if out is not None:
        check_place("--out", out)
    device = options.device if config["engine"] == "vllm" else usable(options.device)
    scored, complete = score_all(models, out, config, device)
    if out is not None and scored:
        compare(scored, out)
    return 0 if complete else 1


def score_all(models: list[Model], out: Path | None, config: dict[str, Any], device: str) -> tuple[list[Model], bool]:
    """Scores one model after another, and says of each that could not be scored why.

    Returns:
        The models that have a score, and whether every model has one of every task.
    """
    scored, complete = [], True
    for model in models:
        with tempfile.TemporaryDirectory() as scratch:
            place = model.results_in(out or Path(scratch))
            try:
                block = score(model.folder, place, config, device)
            except Exception as error:
                if len(models) == 1:
                    raise
                kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
                print(f"{model.path}: {kind}{' '.join(str(error).split())}", file=sys.stderr)
                complete = False
                continue
        if model.results is not None:
            refresh(model.path)
        show(str(model.path), block)
        missing = unscored(block)
        complete = complete and not missing
        scored += [] if missing.keys() >= set(config["tasks"]) else [model]
    return scored, complete


def compare(models: list[Model], out: Path | None) -> int:
    """Draws the page of these models, and prints where it is.

    Raises:
        ConfigError: there is no folder for it, or a model was not scored.
    """
    if out is None:
        raise ConfigError("--out", None, "must name a folder for the page")
    folders = {model: model.results_in(out) for model in models}
    lacking = [str(model.path) for model, folder in folders.items() if not (folder / "results.json").is_file()]
    if lacking:
        raise ConfigError("--report-only", ", ".join(lacking), "must have been scored before")
    for folder in folders.values():
        check_results(folder / "results.json")
    check_place("--out", out)
    from lightning_opt import reports  # matplotlib

    reports.write_scores([str(model.path) for model in models], [folders[model] for model in models], out)
    print(out / "scores.html")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point; 0 done, 1 something could not be had or scored, 2 wrong input."""
    options = parse(__doc__ or "", arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("lightning_opt.evaluation").setLevel(logging.INFO)
    try:
        return run(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
