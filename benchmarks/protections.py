"""What do the things that let a run survive cost: checkpoints, the loss guard, the question whether to stop?

    python -m benchmarks.protections                 nano and wide on a CPU (20 minutes), llama_130m on a GPU
    python -m benchmarks.protections --models nano --rounds 10
    python -m benchmarks.protections --quick         does it run here?

*ours* is `training.fit` with the loss guard as by default and a checkpoint in each block; *off* is the same loop with
``callbacks.checkpoint`` and ``callbacks.loss_guard`` left out. They take turns within one process, block by block, in
an order shuffled every round. A block is as long as a default run is from one checkpoint to the next (a twentieth of
the demo's 800 steps); the save falls into its middle, so that the background thread writes beside the steps that
follow, and a block is not over before the disk has everything. Signals cost a look at one variable per step, in both.

*One save* is a `Store` on its own, with a model's weights and two moments per parameter: what the loop waits for (the
copy to host memory, the first of which allocates), and what the thread then takes to write, sync, read back and hash.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import presets
from benchmarks.record import Page, Table, keep, machine
from benchmarks.train_loop import Setting, arguments, hush, ours, row, setting_of
from benchmarks.turns import Body, Turns, alternate, spread
from lightning_opt.callbacks import Checkpoint, LossGuard
from lightning_opt.checkpoints import Store
from lightning_opt.run_folder import RunFolder


def protected(setting: Setting, block: int) -> Body:
    """Our loop with everything on; each turn waits for what is still being written."""
    directory = RunFolder(setting.folder).checkpoints
    loop = ours(setting, [LossGuard(), Checkpoint(every_n_steps=block, directory=directory)], after=block // 2)

    def body(between: Callable[[], None]) -> None:
        steps = itertools.count(1)

        def over() -> None:
            if next(steps) % block == 0:
                finish_writing()
            between()

        loop(over)

    return body


def finish_writing() -> None:
    """Waits for the threads that write checkpoints."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint-writer":
            thread.join()


def measure(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One model with and without; a row of the table."""
    setting = setting_of(name, args, folder, more_steps=args.block // 2)
    on, off = (replace(setting, folder=folder / kind) for kind in ("on", "off"))
    for each in (on, off):
        each.folder.mkdir()
    bodies = {"ours": protected(on, args.block), "off": ours(off, after=args.block // 2)}
    loops = {kind: Turns(body, args.block) for kind, body in bodies.items()}
    spent = alternate(loops, args.rounds, warm=args.warm)
    total = [sum(turn.wall for turn in spent[kind]) for kind in ("off", "ours")]
    saved = len(list(RunFolder(on.folder).checkpoints.glob("step-*")))
    return {**row(name, setting, spent, args.block), "all rounds, wall": total[0] / total[1], "checkpoints left": saved}


def one_save(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What a save costs whom; a row of the second table."""
    weights = presets.build(presets.preset(name), args.device).state_dict()
    moments = {i: {k: torch.zeros_like(w) for k in ("exp_avg", "exp_avg_sq")} for i, w in enumerate(weights.values())}
    tree = {"global_step": 0, "state_dict": weights, "optimizer_states": [{"state": moments, "param_groups": []}]}
    store, copies, writes = Store(folder), [], []
    for step in range(args.rounds + 1):
        with clocked(copies, args.device):
            store.save(tree, step=step, meta={})
        with clocked(writes, args.device):
            store.wait()
    if store.failures:
        raise RuntimeError(f"{store.failures} saves failed: is {folder} full?")
    size = sum(file.stat().st_size for file in (folder / f"step-{args.rounds:06d}").iterdir())
    return {
        "model": name,
        "MB": round(size / 1e6, 1),
        "loop waits, first ms": copies[0],
        "loop waits, then ms": spread(copies[1:], 2),
        "thread writes ms": spread(writes[1:], 1),
        "MB/s": round(size / 1e6 / statistics.median(writes[1:]) * 1e3),
    }


@contextmanager
def clocked(times: list[float], device: str) -> Iterator[None]:
    """Adds the milliseconds that the block takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    yield
    times.append((time.perf_counter() - start) * 1e3)


def main() -> None:
    """Measures, prints and keeps."""
    args = arguments(__doc__, 40)
    where = machine()
    hush()
    speeds, saves = [], []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            saves.append(one_save(name, args, Path(folder)))
        with tempfile.TemporaryDirectory() as folder:
            speeds.append(measure(name, args, Path(folder)))
        note = f"{args.rounds} rounds of {args.block} steps, one checkpoint in each. Goal: ours / off >= 0.98."
        tables = [Table("Tokens per second", speeds, note), Table("One save", saves, "Median (10-90 %).")]
        about = "By turns within one process; ratios are per round, median (10-90 %); see the module's text."
        page = Page("protections", "What protections cost", about, tables)
        keep(page, where, args.out, suffix="-quick" if args.quick else "", more=name != args.models[-1])


if __name__ == "__main__":
    main()
