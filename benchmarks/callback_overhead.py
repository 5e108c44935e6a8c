"""What do all callbacks together cost? The same Lightning loop with and without them, by turns.

    python -m benchmarks.callback_overhead               steps of 50 ms, in 3 minutes
    python -m benchmarks.callback_overhead --optimizer torch --sleep-ms 20

A step does what training does to the callbacks (real gradients of a 1M-parameter model, clipping and update by our
Lion, a logger, a progress line every 10 steps) on top of a sleep of ``--sleep-ms``, the same in both. The two stand
still in turn, ten steps at a time, one of which logs. *more* is the processor time that a step takes more with
callbacks, the steadier figure where other work shares the machine; *share* is that over the time of a step without.
"""

from __future__ import annotations

import argparse
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from benchmarks.record import Page, Table, keep, machine
from benchmarks.train_loop import Handover
from benchmarks.turns import Body, Turns, alternate, spread
from lightning_opt.callbacks import Memory, Progress, Stability, Throughput
from lightning_opt.optim import Lion

BLOCK = 10  # steps; one of them logs


class Timed(pl.LightningModule):
    """Sixteen blocks of 256 x 256; every step sleeps as long as asked, and then does its work."""

    def __init__(self, sleep_s: float, ours: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*[nn.Linear(256, 256) for _ in range(16)])
        self.sleep_s, self.ours = sleep_s, ours

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Sleeps, then works: the same in both."""
        time.sleep(self.sleep_s)
        return self.net(batch["input_ids"].float()[:, :256] / 1e3).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Ours, or torch's AdamW whose gradient norm Stability has to compute itself."""
        if self.ours:
            return Lion(self.parameters(), lr=1e-5, max_grad_norm=1.0, implementation="foreach")
        return torch.optim.AdamW(self.parameters(), lr=1e-5)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """As `PretrainModule` does."""
        if self.ours:
            self.optimizers(use_pl_optimizer=False).clip_()


class Silent(pl.loggers.logger.Logger):
    """A logger that costs nothing."""

    name, version = "silent", "0"

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Nothing."""


def fit(watched: bool, steps: int, sleep_s: float, ours: bool) -> Body:
    def body(between: Callable[[], None]) -> None:
        watchers = [Memory(), Stability(), Throughput(), Progress(stream=io.StringIO())] if watched else []
        trainer = pl.Trainer(
            max_steps=steps,
            callbacks=[*watchers, Handover(between)],
            logger=Silent(),
            log_every_n_steps=BLOCK,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=watched,
            enable_model_summary=False,
        )
        rows = [{"input_ids": torch.randint(0, 999, (257,))}] * 8 * steps
        trainer.fit(Timed(sleep_s, ours), torch.utils.data.DataLoader(rows, batch_size=8))

    return body


def main() -> None:
    """Measures, prints and keeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sleep-ms", type=float, default=50.0, help="sleep in each step, work on top (50)")
    parser.add_argument("--rounds", type=int, default=50, help="blocks of 10 steps, with and without (50)")
    parser.add_argument("--optimizer", choices=["ours", "torch"], default="ours")
    parser.add_argument("--quick", action="store_true", help="two rounds of short steps")
    parser.add_argument("--out", type=Path, default=None, help="folder (benchmarks/results)")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.sleep_ms = 2, 1.0
    where = machine()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warm = 2
    steps = (options.rounds + warm) * BLOCK + 1
    kinds = {"with": True, "without": False}
    loops = {
        kind: Turns(fit(watched, steps, options.sleep_ms / 1e3, options.optimizer == "ours"), BLOCK)
        for kind, watched in kinds.items()
    }
    spent = alternate(loops, options.rounds, warm=warm)
    pairs = list(zip(spent["with"], spent["without"], strict=True))
    step_ms = statistics.median(without.wall for _, without in pairs) / BLOCK * 1e3
    more = [(watched.cpu - without.cpu) / BLOCK * 1e3 for watched, without in pairs]
    row = {
        "optimizer": options.optimizer,
        "step without ms": step_ms,
        "with / without, wall": spread([watched.wall / without.wall for watched, without in pairs], 4),
        "more ms, cpu": spread(more),
        "share": f"{statistics.median(more) / step_ms:.2%}",
        "rounds": options.rounds,
    }
    table = Table("Memory, Stability, Throughput and Progress together", [row], "Median (10-90 %). Goal: below 1 %.")
    about = "With and without by turns, ten steps at a time; see the module's text."
    suffix = "-quick" if options.quick else ""
    keep(Page("callback_overhead", "What the callbacks cost", about, [table]), where, options.out, suffix=suffix)


if __name__ == "__main__":
    main()
