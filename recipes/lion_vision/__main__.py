"""Lion, AdamW, RAdam, NAdam, AdaBelief and AMSGrad on scikit-learn's digits: ``python -m recipes.lion_vision``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

_EXAMPLES = """examples:
  python -m recipes.lion_vision                  # a ViT and a ResNet: about 15 minutes on 2 cores
  python -m recipes.lion_vision --models vit --epochs 40
  python -m recipes.lion_vision --quick          # does it run here?
The same command again runs what is missing.
"""


def main(arguments: list[str] | None = None) -> int:
    """Trains and writes the page; 0."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.lion_vision",
        description="A small ViT and a small ResNet under six optimizers, each at its own best rate, as one page.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=("vit", "resnet"), default=["vit", "resnet"])
    parser.add_argument("--epochs", type=int, default=30, help="of each run (30)")
    parser.add_argument("--folder", type=Path, default=Path("runs/lion_vision"), help="of results and page")
    parser.add_argument("--quick", action="store_true", help="one epoch, two rates, two seeds")
    asked = parser.parse_args(arguments)
    from recipes.lion_vision import trials  # torch and lightning only once the input is found right
    from recipes.lion_vision.page import write

    asked.folder.mkdir(parents=True, exist_ok=True)
    ledger = trials.Ledger(asked.folder / "results.jsonl")
    epochs, multiples, seeds = asked.epochs, trials.MULTIPLES, trials.FRESH_SEEDS
    if asked.quick:
        epochs, multiples, seeds = 1, (1.0, 2.0), (1, 2)
    found = {model: trials.standings(ledger, model, epochs, multiples, seeds) for model in asked.models}
    words = [f"--models {' '.join(asked.models)}", f"--epochs {asked.epochs}", "--quick" if asked.quick else ""]
    print(write(asked.folder, found, f"python -m recipes.lion_vision {' '.join(filter(None, words))}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
