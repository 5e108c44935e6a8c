"""Six optimizers on two small models, tuned alike: ``python -m recipes.small_study [PIECE]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recipes import study

SETTINGS = Path(__file__).with_name("study.yaml")
OPTIMIZERS = ("adamw", "nadamw", "lion", "muon", "soap", "mars")
# one thread a job and two jobs at once: what README.md counts with
HERE = ("trainer.accelerator=cpu", "trainer.num_threads=1", "jobs_per_device=2", "evaluation.tasks=[hellaswag]")

_EXAMPLES = """examples:
  python -m recipes.small_study lion          # one piece: what Lion needs; any order, any number of times
  python -m recipes.small_study all           # whatever is missing, all pieces
  python -m recipes.small_study status        # how far it is
  python -m recipes.small_study dry_run       # what is left at most
  python -m recipes.small_study all stop_after=3600     # starts nothing more after an hour
Stop it whenever you like: the same command goes on. The verdict is drawn at each end: runs/study/small/report.html.
"""


def words(piece: str, more: list[str]) -> list[str]:
    """The words of `recipes.study` for a piece.

    Args:
        piece: an optimizer, ``all``, ``status`` or ``dry_run``.
        more: further words.
    """
    mine = {"status": ["status=true"], "dry_run": ["dry_run=true"], "all": []}.get(piece, [f"only=[{piece}]"])
    return [f"settings={SETTINGS}", *HERE, *mine, *more]


def main(arguments: list[str] | None = None) -> int:
    """Runs one piece of the study; its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.small_study",
        description="AdamW, NAdamW, Lion, Muon, SOAP and Mars on femto and pico: a fair comparison in pieces.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("piece", choices=[*OPTIMIZERS, "all", "status", "dry_run"])
    parser.add_argument("more", nargs="*", metavar="KEY=VALUE", help="further words of recipes.study")
    asked = parser.parse_args(arguments)
    return study.main(words(asked.piece, asked.more))


if __name__ == "__main__":
    sys.exit(main())
