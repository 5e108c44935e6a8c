"""Lion against AdamW and Adafactor on text: ``python -m recipes.lion_language_model``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recipes.lion_language_model import plans

_EXAMPLES = """examples:
  python -m recipes.lion_language_model                       # nano on this machine: about 45 minutes on 2 cores
  python -m recipes.lion_language_model --parts optimizers    # perplexities alone
  python -m recipes.lion_language_model --on wiki40b          # GPT-2 124M on a GPU; see README.md for the texts
  python -m recipes.lion_language_model --quick               # does it run here?
The same command again runs what is missing; nothing that has come to its end runs twice.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the sweeps and writes the page; 0, or the exit code of a sweep that was refused or stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.lion_language_model",
        description="Perplexity by optimizer, batch size and beta2, as one page.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--on", choices=list(plans.PLACES), default="nano", help="which model and text")
    parser.add_argument("--parts", nargs="+", choices=list(plans.PARTS), default=list(plans.PARTS))
    parser.add_argument("--folder", type=Path, help="of the runs and the page (runs/lion_language_model/PLACE)")
    parser.add_argument("--quick", action="store_true", help="femto for a few steps")
    parser.add_argument("--page", action="store_true", help="runs nothing: the page of what is there")
    asked = parser.parse_args(arguments)
    place = "quick" if asked.quick else asked.on
    folder = (asked.folder or Path("runs/lion_language_model") / place).resolve()
    from recipes.sweeping import run

    code = 0
    for words in () if asked.page else plans.commands(place, asked.parts, folder):
        if code := run(words):
            break
    from recipes.lion_language_model.page import write  # matplotlib only where there is something to draw

    print(write(folder, place))
    return code


if __name__ == "__main__":
    sys.exit(main())
