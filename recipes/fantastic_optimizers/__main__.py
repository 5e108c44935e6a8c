"""Article 2's figures, drawn from published data or from runs: ``python -m recipes.fantastic_optimizers``."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from lightning_opt.plan import ConfigError

_EXAMPLES = """examples:
  python -m recipes.fantastic_optimizers --results results.csv --tuned tuned_hparams.yaml --curves loss_curves.csv
  python -m recipes.fantastic_optimizers --results results.csv                # without what the other two files tell
  python -m recipes.fantastic_optimizers --runs runs/*/* runs/sweeps/*        # from run folders
  python -m recipes.fantastic_optimizers --results results.csv --runs runs/*/*    # both, side by side
  python -m recipes.fantastic_optimizers --commands 130m/1x                   # what to run: train.py's commands

Where the three files come from: the README beside this module, and the page itself.
"""


def main(arguments: list[str] | None = None) -> int:
    """Writes the page, or prints the commands of cells; 0, or 2 where an argument is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.fantastic_optimizers",
        description="The figures of 'Fantastic Pretraining Optimizers' (arXiv 2509.02046), drawn again.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, metavar="CSV", help="published final losses and scores, or a study's")
    parser.add_argument("--tuned", type=Path, metavar="YAML", help="published tuned values; with --results")
    parser.add_argument("--curves", type=Path, metavar="CSV", help="published losses on the way; with --results")
    parser.add_argument("--runs", type=Path, nargs="+", default=[], metavar="PATH", help="run folders and sweeps")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/fantastic_optimizers"), help="folder; made where missing"
    )
    parser.add_argument("--commands", metavar="CELLS", help="prints train.py's commands: all, 130m, 130m/1x")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        if asked.commands:
            from recipes.fantastic_optimizers.plans import chosen

            print("\n".join(one.command for one in chosen(asked.commands)))
            return 0
        _check(asked)
        return _draw(asked)
    except (ConfigError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2


def _check(asked: argparse.Namespace) -> None:
    """Refuses what cannot be drawn, before anything slow."""
    from lightning_opt.reports.jobs import is_run, is_sweep

    if not asked.results and not asked.runs:
        raise ConfigError("--results", None, "must name the published table, or --runs must name run folders")
    for name in ("tuned", "curves"):
        if getattr(asked, name) and not asked.results:
            raise ConfigError(f"--{name}", str(getattr(asked, name)), "must come together with --results")
    for path in asked.runs:
        if not (is_run(path) or is_sweep(path)):
            raise ConfigError("--runs", str(path), "must be folders of runs or sweeps, as train.py leaves them")


def _draw(asked: argparse.Namespace) -> int:
    from recipes.fantastic_optimizers import page  # matplotlib only once the input is found right

    sources, left_out = [], ()
    if asked.results:
        sources.append(page.published(asked.results, asked.tuned, asked.curves, asked.out / "published"))
    if asked.runs:
        source, left_out = page.from_runs(asked.runs, asked.out / "runs")
        sources.append(source)
    names = ("results", "tuned", "curves", "runs", "out")
    print(page.write(asked.out, sources, page.again({name: getattr(asked, name) for name in names}), left_out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
