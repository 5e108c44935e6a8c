"""How far is one optimizer step from the memory's speed? `python -m benchmarks.optimizer_step [--small]`

Every contender steps its own copy of the same tensors, all in turn within each round, so that a busy machine slows all
alike, in an order shuffled anew each round (seeded), so that nobody always follows the same neighbour. Right before
each of them a stream ``p -= c * g`` over one flat tensor with as many elements (12 bytes each) measures the bandwidth
of that moment. Floor of a rule = the bytes an ideal one-pass float32 step moves (Lion 20, AdamW 28 per parameter) at
that bandwidth. Reported are medians of per-round ratios: `cpu` is the process's CPU time (steady on a shared machine,
blind to parts that run on one thread), `wall` the clock. The 1M set fits the cache, its floor too.

Peers are measured where they are installed: pip install --no-deps lion-pytorch pytorch_optimizer torch-optimi.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while waiting would count as CPU time
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import gc
import importlib
import platform
import random
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import nn

from lightning_opt import kernels, optim

SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1}
TRAFFIC = {"lion": 20, "adamw": 28}


def shapes(hidden: int, layers: int, vocabulary: int, context: int) -> list[tuple[int, ...]]:
    """Parameter shapes of a GPT with tied embedding: fused qkv, biases, two norms with bias per layer."""
    layer = [(3 * hidden, hidden), (3 * hidden,), (hidden, hidden), (hidden,), (4 * hidden, hidden), (4 * hidden,)]
    layer += [(hidden, 4 * hidden), (hidden,)] + [(hidden,)] * 4
    return [(vocabulary, hidden), (context, hidden), *(layer * layers), (hidden,), (hidden,)]


SETS = {"27M": (512, 6, 16384, 1024), "nano": (128, 4, 2048, 256)}


def contenders() -> dict[str, tuple[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]]:
    """Name to (rule, constructor); peers only where they are installed."""
    found: dict[str, tuple[str, Callable]] = {}
    for name in optim.list_optimizers():
        cls = getattr(optim, optim.OPTIMIZERS[name])
        for way in kernels.possible(optim.find_rule(name)):
            found[f"ours {name} {way}"] = (name, lambda p, c=cls, w=way: c(p, implementation=w, **SETTINGS))
    for label, extra in {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}.items():
        found[f"torch AdamW {label}"] = ("adamw", lambda p, e=extra: torch.optim.AdamW(p, **SETTINGS, **e))
    peers = [("lion_pytorch", "Lion", "lion"), ("pytorch_optimizer", "Lion", "lion"), ("optimi", "Lion", "lion")]
    for module, cls, rule in [*peers, ("optimi", "AdamW", "adamw")]:
        try:
            made = getattr(importlib.import_module(module), cls)
        except ImportError:
            continue
        found[f"{module} {cls}"] = (rule, lambda p, m=made: m(p, **SETTINGS))
    return found


def tensors(sizes: list[tuple[int, ...]], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(s, generator=generator) * 0.02) for s in sizes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 0.01
    return params


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(CPU seconds of the process, wall seconds)."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(sizes: list[tuple[int, ...]], rounds: int) -> list[dict[str, object]]:
    """One row per contender."""
    rows = []
    size = sum(torch.Size(shape).numel() for shape in sizes)
    weights, grads = torch.randn(size), torch.randn(size)

    def stream() -> None:
        weights.add_(grads, alpha=-1e-9)

    stream()
    for name, (rule, make) in contenders().items():
        params = tensors(sizes)
        optimizer = make(params)
        _, first = timed(optimizer.step)
        if any(p.grad is None or not torch.isfinite(p).all() for p in params):
            raise RuntimeError(f"{name} cleared its gradients or left a weight that is not finite")
        rows.append({"name": name, "rule": rule, "optimizer": optimizer, "first_s": first, "rounds": []})
    for _ in range(2):
        for row in rows:
            row["optimizer"].step()
    gc.disable()
    shuffled = random.Random(0)
    for _ in range(rounds):
        for row in shuffled.sample(rows, len(rows)):
            floor = timed(stream)
            row["rounds"].append((timed(row["optimizer"].step), floor))
    gc.enable()
    return rows


def table(rows: list[dict[str, object]], title: str) -> str:
    lines = [
        f"## {title}",
        "",
        "| optimizer | cpu / floor | wall / floor | wall / torch AdamW fused | wall median ms | first step s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    fused = next(row for row in rows if row["name"] == "torch AdamW fused")
    middle = statistics.median
    summary = []
    for row in rows:
        scale = TRAFFIC[row["rule"]] / 12
        cpu = middle(own[0] / (stream[0] * scale) for own, stream in row["rounds"])
        wall = middle(own[1] / (stream[1] * scale) for own, stream in row["rounds"])
        pairs = zip(row["rounds"], fused["rounds"], strict=True)
        against = middle(own[1] / other[1] for (own, _), (other, _) in pairs)
        milliseconds = 1e3 * middle(own[1] for own, _ in row["rounds"])
        summary.append((wall, f"| {row['name']} | {cpu:.2f} | {wall:.2f} | {against:.2f} | {milliseconds:.2f} "
                              f"| {row['first_s']:.1f} |"))  # fmt: skip
    return "\n".join([*lines, *(text for _, text in sorted(summary)), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="only the shapes of the default model (1M parameters)")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=None, help="torch's own choice by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    pages = []
    for name in ["nano"] if args.small else list(SETS):
        sizes = shapes(*SETS[name])
        weights = sum(torch.Size(s).numel() for s in sizes)
        title = f"{name} set: {weights / 1e6:.2f}M parameters in {len(sizes)} tensors, float32"
        pages.append(table(measure(sizes, args.rounds if name == "27M" else 4 * args.rounds), title))
        gc.collect()
    head = (
        f"# One optimizer step against the memory's speed, {date.today()}\n\n"
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}. Load before the run {load:.1f}: a machine "
        "shared with other work; read the ratios, not the milliseconds.\n\n"
        "Made by `python -m benchmarks.optimizer_step`; what the columns mean is said there.\n"
    )
    text = "\n".join([head, *pages])
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{date.today()}-optimizer_step{'-small' if args.small else ''}.md"
    path.write_text(text)
    print(text)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
