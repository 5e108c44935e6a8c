"""AdamW against Lion on GLM-4.5-Air: ``python -m recipes.glm45_air_adamw_vs_lion``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recipes.glm45_air_adamw_vs_lion import plans

_EXAMPLES = """examples:
  ./run_optimizer_benchmark.sh --model_size nano                       # moe_nano, for 2 cores
  ./run_optimizer_benchmark.sh --model_size nano --epochs 20           # twice the tokens, twice the time
  ./run_optimizer_benchmark.sh --model_size nano evaluation=full evaluation.data_dir=my_eval_sets evaluation.limit=200
  ./run_optimizer_benchmark.sh --model_size mini data.path=my_texts    # 1B parameters, one GPU
  ./run_optimizer_benchmark.sh --model_size air data.path=my_texts     # 8 GPUs and more; see README.md
  ./run_optimizer_benchmark.sh --quick                                 # does it run here?
  ./run_optimizer_benchmark.sh --model_size nano --page                # the page of what is there
The same command again runs what is missing; nothing that has come to its end runs twice.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the sweeps and writes the page; 0, or the exit code of a sweep that was refused or stopped."""
    parser = argparse.ArgumentParser(
        prog="run_optimizer_benchmark.sh",
        description="Every row of the article's decision matrix three times, mean ± standard deviation, as one page.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model_size", choices=list(plans.SIZES), default="nano", help="120b: as air, its real size")
    parser.add_argument("--epochs", type=_epochs, default=10, help="of each run (10); at nano one is 32,768 tokens")
    parser.add_argument("--parts", nargs="+", choices=list(plans.PARTS), default=list(plans.PARTS))
    parser.add_argument("--folder", type=Path, help="of runs and page (runs/glm45_air_adamw_vs_lion/SIZE)")
    parser.add_argument("--quick", action="store_true", help="two rows of moe_nano for a few steps")
    parser.add_argument("--page", action="store_true", help="runs nothing: the page of what is there")
    asked, extra = parser.parse_known_args(arguments)
    if wrong := [word for word in extra if word.startswith("-") or "=" not in word]:
        parser.error(f"{wrong[0]} is neither an option nor an override of train.py such as data.path=FOLDER")
    size = "quick" if asked.quick else asked.model_size
    place = plans.place_of(size)
    folder = (asked.folder or Path("runs/glm45_air_adamw_vs_lion") / place).resolve()
    from recipes.sweeping import run

    code = 0
    for words in () if asked.page else plans.commands(size, asked.epochs, folder, asked.parts, extra):
        if code := run(words):
            break
    from recipes.glm45_air_adamw_vs_lion.page import write  # matplotlib only where there is something to draw

    page, ticks = write(folder, place, asked.epochs)
    print(f"{ticks}\n{page}")
    return code


def _epochs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
