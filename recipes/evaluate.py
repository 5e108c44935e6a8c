"""Scores finished runs or any Hugging Face checkpoint folders with lm-eval.

    python -m recipes.evaluate runs/lion_nano/20260101-120000-1a2b3c4d
    python -m recipes.evaluate runs/*/* --suite full --data-dir my_eval_sets --limit 50
    python -m recipes.evaluate ./my-llama --suite full --tasks hellaswag,mmlu --device cuda --out scores.json
    python -m recipes.evaluate ./my-llama --suite full --data-dir my_eval_sets --export-tasks ./tasks

A run folder gets its evaluation/results.json, summary.json and report anew. A plain checkpoint's scores go to --out,
or are only printed. --export-tasks writes lm-eval task files instead of scoring, and prints the lm-eval command that
uses them.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from lightning_opt.evaluation.suites import DEFAULTS, SUITES, TASKS, resolve
from lightning_opt.plan import ConfigError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, as described in the module's text."""
    about, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evaluate",
        description=about,
        epilog="examples:\n" + rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="run folder, or checkpoint folder (has config.json)"
    )
    parser.add_argument("--suite", default="mini", metavar="|".join(SUITES), help="which sets (default: mini)")
    parser.add_argument("--tasks", default=",".join(TASKS), help=f"some of {','.join(TASKS)} (default: all)")
    parser.add_argument(
        "--data-dir", metavar="DIR", help="suite full: folder with the real sets (default: from the hub)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="documents per task (MMLU: in all)")
    parser.add_argument(
        "--batch-size", type=int, default=DEFAULTS["batch_size"], metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--max-gen-toks", type=int, metavar="N", help="tokens written per HumanEval problem")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results of one plain checkpoint, in lm-eval's format")
    parser.add_argument(
        "--export-tasks", type=Path, metavar="DIR", help="write lm-eval task files for one PATH, do not score"
    )
    return parser.parse_args(arguments)


def model_folder(path: Path) -> tuple[Path, bool]:
    """The folder with the checkpoint, and whether `path` is a run folder.

    Raises:
        ConfigError: there is no checkpoint.
    """
    for folder, is_run in ((path / "model", True), (path, False)):
        if (folder / "config.json").is_file():
            return folder, is_run
    if (path / "config.yaml").is_file():
        raise ConfigError("PATH", str(path), "must be a run that is over: this run folder has no model/ yet")
    expected = "must be a run folder with model/ or a Hugging Face checkpoint folder with config.json"
    raise ConfigError("PATH", str(path), expected)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """`config["evaluation"]` from the command line, checked."""
    config = {
        "suite": options.suite,
        "tasks": [name.strip() for name in options.tasks.split(",") if name.strip()],
        "limit": options.limit,
        "data_dir": options.data_dir,
        "batch_size": options.batch_size,
        "max_gen_toks": options.max_gen_toks,
    }
    return resolve(config)


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
    )
    unsafe = " --confirm_run_unsafe_code" if "humaneval" in config["tasks"] else ""
    print(
        f"lm-eval run --model hf --model_args pretrained={folder} --include_path {target} --tasks "
        f"{','.join(config['tasks'])} --batch_size {config['batch_size']}{unsafe}"
    )


def score(folder: Path, output: Path, config: dict[str, Any], device: str) -> dict[str, Any]:
    """Loads one checkpoint and scores it; the summary of `lightning_opt.evaluation.evaluate`."""
    import torch

    from lightning_opt.evaluation import evaluate
    from lightning_opt.evaluation.quiet import quiet

    with quiet():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return evaluate(model.to(device), tokenizer, config, output)


def refresh(run: Path) -> None:
    """Makes summary.json and the report of a run folder anew."""
    from lightning_opt import reports
    from lightning_opt.run_folder import RunFolder, summarize, write_json

    folder = RunFolder(run)
    write_json(folder.summary, summarize(folder))
    reports.write(run)


def show(name: str, block: dict[str, Any]) -> None:
    """Prints one checkpoint's scores as a table."""
    from rich.console import Console
    from rich.table import Table

    note = "" if block["comparable"] else " (not comparable with published numbers)"
    table = Table(title=f"{name}: suite {block['suite']}{note}", title_justify="left")
    for column in ("task", "metric", "score", "stderr", "chance", "n", "shots", "cut"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for task in TASKS:
        entry = block[task]
        if "skipped" in entry:
            table.add_row(task, f"skipped: {entry['skipped']}")
            continue
        stderr = "" if entry["stderr"] is None else f"{entry['stderr']:.4f}"
        numbers = [f"{entry['value']:.4f}", stderr, f"{entry['chance']:.4f}"]
        table.add_row(task, entry["metric"], *numbers, *(str(entry[key]) for key in ("n", "shots", "truncated")))
    if block["suite"] == "full":
        reasons = [f"{task}: {block[task]['why_not']}" for task in TASKS if "why_not" in block[task]]
        table.caption, table.caption_justify = "; ".join(reasons) or None, "left"
    Console().print(table)


def run(options: argparse.Namespace) -> None:
    """Does what the command line says."""
    found = [(path, *model_folder(path)) for path in options.paths]
    config = settings(options)
    plain = [path for path, _, is_run in found if not is_run]
    if options.out is not None and (len(found) != 1 or not plain):
        raise ConfigError(
            "--out", str(options.out), "must go with one plain checkpoint; run folders keep their own results"
        )
    if options.export_tasks is not None:
        if len(found) != 1 or config["suite"] == "none":
            raise ConfigError(
                "--export-tasks", str(options.export_tasks), "must go with one PATH and a suite that has tasks"
            )
        export(found[0][1], options.export_tasks, config)
        return
    for path, folder, is_run in found:
        if is_run:
            block = score(folder, path / "evaluation", config, options.device)
            refresh(path)
        else:
            with tempfile.TemporaryDirectory() as scratch:
                block = score(folder, Path(scratch), config, options.device)
                if options.out is not None:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text((Path(scratch) / "results.json").read_text("utf-8"), "utf-8")
        show(str(path), block)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; 0 done, 2 wrong input."""
    options = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        run(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
