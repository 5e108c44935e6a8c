"""Draws the report of run folders again: ``python -m recipes.report PATH...``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from lightning_opt.run_folder import RunFolder

_EXAMPLES = """examples:
  python -m recipes.report runs/lion_nano/20260101T120000Z-1a2b3c4d
  python -m recipes.report runs/*/*          # every run, one after another

Writes report.html, report.md and MODEL_CARD.md into each folder, from its records alone: no training, no torch.
A run that is still going, diverged or was stopped gets its report too."""


def main(arguments: list[str] | None = None) -> int:
    """Draws a report in each folder; 0 when all were drawn, 2 when a path is no run folder, 1 on any other failure."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.report",
        description="Draw the report of finished, running or broken runs again.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a run folder (as train.py prints it)")
    paths: list[Path] = parser.parse_args(arguments).paths
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    wrong = [path for path in paths if not _is_run(RunFolder(path))]
    if wrong:
        needed = "a folder with metrics.csv, plan.json, status.json or summary.json"
        print(f"no run folder: {', '.join(map(str, wrong))} (expected {needed})", file=sys.stderr)
        return 2

    from lightning_opt import reports  # matplotlib is imported only after the paths are found right

    failed = 0
    for path in paths:
        try:
            reports.write(path)
        except OSError as error:
            failed += 1
            print(f"{path}: {error}", file=sys.stderr)
        else:
            print(RunFolder(path).report_html)
    return 1 if failed else 0


def _is_run(folder: RunFolder) -> bool:
    return any(path.is_file() for path in (folder.metrics, folder.plan, folder.status, folder.summary))


if __name__ == "__main__":
    sys.exit(main())
