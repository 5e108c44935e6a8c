"""How far is one optimizer step from the memory's speed? `python -m benchmarks.optimizer_step [--small | --quick]`

All contenders step the same tensors, in turn, in an order shuffled anew each round (seeded), each with a state of its
own. Right before each of them the stream ``p.add_(g, alpha=...)`` runs over these very tensors, one call per tensor:
the bandwidth of that moment. The floor of a contender is what an ideal pass would move (weight read and written,
gradient read, its own state read and written: 20 bytes per float32 parameter for Lion, 28 for AdamW) at that bandwidth.
Once a round the same stream runs over one flat float32 tensor of as many bytes: no calls per tensor, the best torch
does in place (column "/ flat", the stricter one where tensors are small and calls cost more than memory). Both
yardsticks write what they read; a copy would look 1.5 times slower.

Peers that are not installed are named above the table (extra `peers`): pip install --no-deps lion-pytorch
pytorch_optimizer torch-optimi bitsandbytes. A contender that clears its gradients is left out: without them a step
costs nothing. One that overwrites them is named so and gets them back after each step, untimed. The first step is
timed with the making of the optimizer, since some compile there; each table starts from empty compile caches.
"""

from __future__ import annotations

import argparse
import os

# Waiting OpenMP threads spin for a millisecond or more, as torch's users have it. On a machine shared with other work
# that steals the cores they wait for: there they sleep almost at once. Must be said before torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "2000" if os.getloadavg()[0] > 0.7 else "300000")

import contextlib
import gc
import importlib
import io
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import record
from lightning_opt import kernels, optim

SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1}
YARDSTICK = "torch AdamW fused"
ABOUT = (
    "`cpu` is the process's CPU time over its threads (on CUDA: `gpu`, time between events), `wall` the clock; both as "
    "multiples of the floor, medians over rounds with the 10 to 90 % spread. `/ flat` is wall against the flat stream, "
    "`/ fused` against torch's fused AdamW in the same round, `/ peer` against the fastest peer of its rule (named "
    "above the table) in the same round, with the 10 to 90 % spread. `first step s` holds the making of the optimizer "
    "and what is compiled for it, from empty caches. The floors are explained at the top of the module. "
    + ("The machine was quiet." if os.environ["GOMP_SPINCOUNT"] == "300000" else "The machine was shared: read `cpu`.")
)


@dataclass(frozen=True)
class Setting:
    """One table: the shapes of a GPT with tied embedding, and how many rounds."""

    hidden: int
    layers: int
    vocabulary: int
    context: int
    rounds: int
    slow: bool = True  # also the ways of many small calls

    def shapes(self) -> list[tuple[int, ...]]:
        """Fused qkv, biases, two norms with bias per layer."""
        h = self.hidden
        layer = [(3 * h, h), (3 * h,), (h, h), (h,), (4 * h, h), (4 * h,), (h, 4 * h), (h,), *[(h,)] * 4]
        return [(self.vocabulary, h), (self.context, h), *(layer * self.layers), (h,), (h,)]


SETS = {
    "nano": Setting(128, 4, 2048, 256, rounds=60),
    "27M": Setting(512, 6, 16384, 1024, rounds=15),
    "124M": Setting(768, 12, 50257, 1024, rounds=9, slow=False),
}


@dataclass
class Contender:
    """Something that steps, and what was measured of it."""

    name: str
    rule: str
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    slow: bool = False
    compiles: bool = False
    step: Callable[[], Any] = lambda: None
    traffic: float = 0.0  # bytes per parameter of an ideal step
    state: float = 0.0  # bytes per parameter
    first_s: float = 0.0
    overwrites: bool = False  # its own gradients
    left_out: str = ""  # why, where it is
    own: list[tuple[float, float]] = field(default_factory=list)  # (busy, wall) per round, seconds
    floor: list[tuple[float, float]] = field(default_factory=list)

    @property
    def ours(self) -> bool:
        """Whether it is one of this repository's."""
        return self.name.startswith("ours")

    @property
    def wall(self) -> float:
        """Median seconds of a step by the clock."""
        return statistics.median(wall for _, wall in self.own)


def ours(dtype: torch.dtype) -> Iterator[Contender]:
    """Every implementation of every optimizer of ours; with narrow state too where the weights are narrow."""
    for name in optim.list_optimizers():
        cls = getattr(optim, optim.OPTIMIZERS[name])
        for state in ("float32", "bfloat16") if dtype == torch.bfloat16 else ("float32",):
            for way in kernels.possible(optim.find_rule(name)):
                if way == "fused" and dtype == torch.bfloat16:
                    continue  # torch's kernel takes one dtype only, and our second moment stays float32
                label = f"ours {name} {way}" + (f", {state} state" if dtype == torch.bfloat16 else "")
                keys = {"implementation": way, "state_dtype": state, **SETTINGS}
                yield Contender(label, name, lambda p, c=cls, k=keys: c(p, **k), slow=way == "eager")


def torchs() -> Iterator[Contender]:
    """torch.optim.AdamW in all its ways."""
    for label, keys in {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}.items():
        make = lambda p, k=keys: torch.optim.AdamW(p, **SETTINGS, **k)  # noqa: E731
        yield Contender(f"torch AdamW {label}", "adamw", make, slow=label == "default")
    yield Contender("torch AdamW compiled", "adamw", _torch_compiled, compiles=True)


def _torch_compiled(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    rate = torch.tensor(SETTINGS["lr"], device=params[0].device)
    optimizer = torch.optim.AdamW(params, **SETTINGS | {"lr": rate}, foreach=True, capturable=True)
    optimizer.step = torch.compile(optimizer.step)
    return optimizer


def peers(device: str) -> Iterator[Contender]:
    """Each in every way it offers for this device; one that is not installed says so when it is made."""
    triton = [{"triton": True}] if device == "cuda" else []
    for cls in ("Lion", "AdamW"):
        for keys in ({"foreach": False, "triton": False}, {"foreach": True}, *triton):
            word = next((key for key, value in keys.items() if value), "for-loop")
            yield from _peer("optimi", cls, f"torch-optimi {cls} {word}", keys, slow=word == "for-loop")
        yield from _peer("bitsandbytes.optim", cls, f"bitsandbytes {cls}", {})
    yield from _peer("lion_pytorch", "Lion", "lion-pytorch Lion for-loop", {}, slow=True)
    yield from _peer("lion_pytorch.foreach", "Lion", "lion-pytorch Lion foreach", {})
    if device == "cuda":
        yield from _peer("lion_pytorch", "Lion", "lion-pytorch Lion triton", {"use_triton": True})
    for keys in ({"foreach": False}, {"foreach": True}):
        word = "foreach" if keys["foreach"] else "for-loop"
        yield from _peer("pytorch_optimizer", "Lion", f"pytorch-optimizer Lion {word}", keys, slow=word == "for-loop")
    yield Contender("pytorch-optimizer Lion compiled", "lion", _pytorch_optimizer_compiled, compiles=True)


def _peer(module: str, cls: str, name: str, keys: dict[str, Any], slow: bool = False) -> Iterator[Contender]:
    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        with contextlib.redirect_stdout(io.StringIO()):  # bitsandbytes reports what it did not find
            made = getattr(importlib.import_module(module), cls)
        return made(params, **SETTINGS, **keys)

    yield Contender(name, cls.lower(), make, slow=slow)


def _pytorch_optimizer_compiled(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    create = importlib.import_module("pytorch_optimizer").create_optimizer
    settings = {**SETTINGS, "wd_ban_list": (), "compile": True, "foreach": True}
    return create(nn.ParameterList(params), "lion", **settings)


def tensors(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """Weights with gradients, the same every time."""
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda s: torch.randn(s, generator=generator, device=device).mul_(0.02).to(dtype)  # noqa: E731
    params = [nn.Parameter(draw(s)) for s in shapes]
    for p in params:
        p.grad = draw(p.shape)
    return params


def timed(work: Callable[[], object], device: str) -> tuple[float, float]:
    """(busy seconds: CPU time per thread, or GPU time between events; wall seconds)."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        wall = time.perf_counter()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, time.perf_counter() - wall
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return (time.process_time() - cpu) / torch.get_num_threads(), time.perf_counter() - wall


def prepare(contender: Contender, params: list[nn.Parameter], kept: list[Tensor], device: str) -> bool:
    """Takes the first steps; False where the contender cannot run here or clears its gradients. `kept`: copies."""
    grads = [p.grad for p in params]
    made: list[torch.optim.Optimizer] = []

    def begin() -> None:
        made.append(contender.make(params))
        made[0].step()

    try:
        _, contender.first_s = timed(begin, device)
        [optimizer] = made
        contender.step = optimizer.step
        for _ in range(2):
            contender.step()
    except Exception as error:  # a peer may fail on this device or dtype in any way; the others go on
        return leave_out(contender, (str(error) or repr(error)).splitlines()[0])
    if any(p.grad is not g for p, g in zip(params, grads, strict=True)):
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        return leave_out(contender, "it clears its gradients")
    if not all(torch.equal(g, k) for g, k in zip(grads, kept, strict=True)):
        contender.overwrites = True
        contender.name += " (overwrites gradients)"
        torch._foreach_copy_(grads, kept)
    held = (t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
    contender.state = sum(t.nbytes for t in held) / sum(p.numel() for p in params)
    contender.traffic = 3 * params[0].element_size() + 2 * contender.state
    return True


def leave_out(contender: Contender, why: str) -> bool:
    """Says why a contender is not in the table; False."""
    contender.left_out = why
    print(f"{contender.name} left out: {why}", flush=True)
    return False


def measure(
    setting: Setting, dtype: torch.dtype, device: str, compiles: bool, rounds: int | None
) -> tuple[list[Contender], list[tuple[float, float]], str]:
    """Contenders with their rounds, the rounds of the flat stream, and who was left out why."""
    params = tensors(setting.shapes(), dtype, device)
    weights, grads = [p.detach() for p in params], [p.grad for p in params]
    kept = [g.clone() for g in grads]
    flat = torch.zeros(sum(p.nbytes for p in params) // 4, device=device)
    other = torch.zeros_like(flat)

    def stream() -> None:
        for p, g in zip(weights, grads, strict=True):
            p.add_(g, alpha=-1e-9)

    every = [*ours(dtype), *torchs(), *peers(device)]
    kernels.native._library.cache_clear()  # what an earlier table compiled, and the look at what is possible
    for c in every:
        if c.compiles and not compiles:
            leave_out(c, "--quick takes no time to compile it")
        elif c.slow and not setting.slow:
            leave_out(c, "slow by its many calls: see the smaller set")
    contenders = [c for c in every if not c.left_out and prepare(c, params, kept, device)]
    flats = []
    stream()
    gc.disable()
    shuffled = random.Random(0)
    for _ in range(rounds or setting.rounds):
        flats.append(timed(lambda: flat.add_(other, alpha=-1e-9), device))
        for contender in shuffled.sample(contenders, len(contenders)):
            contender.floor.append(timed(stream, device))
            contender.own.append(timed(contender.step, device))
            if contender.overwrites:
                torch._foreach_copy_(grads, kept)
    gc.enable()
    if not all(torch.isfinite(w).all() for w in weights):
        raise RuntimeError("a contender left a weight that is not finite")
    reasons = dict.fromkeys(c.left_out for c in every if c.left_out)
    absent = [f"{', '.join(c.name for c in every if c.left_out == why)} ({why})" for why in reasons]
    return contenders, flats, f" Left out: {'; '.join(absent)}." if absent else ""


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """10 %, 50 % and 90 % of the values."""
    ordered = sorted(values)
    at = lambda share: ordered[min(len(ordered) - 1, math.floor(share * len(ordered)))]  # noqa: E731
    return at(0.1), statistics.median(ordered), at(0.9)


def rows_of(contenders: list[Contender], flats: list[tuple[float, float]], width: int, busy: str) -> list[dict]:
    """One row per contender, fastest first; the streams themselves on top. `width`: bytes of a weight."""
    fused = next(c for c in contenders if c.name == YARDSTICK)
    rivals = fastest_peers(contenders)
    rows = []
    for c in contenders:
        parts = [spread([own[k] / floor[k] * 3 * width / c.traffic for own, floor in zip(c.own, c.floor, strict=True)])
                 for k in (0, 1)]  # fmt: skip
        pairs = [own[1] / flat[1] * 3 * width / c.traffic for own, flat in zip(c.own, flats, strict=True)]
        rows.append({
            "optimizer": c.name,
            f"{busy} / floor": parts[0][1],
            f"{busy} 10-90 %": f"{parts[0][0]:.2f} to {parts[0][2]:.2f}",
            "wall / floor": parts[1][1],
            "wall 10-90 %": f"{parts[1][0]:.2f} to {parts[1][2]:.2f}",
            "wall / flat": statistics.median(pairs),
            "wall / fused": statistics.median(a[1] / b[1] for a, b in zip(c.own, fused.own, strict=True)),
            f"{busy} / peer": against(c, rivals.get(c.rule), 0),
            "wall / peer": against(c, rivals.get(c.rule), 1),
            "wall ms": 1e3 * c.wall,
            "first step s": c.first_s,
            "floor bytes": round(c.traffic, 2),
            "state bytes": round(c.state, 2),
        })  # fmt: skip
    return sorted(rows, key=lambda row: row["wall ms"])


def fastest_peers(contenders: list[Contender]) -> dict[str, Contender]:
    """The peer of the shortest step by the clock, for each rule."""
    peers = sorted((c for c in contenders if not c.ours), key=lambda c: c.wall, reverse=True)
    return {c.rule: c for c in peers}  # the last of each rule, the fastest, stays


def against(contender: Contender, rival: Contender | None, k: int) -> str | None:
    """Ours over the rival in the same rounds, with its spread; `k`: 0 busy, 1 wall. None for a peer, or without one."""
    if rival is None or not contender.ours:
        return None
    low, middle, high = spread([a[k] / b[k] for a, b in zip(contender.own, rival.own, strict=True)])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def streams_of(contenders: list[Contender], flats: list[tuple[float, float]], params: int, width: int) -> str:
    """How fast the two yardsticks were, and who the fastest peers."""
    moved = 3 * width * params / 1e9
    floors = [wall for c in contenders for _, wall in c.floor]
    same, flat = moved / statistics.median(floors), moved / statistics.median(wall for _, wall in flats)
    rivals = ", ".join(f"{rival.name} for {rule}" for rule, rival in sorted(fastest_peers(contenders).items()))
    return (
        f"The stream over the same tensors ran at {same:.1f} GB/s, over one flat tensor at {flat:.1f} GB/s (wall). "
        f"Fastest peers: {rivals}."
    )


def draw(tables: Sequence[record.Table], path: Path) -> None:
    """A bar per contender: wall time over its floor, with its spread."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(tables), 1, figsize=(9, sum(0.26 * len(t.rows) + 1 for t in tables)), squeeze=False,
        height_ratios=[len(t.rows) + 3 for t in tables], layout="constrained",
    )  # fmt: skip
    for axis, table in zip(axes[:, 0], tables, strict=True):
        rows = list(reversed(table.rows))
        middle = [row["wall / floor"] for row in rows]
        ends = [[float(end) for end in row["wall 10-90 %"].split(" to ")] for row in rows]
        error = [[max(0.0, m - low) for m, (low, _) in zip(middle, ends, strict=True)],
                 [max(0.0, high - m) for m, (_, high) in zip(middle, ends, strict=True)]]  # fmt: skip
        colors = ["#1f6f8b" if row["optimizer"].startswith("ours") else "#b0b7bd" for row in rows]
        axis.barh([row["optimizer"] for row in rows], middle, xerr=error, color=colors, ecolor="#444", capsize=2)
        axis.axvline(1.0, color="#c0392b", linewidth=1)
        axis.set_title(table.title, loc="left", fontsize=10)
        axis.set_xlabel("wall time / floor of the same tensors (1 = the memory's speed)")
        axis.tick_params(labelsize=8)
        axis.margins(y=0.01)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="The whole run takes 5 minutes and 14 GB on 2 cores; start it on a quiet machine (load below 0.7).",
    )
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--small", action="store_true", help="only the shapes of the default model (1M parameters)")
    parser.add_argument("--quick", action="store_true", help="that in float32, without torch.compile: a few seconds")
    parser.add_argument("--rounds", type=int, help="of each set; by default as many as its size needs")
    parser.add_argument("--threads", type=int, help="torch's own choice by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    args.sets = ["nano"] if args.small or args.quick else args.sets
    args.dtypes = ["float32"] if args.quick else args.dtypes
    return args


def main() -> None:
    args = options()
    if args.threads:
        torch.set_num_threads(args.threads)
    where, tables = record.machine(), []
    for dtype in args.dtypes:
        for name in args.sets:
            with tempfile.TemporaryDirectory(prefix="optimizer_step-", ignore_cleanup_errors=True) as cache:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = cache
                tables.append(table(name, dtype, args))
            keep_tables(tables, args, where, more=True)
            torch._dynamo.reset()
            gc.collect()
    keep_tables(tables, args, where)


def table(name: str, dtype: str, args: argparse.Namespace) -> record.Table:
    """Measures one set in one dtype."""
    shapes, kind = SETS[name].shapes(), getattr(torch, dtype)
    size = sum(math.prod(shape) for shape in shapes)
    contenders, flats, absent = measure(SETS[name], kind, args.device, not args.quick, args.rounds)
    rows = rows_of(contenders, flats, kind.itemsize, "gpu" if args.device == "cuda" else "cpu")
    title = f"{name}: {size / 1e6:.2f}M parameters in {len(shapes)} tensors, {dtype}"
    return record.Table(title, rows, streams_of(contenders, flats, size, kind.itemsize) + absent)


def keep_tables(
    tables: Sequence[record.Table], args: argparse.Namespace, where: dict[str, Any], more: bool = False
) -> None:
    """Keeps the page of what was measured so far, at the end with its plot."""
    suffix = "-quick" if args.quick else "-small" if args.small else ""
    plots = [] if more else [f"{where['date']}-optimizer_step{suffix}.png"]
    args.out.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        draw(tables, args.out / plot)
    title = "One optimizer step against the memory's speed"
    page = record.Page("optimizer_step", title, ABOUT, tables, plots)
    record.keep(page, where, args.out, suffix=suffix, more=more)


if __name__ == "__main__":
    main()
