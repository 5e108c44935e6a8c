"""How much of the GPU does training use? Our whole training path beside transformers' Trainer.

    python -m benchmarks.mfu                                      every model and contender; a part takes 1 to 2 minutes
    python -m benchmarks.mfu --models llama_130m --seconds 10     some parts; later calls add theirs to the same page
    python -m benchmarks.mfu --models llama_130m --profile        also which kernels a step's time goes to
    python -m benchmarks.mfu --quick                              the default model, a few steps: does it run here?

Ours is `training.fit` as a run does it (data module, Lightning, callbacks, clipping, logging; `trainer=gpu`:
bf16-mixed, every decoder layer compiled), over random tokens. The Trainer gets the same model, batches, number format,
torch's fused AdamW and the same clipping, as it comes (`trainer`) and with its `torch_compile` (`trainer-compiled`);
the faster of the two is the one to beat.
Every part runs in a process of its own, so that no part finds another's memory or compiled kernels; a micro-batch that
does not fit is halved until it does. Both are timed by the same marks at the end of each optimizer step (CUDA events),
after 3 steps that do not count.

MFU = tokens/s x FLOPs per token / the device's dense bf16 peak, FLOPs per token = 6 N + 12 L h s + 6 h V: the head
counted, recomputation not, attention not halved for causality (PaLM, arXiv 2204.02311, appendix B; `plan/flops.py`,
`callbacks/device_peaks.py`). Finished parts, and failed ones with the reason, are kept in `mfu-parts.json` in the
output folder and not run again (`--again` does); the page shows all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.mfu_part import OUT_OF_MEMORY, WARMUP
from benchmarks.record import RESULTS, Page, Table, keep, machine

MODELS = ("llama_130m", "llama_300m", "llama_520m", "llama_1_2b")
ROOT = Path(__file__).resolve().parents[1]
GOALS = {"llama_130m": 0.33, "llama_300m": 0.38, "llama_520m": 0.43, "llama_1_2b": 0.47}  # one H100, sequence 4096
# ours-<optimizer>[-<trainer.compile>], or transformers' Trainer as it comes or compiled
CONTENDERS = ("ours-adamw", "trainer", "trainer-compiled", "ours-lion", "ours-adamw-model", "ours-adamw-off")
# Sequences of 4096 that should fit into 80 GB: ours by 40 bytes of activations per hidden unit, layer and token; the
# Trainer keeps twice that and 14 bytes of logits and their gradients per token and vocabulary entry.
MICRO_BATCH = {"llama_130m": (16, 4), "llama_300m": (8, 4), "llama_520m": (8, 2), "llama_1_2b": (4, 2)}
GLOBAL_BATCH = 32


def run_part(args: argparse.Namespace, model: str, part: str) -> dict[str, Any] | str:
    """A part in a process of its own, its micro-batch halved until it fits; a row, or why there is none."""
    own_path = part.startswith("ours")
    micro = args.micro_batch or MICRO_BATCH.get(model, (1, 1))[not own_path]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if args.quick else {})  # tests share their cores
    deadline = time.monotonic() + args.limit
    while True:
        words = [sys.executable, "-m", "benchmarks.mfu_part", "--part", part, "--model", model]
        words += ["--device", args.device, "--seconds", str(args.seconds), "--steps", str(args.steps)]
        words += ["--global-batch", str(args.global_batch), "--micro-batch", str(micro)]
        words += ["--profile", str(args.out / f"mfu-profile-{model}-{part}.txt")] * (args.profile and own_path)
        try:
            left = max(1.0, deadline - time.monotonic())
            done = subprocess.run(words, capture_output=True, text=True, timeout=left, cwd=ROOT, env=environment)
        except subprocess.TimeoutExpired:
            return f"took longer than {args.limit:.0f} s"
        if done.returncode == 0:
            return json.loads(done.stdout.strip().splitlines()[-1])
        if done.returncode == OUT_OF_MEMORY and micro > 1:
            print(f"{model} {part}: micro-batch {micro} does not fit, trying {micro // 2}", flush=True)
            micro //= 2
            continue
        (args.out / f"mfu-failed-{model}-{part}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]


def page(rows: dict[str, dict[str, Any]]) -> Page:
    """All parts so far."""
    table, failed = [], [row for row in rows.values() if "failed" in row]
    rows = {key: row for key, row in rows.items() if "failed" not in row}
    for row in sorted(rows.values(), key=lambda row: (row["flops_per_token"], CONTENDERS.index(row["contender"]))):
        goal = GOALS.get(row["model"]) if row["contender"].startswith("ours") else None
        gib = row["peak_gib"]
        table.append(
            {
                "model": row["model"],
                "contender": row["contender"],
                "tokens/s": f"{row['tokens_per_s']:,.0f}",
                "MFU %": row["mfu"] and f"{100 * row['mfu']:.1f}",
                "goal %": goal and f"{100 * goal:.0f}",
                "against the faster Trainer": against_trainer(rows, row),
                "step ms (10-90 %)": f"{row['step_ms']:.0f} ({row['step_ms_p10']:.0f}-{row['step_ms_p90']:.0f})",
                **{name: shown(row.get(f"{name}_ms")) for name in ("data", "forward_backward", "optimizer", "other")},
                "peak GiB": gib and f"{gib:.1f}",
                "batch": f"{row['global_batch']} = {row['global_batch'] // row['micro_batch']} x {row['micro_batch']}",
                "steps": row["steps"],
                "first step s": f"{row['first_step_s']:.1f}",
                "optimizer runs as": row["optimizer"],
            }
        )
    lengths = ", ".join(sorted({str(row["length"]) for row in rows.values()}, key=int))
    devices = ", ".join(sorted({row["device"] for row in rows.values()}))
    note = (
        f"Sequence length {lengths}; on {devices}; bf16-mixed on a GPU, float32 on a CPU. Parts of a step (data to "
        "other) are means per step, in ms; the batch is sequences per optimizer step = micro-batches x sequences."
    )
    about = "MFU with the output head counted and recomputation not; what is compared and how is said in the module."
    tables = [Table("Training speed", table, note)] if table else []
    if failed:
        why = [{"model": row["model"], "contender": row["contender"], "why": row["failed"]} for row in failed]
        tables.append(Table("Not measured", why))
    return Page("mfu", "Model FLOPs utilisation", about, tables)


def against_trainer(rows: dict[str, dict[str, Any]], row: dict[str, Any]) -> str | None:
    """Ours over the faster Trainer among those measured, and which was not; None for a Trainer, or without any."""
    rivals = {name: rows.get(f"{row['model']} {name}") for name in ("trainer", "trainer-compiled")}
    measured = {name: rival["tokens_per_s"] for name, rival in rivals.items() if rival}
    if not row["contender"].startswith("ours") or not measured:
        return None
    faster = max(measured, key=lambda name: measured[name])
    missing = "".join(f"; {name}: not measured" for name in rivals if name not in measured)
    return f"{row['tokens_per_s'] / measured[faster]:.2f}x ({faster}{missing})"


def shown(milliseconds: float | None) -> str | None:
    return None if milliseconds is None else f"{milliseconds:.1f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=None, help=f"names in conf/model (default {' '.join(MODELS)})")
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=None, help=f"default: {' '.join(CONTENDERS[:4])}"
    )
    parser.add_argument("--seconds", type=float, default=12.0, help="measured time per part after the warm-up (12)")
    parser.add_argument(
        "--limit", type=float, default=150.0, help="seconds for a part with start and compilation (150)"
    )
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for all; no part starts after them")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps at most")
    parser.add_argument("--global-batch", type=int, default=None, help=f"sequences per optimizer step ({GLOBAL_BATCH})")
    parser.add_argument("--micro-batch", type=int, default=None, help="sequences per forward pass (by model)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=None, help="the GPU where there is one")
    parser.add_argument(
        "--profile", action="store_true", help="write the kernels of one step to mfu-profile-*.txt (ours)"
    )
    parser.add_argument("--again", action="store_true", help="measure parts anew that are there already")
    parser.add_argument("--quick", action="store_true", help="model nano, a few steps, less than a minute")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.models = args.models or (["nano"] if args.quick else list(MODELS))
    args.contenders = args.contenders or (["ours-adamw", "trainer"] if args.quick else list(CONTENDERS[:4]))
    args.out = args.out.resolve()
    args.global_batch = args.global_batch or (2 if args.quick else GLOBAL_BATCH)
    if args.quick:
        args.seconds, args.steps = min(args.seconds, 1.0), WARMUP + 3
    if args.device is None:
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main() -> int:
    """Runs the parts that are not there yet; 1 if any failed."""
    args = arguments()
    if args.device == "cpu" and not args.quick:
        print("no GPU here: these models would take hours on a CPU; --quick shows that the path runs", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    kept, where, began, failed = args.out / "mfu-parts.json", machine(), time.monotonic(), False
    rows = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for part in args.contenders:
        for model in args.models:
            key = f"{model} {part}"
            if key in rows and not args.again:
                if why := rows[key].get("failed"):
                    print(f"{key}: failed before, not tried again without --again: {why}", flush=True)
                continue
            if time.monotonic() - began > args.budget:
                print(f"{key}: left for another time (the budget of {args.budget:.0f} s is spent)", flush=True)
                continue
            row = run_part(args, model, part)
            rows[key] = {"model": model, "contender": part, "failed": row} if isinstance(row, str) else row
            kept.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            if isinstance(row, str):
                failed = True
                print(f"{key}: FAILED: {row}", flush=True)
                continue
            used = f", MFU {100 * row['mfu']:.1f} %" if row["mfu"] else ""
            print(f"{key}: {row['tokens_per_s']:,.0f} tokens/s{used}", flush=True)
    if rows:
        keep(page(rows), where, args.out, suffix="-quick" if args.quick else "")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
