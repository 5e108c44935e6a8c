"""How much memory does a whole training step take, and how much of it is the optimizer's?

    python -m benchmarks.memory            27M parameters on a CPU, llama_130m on a GPU, and all sizes; four minutes
    python -m benchmarks.memory --quick    nano and a smaller vocabulary: does it run here?

Every optimizer trains the same model for a few steps in a process of its own. Measured is the peak within one whole
step (zero_grad, forward, backward, clipping, update), after steps that made the optimizer's state: on a GPU what
tensors held (`torch.cuda.max_memory_allocated`), on a CPU the highest resident set (VmHWM, reset through
/proc/self/clear_refs) over that of the process before the model was built. Weights, gradients and states are the bytes
of those tensors; *rest* is what else the peak holds: activations, logits, temporaries, the allocator's waste.
*expected* is arithmetic: 4 bytes for each float32 weight, gradient and state.

Then the loss alone, forward and backward, each way in a process of its own: `linear_cross_entropy`, which holds a few
rows of logits at a time, and the same from all logits at once.

Then Lion against AdamW over model sizes, measured the same way, and without training (`benchmarks.memory_sizes`) what
every optimizer holds at every size, and what can be true of the claim that Lion takes 37 % or 42 % less.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import memory_sizes, presets
from benchmarks.record import Page, Table, keep, machine
from lightning_opt import optim

ROOT = Path(__file__).resolve().parents[1]
BATCHES = {
    "pico": (2, 128),
    "nano": (2, 128),
    "wide": (2, 128),
    "27M": (2, 256),
    "gpt2_124m": (2, 128),
    "llama_130m": (1, 4096),
}
MEASURED_SIZES = ("pico", "nano", "wide", "27M", "gpt2_124m")
# bytes of state per weight; AdamW keeps its second moment in float32
STATE = {"torch-adamw": 8, "adamw": 8, "adamw-bfloat16": 6, "lion": 4, "lion-bfloat16": 2}
LOSSES = {"loss-chunked": "a few rows of logits at a time", "loss-whole": "all logits at once"}
LOSS_TOKENS = 4096
LOSS_HEADS = {"nano": (16384, 128)}  # vocabulary and hidden size of --quick; else llama_130m's
STEPS = 3
PART_LIMIT_S = 300
# glibc gives back what is freed, so that what is resident is what is used
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384", "MALLOC_ARENA_MAX": "1"}


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "torch-adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rule, _, state = name.partition("-")
    config = {"name": rule, "lr": 1e-4, "max_grad_norm": 1.0, "state_dtype": state or "float32"}
    return optim.build(model, {**config, "roles": {"default": {"rule": rule}}})


class Meter:
    """Bytes in use, and the most that were since `reset`."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def reset(self) -> None:
        """The peak begins here."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def now(self) -> int:
        """Bytes in use."""
        return torch.cuda.memory_allocated() if self._cuda else self._status("VmRSS")

    def peak(self) -> int:
        """The most since `reset`."""
        return torch.cuda.max_memory_allocated() if self._cuda else self._status("VmHWM")

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def train(name: str, model_name: str, device: str, meter: Meter) -> dict[str, int]:
    """A few steps; bytes by part, and the peak of the last step."""
    from lightning_opt import models

    batch, length = BATCHES[model_name]
    torch.manual_seed(0)
    config = presets.preset(model_name)
    model = presets.build(config, device)
    optimizer = make_optimizer(name, model)
    tokens = torch.randint(0, config["vocab_size"], (batch, length + 1), device=device)
    for step in range(STEPS):
        if step == STEPS - 1:
            meter.reset()
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
            loss = models.causal_lm_loss(model, tokens[:, :-1], tokens[:, 1:]).total
        loss.backward()
        if name == "torch-adamw":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak": meter.peak(),
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters()),
        "states": sum(t.nbytes for t in states),
    }


def lose(name: str, vocabulary: int, size: int, device: str, meter: Meter) -> dict[str, int]:
    """The loss of random hidden states and its gradients; the peak beside those states and the weight."""
    from lightning_opt.models.chunked import linear_cross_entropy, logits_cross_entropy

    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(rows, size, device=device).mul_(0.02).requires_grad_() for rows in (LOSS_TOKENS, vocabulary)
    )
    targets = torch.randint(vocabulary, (LOSS_TOKENS,), device=device)
    meter.reset()
    before = meter.now()
    with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
        if name == "loss-chunked":
            loss = linear_cross_entropy(hidden, weight, None, targets)[0]
        else:
            loss = logits_cross_entropy(nn.functional.linear(hidden, weight), targets)[0]
    loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return {"peak": meter.peak() - before, "tokens": LOSS_TOKENS, "vocabulary": vocabulary, "hidden size": size}


def part(name: str, model: str, device: str) -> None:
    """One optimizer, or one way to the loss; prints a JSON line."""
    meter = Meter(device)
    if name in LOSSES:
        lose(name, 512, 64, device, meter)  # libraries and kernels are loaded now
        gc.collect()
        head = presets.preset("llama_130m")
        found = lose(name, *LOSS_HEADS.get(model, (head["vocab_size"], head["hidden_size"])), device, meter)
    else:
        train(name, "nano", device, meter)
        gc.collect()
        before = meter.now()
        found = train(name, model, device, meter)
        found["peak"] -= before
    print(json.dumps(found))


def row(name: str, found: dict[str, int], baseline: dict[str, int]) -> dict[str, Any]:
    count = found["parameters"]
    named = found["weights"] + found["gradients"] + found["states"]
    mib = {key: round(value / 2**20, 1) for key, value in found.items() if key != "parameters"}
    return {
        "optimizer": name,
        "peak MiB": mib["peak"],
        "weights": mib["weights"],
        "gradients": mib["gradients"],
        "states": mib["states"],
        "rest": round((found["peak"] - named) / 2**20, 1),
        "expected weights + gradients + states": round((8 + STATE[name]) * count / 2**20, 1),
        "expected states": round(STATE[name] * count / 2**20, 1),
        "peak less than torch-adamw": round((baseline["peak"] - found["peak"]) / 2**20, 1),
        "expected less": round((STATE["torch-adamw"] - STATE[name]) * count / 2**20, 1),
    }


def loss_row(name: str, found: dict[str, int]) -> dict[str, Any]:
    shape = {key: found[key] for key in ("tokens", "vocabulary", "hidden size")}
    logits = 4 * found["tokens"] * found["vocabulary"]
    mib = {"peak MiB": found["peak"], "all logits in float32": logits}
    return {"logits": LOSSES[name], **shape, **{key: round(value / 2**20) for key, value in mib.items()}}


def size_row(model: str, adamw: dict[str, int], lion: dict[str, int]) -> dict[str, Any]:
    """How much less Lion takes than AdamW at one size."""
    batch, length = BATCHES[model]
    return {
        "model": model,
        "parameters": adamw["parameters"],
        "tokens": batch * length,
        "AdamW, peak MiB": round(adamw["peak"] / 2**20, 1),
        "Lion, peak MiB": round(lion["peak"] / 2**20, 1),
        "Lion less": f"{1 - lion['peak'] / adamw['peak']:.0%}",
        "less, all float32": f"{4 / 16:.0%}",
        "states of AdamW's peak": f"{adamw['states'] / adamw['peak']:.0%}",
    }


def options() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(BATCHES), default=None)
    parser.add_argument("--optimizers", nargs="+", choices=list(STATE), default=None)
    parser.add_argument("--sizes", nargs="*", choices=memory_sizes.SIZES, default=None, help="counted, not trained")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--quick", action="store_true", help="nano, two optimizers, two sizes")
    parser.add_argument("--out", type=Path, default=None, help="folder (benchmarks/results)")
    parser.add_argument("--part", choices=[*STATE, *LOSSES], default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = args.model or ("nano" if args.quick else "llama_130m" if args.device == "cuda" else "27M")
    args.optimizers = args.optimizers or (["torch-adamw", "lion"] if args.quick else list(STATE))
    args.sizes = (["pico", "nano"] if args.quick else memory_sizes.SIZES) if args.sizes is None else args.sizes
    return args


def measured(name: str, model: str, device: str) -> dict[str, int]:
    """One part in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.memory", "--part", name, "--model", model, "--device", device]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=PART_LIMIT_S, cwd=ROOT, env={**os.environ, **MALLOC}
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measures each optimizer and each way to the loss in a process of its own, prints and keeps."""
    args = options()
    if args.part:
        part(args.part, args.model, args.device)
        return
    where, found, grown = machine(), {}, []
    for name in [*args.optimizers, *LOSSES]:
        found[name] = measured(name, args.model, args.device)
        keep_tables(tables_of(found, args), args, where, more=True)
    for model in ("pico", "nano") if args.quick else MEASURED_SIZES:
        grown.append(size_row(model, *(measured(name, model, args.device) for name in ("adamw", "lion"))))
        keep_tables([*tables_of(found, args), *tables_by_size(grown)], args, where, more=True)
    counted = counted_tables(args.sizes, ["adamw", "lion"] if args.quick else optim.list_optimizers())
    keep_tables([*tables_of(found, args), *tables_by_size(grown), *counted], args, where)


def tables_of(found: dict[str, dict[str, int]], args: argparse.Namespace) -> list[Table]:
    """What one size takes, by optimizer, and the loss alone."""
    first = next(iter(found.values()))
    batch, length = BATCHES[args.model]
    kind = "bf16-mixed" if args.device == "cuda" else "float32"
    note = (
        f"{args.model}: {first['parameters']:,} parameters, {batch} sequences of {length} tokens, {kind}; MiB. "
        "*less* compares with the first row."
    )
    steps = [row(name, each, first) for name, each in found.items() if name not in LOSSES]
    tables = [Table("Peak of a training step", steps, note)]
    if losses := [loss_row(name, each) for name, each in found.items() if name in LOSSES]:
        note = f"Forward and backward in {kind}, beside the hidden states and the head's weight, with their gradients."
        tables.append(Table("Peak of the loss alone", losses, note))
    return tables


def tables_by_size(grown: list[dict[str, Any]]) -> list[Table]:
    """Lion against AdamW, measured."""
    note = (
        "Peak of a whole step, as above. Activations and temporaries are the same for both, so Lion's share of what is "
        "saved grows with weights per token, towards the quarter that weights, gradients and states in float32 allow."
    )
    return [Table("Lion against AdamW by model size, measured", grown, note)]


def counted_tables(sizes: Sequence[str], optimizers: Sequence[str]) -> list[Table]:
    """What is arithmetic: every optimizer at every size, and the claims."""
    note = (
        "Bytes of state per weight, and in brackets their share of weights, gradients and states together, weights and "
        "gradients in float32; activations come on top. Every YAML with its own routing by role, as `state_dtype` says."
    )
    claim = (
        "Article 1 says 37 % and 42 % less for Lion, more with size. By what is kept per weight, whatever the size; "
        "activations, which both have, only make it less. Growth with size is thus the falling share of activations."
    )
    rows = memory_sizes.by_size(sizes, optimizers) if sizes else []
    tables = [Table("States by model size", rows, note)] if rows else []
    return [*tables, Table("How much less Lion can take than AdamW", memory_sizes.claims(), claim)]


def keep_tables(tables: list[Table], args: argparse.Namespace, where: dict[str, Any], more: bool = False) -> None:
    """Keeps the page of what was measured so far."""
    about = "Each measured row in a fresh process; what is counted is said in the module's text."
    page = Page("memory", "Memory of a training step", about, tables)
    keep(page, where, args.out, suffix="-quick" if args.quick else "", more=more)


if __name__ == "__main__":
    main()
