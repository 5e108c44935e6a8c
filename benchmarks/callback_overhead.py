"""What do all callbacks together cost? One training loop with and without them, run by turns.

Run: ``python -m benchmarks.callback_overhead --sleep-ms 50 --steps 60 --pairs 3``

A step does what training does to the callbacks (real gradients of a 1M-parameter model, clipping and update by our
Lion, a logger, a progress line every 10 steps) on top of a sleep of ``--sleep-ms``, the same in both runs: it lasts the
sleep and the work, as the column *without ms* tells. Printed per pair: wall time of a step with and without, their
ratio, and the processor time that a step takes more with callbacks: the steadier figure where other work shares the
machine. Each is the mean of the run's least disturbed block of 10 steps, one of which logs; the first 10 steps of each
run do not count.
"""

from __future__ import annotations

import argparse
import io
import logging
import statistics
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_opt.callbacks import Memory, Progress, Stability, Throughput
from lightning_opt.optim import Lion

SKIPPED = 10


class Timed(pl.LightningModule):
    """Sixteen blocks of 256 x 256; every step sleeps as long as asked, and then does its work."""

    def __init__(self, sleep_s: float, ours: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*[nn.Linear(256, 256) for _ in range(16)])
        self.sleep_s, self.ours = sleep_s, ours
        self.walls: list[float] = []
        self.processor: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Sleeps, then works: the same in both runs."""
        self.walls.append(time.perf_counter())
        self.processor.append(time.process_time())
        time.sleep(self.sleep_s)
        loss = self.net(batch["input_ids"].float()[:, :256] / 1e3).square().mean()
        self.log("train/loss", loss)
        return loss

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


def run(callbacks: list[pl.Callback], steps: int, sleep_s: float, ours: bool) -> tuple[float, float]:
    """Wall and processor milliseconds of a step."""
    module = Timed(sleep_s, ours)
    trainer = pl.Trainer(
        max_steps=steps + SKIPPED + 1,
        callbacks=callbacks,
        logger=Silent(),
        log_every_n_steps=10,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=bool(callbacks),
        enable_model_summary=False,
    )
    rows = [{"input_ids": torch.randint(0, 999, (257,))} for _ in range(64)]
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=8))
    return best(module.walls, steps), best(module.processor, steps)


def best(marks: list[float], steps: int) -> float:
    """Milliseconds of a step in the least disturbed block of 10, each of which holds one step that logs."""
    starts = range(SKIPPED, SKIPPED + steps, 10)
    return min(marks[start + 10] - marks[start] for start in starts) / 10 * 1e3


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sleep-ms", type=float, default=50.0, help="sleep in each step, work on top (default 50)")
    parser.add_argument("--steps", type=int, default=60, help="counted steps per run (default 60)")
    parser.add_argument("--pairs", type=int, default=3, help="runs with and without (default 3)")
    parser.add_argument("--optimizer", choices=["ours", "torch"], default="ours")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ours = options.optimizer == "ours"
    more, ratios = [], []
    print(f"{'pair':>4} {'without ms':>11} {'with ms':>9} {'ratio':>8} {'processor ms more':>18} {'share of step':>14}")
    for pair in range(options.pairs):
        both = {}
        for watched in (False, True) if pair % 2 else (True, False):
            callbacks = [Memory(), Stability(), Throughput(), Progress(stream=io.StringIO())] if watched else []
            both[watched] = run(callbacks, options.steps, options.sleep_ms / 1e3, ours)
        ratios.append(both[True][0] / both[False][0])
        more.append(both[True][1] - both[False][1])
        share = more[-1] / both[False][0]
        print(f"{pair:4} {both[False][0]:11.2f} {both[True][0]:9.2f} {ratios[-1]:8.4f} {more[-1]:18.3f} {share:14.2%}")
    print(f"median: ratio {statistics.median(ratios):.4f}, processor {statistics.median(more):.3f} ms per step")


if __name__ == "__main__":
    main()
