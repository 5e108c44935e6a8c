"""What do all callbacks together cost? The same Lightning loop with and without them, by turns.

    python -m benchmarks.callback_overhead               steps of 50 ms, in 3 minutes
    python -m benchmarks.callback_overhead --optimizer torch --sleep-ms 20
    python -m benchmarks.callback_overhead --experts     what looks after experts, each apart, on moe_nano: 10 minutes

A step does what training does to the callbacks (real gradients of a 1M-parameter model, clipping and update by our
Lion, a logger, a progress line every 10 steps) on top of a sleep of ``--sleep-ms``, the same in both. The two stand
still in turn, ten steps at a time, one of which logs. *more* is the processor time that a step takes more with
callbacks, the steadier figure where other work shares the machine; *share* is that over the time of a step without.

With ``--experts`` a step is one of moe_nano on 8 x 256 random tokens, nothing else and no sleep, and *share* is of its
processor time. Rates are so small that no weight and no bias moves: all kinds route the same tokens to the same
experts, or the price of another load would be taken for that of a callback. Since steps vary by a tenth among
themselves, a second table says what a difference of steps cannot: the time spent inside the callbacks' own code and in
what listens to the routers, by the clock, as a share of the steps that hold it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from benchmarks import presets
from benchmarks.record import Page, Table, keep, machine
from benchmarks.train_loop import Handover
from benchmarks.turns import Body, Spent, Turns, alternate, spread
from lightning_opt import models
from lightning_opt.anatomy.expert_traffic import ExpertTraffic
from lightning_opt.callbacks import (
    ExpertBalance,
    ExpertLoadMonitor,
    Memory,
    Progress,
    RouterLosses,
    Stability,
    Throughput,
)
from lightning_opt.optim import AdamW, Lion

BLOCK = 10  # steps; one of them logs
EXPERTS: dict[str, Callable[[], list[pl.Callback]]] = {
    "without": list,
    "ExpertLoadMonitor, brief": lambda: [ExpertLoadMonitor()],
    "ExpertLoadMonitor, detailed": lambda: [ExpertLoadMonitor(keys="detailed")],
    "ExpertBalance": lambda: [ExpertBalance(rate=1e-12)],
    "ExpertLoadMonitor and ExpertBalance": lambda: [ExpertBalance(rate=1e-12), ExpertLoadMonitor()],
    "RouterLosses, balance": lambda: [RouterLosses(balance=1e-4)],
    "RouterLosses, balance and z": lambda: [RouterLosses(balance=1e-4, z=1e-3)],
}


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


class Mixture(pl.LightningModule):
    """moe_nano, and nothing beside its training step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = presets.build(presets.preset("moe_nano"))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of the next tokens."""
        ids = batch["input_ids"]
        return models.causal_lm_loss(self.model, ids[:, :-1], ids[:, 1:]).total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """At a rate that moves nothing."""
        return AdamW(self.parameters(), lr=1e-12, weight_decay=0.0, max_grad_norm=1.0)


class Silent(pl.loggers.logger.Logger):
    """A logger that costs nothing."""

    name, version = "silent", "0"

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Nothing."""


def fit(module: Callable[[], pl.LightningModule], watchers: list[pl.Callback], steps: int, root: str) -> Body:
    """A Lightning loop over random tokens, the same in every loop."""

    def body(between: Callable[[], None]) -> None:
        trainer = pl.Trainer(
            max_steps=steps,
            callbacks=[*watchers, Handover(between)],
            logger=Silent(),
            log_every_n_steps=BLOCK,
            accelerator="cpu",
            enable_checkpointing=False,
            enable_progress_bar=any(isinstance(each, Progress) for each in watchers),
            enable_model_summary=False,
            default_root_dir=root,
        )
        rows = torch.randint(0, 999, (8, 257), generator=torch.Generator().manual_seed(0))
        trainer.fit(module(), torch.utils.data.DataLoader([{"input_ids": row} for row in rows] * steps, batch_size=8))

    return body


def all_together(options: argparse.Namespace, steps: int, root: str) -> Table:
    """The callbacks that every run has."""
    module = lambda: Timed(options.sleep_ms / 1e3, options.optimizer == "ours")  # noqa: E731
    watchers = [Memory(), Stability(), Throughput(), Progress(stream=io.StringIO())]
    bodies = {"with": fit(module, watchers, steps, root), "without": fit(module, [], steps, root)}
    spent = alternate({kind: Turns(body, BLOCK) for kind, body in bodies.items()}, options.rounds, warm=options.warm)
    row = {"optimizer": options.optimizer, **compared(spent["with"], spent["without"], "wall")}
    return Table("Memory, Stability, Throughput and Progress together", [row], "Median (10-90 %). Goal: below 1 %.")


def of_experts(options: argparse.Namespace, steps: int, root: str) -> Table:
    """Each that looks after experts."""
    bodies = {kind: fit(Mixture, make(), steps, root) for kind, make in EXPERTS.items()}
    spent = alternate({kind: Turns(body, BLOCK) for kind, body in bodies.items()}, options.rounds, warm=options.warm)
    bare = spent.pop("without")
    rows = [{"callbacks": kind, **compared(blocks, bare, "cpu")} for kind, blocks in spent.items()]
    note = "Median (10-90 %). Goal: the monitor below 1 %. RouterLosses are off by default."
    return Table("What looks after experts, moe_nano, 8 x 256 tokens a step", rows, note)


class Inside:
    """Seconds that this thread spends in the methods of some classes, calls from one to another counted once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    @contextlib.contextmanager
    def watching(self, classes: tuple[type, ...]) -> Iterator[None]:
        """Wraps every method while it lasts."""
        methods = [
            (c, n, f) for c in classes for n, f in vars(c).items() if inspect.isfunction(f) and not n.startswith("__")
        ]
        for owner, name, method in methods:
            setattr(owner, name, self._timed(method))
        try:
            yield
        finally:
            for owner, name, method in methods:
                setattr(owner, name, method)

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            since = time.perf_counter()
            self._depth += 1
            try:
                return method(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - since

        return timed


def own_time(options: argparse.Namespace, steps: int, root: str) -> Table:
    """Of the monitor and of who moves the bias."""
    rows = []
    for kind, make in EXPERTS.items():
        if kind == "without" or "RouterLosses" in kind:  # they stand around the training step itself
            continue
        inside, marks = Inside(), []
        with inside.watching((ExpertTraffic, ExpertLoadMonitor, ExpertBalance)):
            fit(Mixture, make(), steps, root)(lambda: marks.append((time.perf_counter(), inside.seconds)))  # noqa: B023
        blocks = list(zip(marks[::BLOCK], marks[BLOCK::BLOCK], strict=False))[options.warm :]
        wall, own = ([after[k] - before[k] for before, after in blocks] for k in (0, 1))
        row = {"callbacks": kind, "own ms of a step": spread([seconds / BLOCK * 1e3 for seconds in own], 3)}
        shares = [mine / whole for mine, whole in zip(own, wall, strict=True)]
        rows.append({**row, "share": f"{statistics.median(shares):.2%}", "worst block": f"{max(shares):.2%}"})
    return Table(
        "Time inside their own code", rows, f"Median (10-90 %) over blocks of {BLOCK} steps, one of which logs."
    )


def compared(watched: list[Spent], bare: list[Spent], clock: str) -> dict[str, Any]:
    """Columns of a row; *share* is of a step's time by this clock."""
    pairs = list(zip(watched, bare, strict=True))
    step_ms = statistics.median(getattr(block, clock) for block in bare) / BLOCK * 1e3
    more = [(one.cpu - other.cpu) / BLOCK * 1e3 for one, other in pairs]
    return {
        "step without ms": step_ms,
        "with / without, wall": spread([one.wall / other.wall for one, other in pairs], 4),
        "more ms, cpu": spread(more),
        "share": f"{statistics.median(more) / step_ms:.2%}",
        "rounds": len(pairs),
    }


def main() -> None:
    """Measures, prints and keeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sleep-ms", type=float, default=50.0, help="sleep in each step, work on top (50)")
    parser.add_argument("--rounds", type=int, default=None, help="blocks of 10 steps, of each kind (50; experts: 20)")
    parser.add_argument("--optimizer", choices=["ours", "torch"], default="ours")
    parser.add_argument("--experts", action="store_true", help="callbacks of mixtures instead")
    parser.add_argument("--quick", action="store_true", help="two rounds of short steps")
    parser.add_argument("--out", type=Path, default=None, help="folder (benchmarks/results)")
    options = parser.parse_args()
    options.warm, options.rounds = 2, options.rounds or (20 if options.experts else 50)
    if options.quick:
        options.warm, options.rounds, options.sleep_ms = 1, 2, 1.0
    where = machine()
    warnings.filterwarnings("ignore")
    for noisy in ("lightning.pytorch", "lightning_opt"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    steps = (options.rounds + options.warm) * BLOCK + 1
    with tempfile.TemporaryDirectory() as root:
        parts = (of_experts, own_time) if options.experts else (all_together,)
        tables = [part(options, steps, root) for part in parts]
    about = "With and without by turns, ten steps at a time; see the module's text."
    suffix = f"{'-experts' if options.experts else ''}{'-quick' if options.quick else ''}"
    keep(Page("callback_overhead", "What the callbacks cost", about, tables), where, options.out, suffix=suffix)


if __name__ == "__main__":
    main()
