"""How far is one optimizer step from the hardware's limit? `python -m benchmarks.optimizer_step [--small | --quick]`

Every rule of ours in every way, and the peers that have the same rule (`benchmarks.step_contenders`), rule by rule. The
contenders of a rule step the same tensors, in turn, in an order shuffled anew each round (seeded), each with a state of
its own, and torch's fused AdamW with them. Right before each of them the stream ``p.add_(g, alpha=...)`` runs over
these very tensors, one call per tensor: the bandwidth of that moment. The floor of a contender is what its rule must
move (`Rule.traffic`: weight read and written, gradient read, states read and written, and what a rule that needs a sum
first must read once more: 20 bytes per float32 parameter for Lion, 28 for AdamW, 40 for cautious AdamW, 44 for MARS) at
that bandwidth; where weights or states are narrower, as much less as they are.
Once a round the same stream runs over one flat float32 tensor of as many bytes: no calls per tensor, the best torch
does in place (column "/ flat", the stricter one where tensors are small and calls cost more than memory). Both
yardsticks write what they read; a copy would look 1.5 times slower.

Rules of whole matrices (Muon, NorMuon, Scion, SOAP, Kron) are bound by arithmetic: they step the hidden matrices alone
(no embeddings, no vectors), and are held against their floating-point operations (`lightning_opt.optim.costs`) at the
rate of one float32 matrix product of 1024 that runs right before each. SOAP and Kron are timed over whole periods of
ten steps, the dear one and nine others, at equal settings (SOAP's new bases, Kron's fit, every tenth step).

Peers that are not installed are named below the tables (extra `peers`): pip install --no-deps lion-pytorch
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

import gc
import math
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import record, step_tables
from benchmarks.step_contenders import Contender, floor_bytes, flops, is_matrix_rule, ours, peers, yardstick
from lightning_opt import kernels, optim

ABOUT = (
    "`cpu` is the process's CPU time over its threads (on CUDA: `gpu`, time between events), `wall` the clock; both as "
    "multiples of the floor, medians over rounds with the 10 to 90 % spread. `/ flat` is wall against the flat stream, "
    "`/ fused` against torch's fused AdamW in the same round, `/ peer` against its rule's and storage's fastest peer "
    "in the same round, with the 10 to 90 % spread. `first step s` holds the making of the optimizer and what is "
    "compiled for it, from empty caches. The floors are explained at the top of the module. "
    + ("The machine was quiet." if os.environ["GOMP_SPINCOUNT"] == "300000" else "The machine was shared: read `cpu`.")
)


@dataclass(frozen=True)
class Setting:
    """One set of tensors, the shapes of a GPT with tied embedding, and how many rounds."""

    hidden: int
    layers: int
    vocabulary: int
    context: int
    rounds: int
    slow: bool = True  # also the ways of many small calls, and the rules that are timed over whole periods

    def shapes(self) -> list[tuple[int, ...]]:
        """Two embeddings; fused qkv, biases, two norms with bias per layer."""
        h = self.hidden
        layer = [(3 * h, h), (3 * h,), (h, h), (h,), (4 * h, h), (4 * h,), (h, 4 * h), (h,), *[(h,)] * 4]
        return [(self.vocabulary, h), (self.context, h), *(layer * self.layers), (h,), (h,)]


SETS = {
    "nano": Setting(128, 4, 2048, 256, rounds=60),
    "27M": Setting(512, 6, 16384, 1024, rounds=15),
    "124M": Setting(768, 12, 50257, 1024, rounds=9, slow=False),
}


@dataclass
class Family:
    """The contenders of one rule, with the rounds of the flat stream between theirs."""

    rule: str
    contenders: list[Contender]
    size: int  # parameters that they step
    operations: float = 0.0  # of a step, for rules of whole matrices
    product: float = 0.0  # operations of the matrix product they are held against
    flats: list[tuple[float, float]] = field(default_factory=list)


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
    contender.state = held_bytes(list(optimizer.state.values())) / sum(p.numel() for p in params)
    contender.traffic = floor_bytes(contender.rule, params[0].element_size(), contender.state, contender.storage)
    return True


def held_bytes(state: Any) -> int:
    """Bytes of the tensors in a state, however nested: SOAP's and Kron's peers keep theirs in lists."""
    if isinstance(state, Tensor):
        return state.nbytes
    inside = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(held_bytes, inside))


def leave_out(contender: Contender, why: str) -> bool:
    """Says why a contender is not in the table; False."""
    contender.left_out = why
    print(f"{contender.name} left out: {why}", flush=True)
    return False


def measure(
    setting: Setting, dtype: torch.dtype, device: str, compiles: bool, rounds: int | None, rules: Sequence[str] = ()
) -> tuple[list[Family], str]:
    """The rules one after another, and who was left out why. `rules`: only these."""
    params = tensors(setting.shapes(), dtype, device)
    every = [c for c in (*ours(dtype), *peers(device)) if not rules or c.rule in rules]
    kernels.native._library.cache_clear()  # what an earlier table compiled, and the look at what is possible
    for c in every:
        if c.compiles and not compiles:
            leave_out(c, "--quick takes no time to compile it")
        elif c.slow and not setting.slow:
            leave_out(c, "slow by its many calls: see the smaller set")
        elif c.period > 1 and not setting.slow:
            leave_out(c, "its period takes minutes: see the smaller set")
    families = []
    for rule in dict.fromkeys(c.rule for c in every):
        members = [c for c in every if c.rule == rule and not c.left_out]
        if rule != "adamw":
            members.append(yardstick())
        family = compete(rule, members, params, device, rounds or setting.rounds)
        if len(family.contenders) > (rule != "adamw"):
            families.append(family)
        print(f"{rule}: {len(family.contenders)} contenders", flush=True)
    if not all(torch.isfinite(p).all() for p in params):
        raise RuntimeError("a contender left a weight that is not finite")
    reasons = dict.fromkeys(c.left_out for c in every if c.left_out)
    absent = [f"{', '.join(c.name for c in every if c.left_out == why)} ({why})" for why in reasons]
    return families, f" Left out: {'; '.join(absent)}." if absent else ""


def compete(rule: str, members: list[Contender], params: list[nn.Parameter], device: str, rounds: int) -> Family:
    """All rounds of one rule; what its contenders held is let go of at the end."""
    matrices = is_matrix_rule(rule)
    if matrices:
        params, rounds = [p for p in params[2:] if p.ndim == 2], math.ceil(rounds / 5)
    grads = [p.grad for p in params]
    kept = [g.clone() for g in grads]
    family = Family(rule, [c for c in members if prepare(c, params, kept, device)], sum(p.numel() for p in params))
    stream, flat = streams(params)
    if matrices:
        family.operations = flops(rule, [tuple(p.shape) for p in params])
        stream, family.product = product(device)
    shuffled = random.Random(0)
    stream()
    gc.disable()
    for _ in range(rounds):
        family.flats.append(timed(flat, device))
        for c in shuffled.sample(family.contenders, len(family.contenders)):
            c.floor.append(timed(stream, device))
            busy, wall = timed(lambda c=c: [c.step() for _ in range(c.period)], device)
            c.own.append((busy / c.period, wall / c.period))
            if c.overwrites:
                torch._foreach_copy_(grads, kept)
    gc.enable()
    for c in family.contenders:
        c.step = c.make = lambda *_: None  # with the optimizer's states
    gc.collect()
    return family


def streams(params: list[nn.Parameter]) -> tuple[Callable[[], None], Callable[[], object]]:
    """The two yardsticks of memory: tensor by tensor, and over one flat tensor of as many bytes."""
    weights, grads = [p.detach() for p in params], [p.grad for p in params]
    flat = torch.zeros(sum(p.nbytes for p in params) // 4, device=params[0].device)
    other = torch.zeros_like(flat)

    def stream() -> None:
        for p, g in zip(weights, grads, strict=True):
            p.add_(g, alpha=-1e-9)

    return stream, lambda: flat.add_(other, alpha=-1e-9)


def product(device: str) -> tuple[Callable[[], object], float]:
    """The yardstick of arithmetic, a float32 matrix product, and its operations."""
    size = 4096 if device == "cuda" else 1024
    left, right = torch.randn(2, size, size, device=device)
    return lambda: left @ right, 2.0 * size**3


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="On 2 cores about 3 minutes for nano, 12 for 27M and 8 for 124M, in each dtype, and 10 GB; --sets, "
        "--dtypes and --rules take less. Start it on a quiet machine (load below 0.7).",
    )
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--rules", nargs="+", choices=optim.list_optimizers(), metavar="RULE", default=[])
    parser.add_argument("--small", action="store_true", help="only the shapes of the default model (1M parameters)")
    parser.add_argument(
        "--quick", action="store_true", help="that in float32, 5 rounds, without torch.compile: a minute"
    )
    parser.add_argument("--rounds", type=int, help="of each set; by default as many as its size needs")
    parser.add_argument("--threads", type=int, help="torch's own choice by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    args.sets = ["nano"] if args.small or args.quick else args.sets
    args.dtypes = ["float32"] if args.quick else args.dtypes
    args.rounds = args.rounds or (5 if args.quick else None)
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
                tables += tables_for(name, dtype, args)
            keep_tables(tables, args, where, more=True)
            torch._dynamo.reset()
            gc.collect()
    keep_tables(tables, args, where)


def tables_for(name: str, dtype: str, args: argparse.Namespace) -> list[record.Table]:
    """Measures one set in one dtype."""
    shapes, kind = SETS[name].shapes(), getattr(torch, dtype)
    size = sum(math.prod(shape) for shape in shapes)
    families, absent = measure(SETS[name], kind, args.device, not args.quick, args.rounds, args.rules)
    title = f"{name}: {size / 1e6:.2f}M parameters in {len(shapes)} tensors, {dtype}"
    busy = "gpu" if args.device == "cuda" else "cpu"
    return step_tables.tables_of(title, families, kind.itemsize, busy, absent)


def keep_tables(
    tables: Sequence[record.Table], args: argparse.Namespace, where: dict[str, Any], more: bool = False
) -> None:
    """Keeps the page of what was measured so far, at the end with its plot."""
    suffix = "-quick" if args.quick else "-small" if args.small else ""
    drawn = any(table.title.endswith(step_tables.EACH) for table in tables) and not more
    plots = [f"{where['date']}-optimizer_step{suffix}.png"] if drawn else []
    args.out.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        step_tables.draw(tables, args.out / plot)
    title = "One optimizer step against the hardware's speed"
    page = record.Page("optimizer_step", title, ABOUT, tables, plots)
    record.keep(page, where, args.out, suffix=suffix, more=more)


if __name__ == "__main__":
    main()
