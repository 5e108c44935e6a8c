"""Draws reports again: of runs, of sweeps, or of any runs side by side: ``python -m recipes.report PATH...``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from lightning_opt.plan import ConfigError
from lightning_opt.reports.jobs import is_run, is_sweep
from lightning_opt.run_folder import RunFolder, SweepFolder

_EXAMPLES = """examples:
  python -m recipes.report runs/lion_nano/20260101T120000Z-1a2b3c4d
  python -m recipes.report runs/*/*                                  # every run and sweep, one after another
  python -m recipes.report runs/sweeps/20260101T120000Z-1a2b3c4d     # a sweep, known by its sweep.json
  python -m recipes.report --compare comparisons/lion runs/lion_nano/20260101T120000Z-* runs/adamw_nano/*
  python -m recipes.report --compare comparisons/sizes --mixed runs/adamw_pico/* runs/adamw_nano/*

A run gets report.html, report.md and MODEL_CARD.md; a sweep and a comparison get report.html, report.md and
sweep.csv: loss by tokens, time and training compute, and final loss against time and memory. From their records alone:
no training, no torch. Runs and sweeps that are still going, diverged or were stopped are drawn as they stand. A sweep
among the runs to compare stands for all its jobs. Runs of unequal data, tokens or schedule end are refused (exit 2),
or with --mixed put side by side and marked, each kind ranked by itself."""


def main(arguments: list[str] | None = None) -> int:
    """Draws the reports; 0 when all were drawn, 2 when a path is not what it should be, 1 on any other failure."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.report",
        description="Draw the report of runs or sweeps again, or compare any runs.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="a run or sweep folder (as train.py prints)"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="OUT", help="write one comparison of all PATHs into this folder"
    )
    parser.add_argument(
        "--mixed", action="store_true", help="with --compare: runs of unequal data, tokens or schedule end too, marked"
    )
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    if wrong := _wrong(asked):
        print(wrong, file=sys.stderr)
        return 2

    from lightning_opt import reports  # matplotlib is imported only after the paths are found right

    try:
        if asked.compare:
            reports.compare(asked.paths, asked.compare, mixed=asked.mixed)
            print(SweepFolder(asked.compare).report_html)
            return 0
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{asked.compare}: {error}", file=sys.stderr)
        return 1
    failed = 0
    for path in asked.paths:
        try:
            (reports.write_sweep if is_sweep(path) else reports.write)(path)
        except OSError as error:
            failed += 1
            print(f"{path}: {error}", file=sys.stderr)
        else:
            print(RunFolder(path).report_html)
    return 1 if failed else 0


def _wrong(asked: argparse.Namespace) -> str:
    """What is wrong with the command line, on one line; empty where nothing is."""
    wrong = [path for path in asked.paths if not (is_sweep(path) or is_run(path))]
    if wrong:
        needed = "a folder with metrics.csv, plan.json, status.json or summary.json, or a sweep's with sweep.json"
        return f"no run folder: {', '.join(map(str, wrong))} (expected {needed})"
    if asked.mixed and not asked.compare:
        return "--mixed: expected together with --compare OUT"
    if asked.compare and (asked.compare.is_file() or is_sweep(asked.compare) or is_run(asked.compare)):
        return (
            f"--compare {asked.compare}: expected a folder of its own: the comparison would overwrite what lies there"
        )
    return ""


if __name__ == "__main__":
    sys.exit(main())
