"""A made-up run folder with everything a run of ours writes: 800 steps, three corpora, mini scores."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

CORPORA = {"code": (5.31, 3.28), "math": (4.62, 2.41), "prose": (6.02, 5.44)}  # unigram entropy, final loss
ROLES = {"matrix": 0.0004, "embedding": 0.0012, "norm": 0.0004}
STEPS, TOKENS_PER_STEP = 800, 2048


def plan() -> dict[str, Any]:
    routing = [
        {"role": "matrix", "rule": "lion", "implementation": "compiled", "tensors": 28, "params": 802816, "lr": 0.0004},
        {
            "role": "embedding",
            "rule": "lion",
            "implementation": "compiled",
            "tensors": 1,
            "params": 262144,
            "lr": 0.0012,
        },
        {"role": "norm", "rule": "lion", "implementation": "foreach", "tensors": 9, "params": 1152, "lr": 0.0004},
    ]
    for row in routing:
        row |= {"weight_decay": 0.3 if row["role"] == "matrix" else 0.0, "max_grad_norm": 1.0}
        row["state_bytes"] = 4 * row["params"]
    sizes = {"code": 1_204_311, "math": 1_198_020, "prose": 1_188_764}
    corpora = [
        {"name": name, "weight": 1 / 3, "train_tokens": sizes[name], "val_tokens": sizes[name] // 50}
        | {"epochs": 546_133 / sizes[name], "unigram_entropy": CORPORA[name][0], "val_bytes": sizes[name] // 50 * 3}
        for name in CORPORA
    ]
    return {
        "name": "lion_nano",
        "optimizer": "lion",
        "model": "nano",
        "data": "embedded",
        "routing": routing,
        "params_total": 1_066_112,
        "params_active": 1_066_112,
        "params_non_embedding": 802_816,
        "flops_per_token": 7_962_624,
        "seed": 1234,
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "accumulate": 1,
        "devices": 1,
        "sequence_length": 256,
        "tokens_per_step": TOKENS_PER_STEP,
        "max_steps": STEPS,
        "tokens": STEPS * TOKENS_PER_STEP,
        "warmup_steps": 40,
        "schedule": "linear",
        "precision": "32-true",
        "precision_reason": "CPU: bfloat16 is slower here",
        "tuned": {
            "source": "our own sweep, 2026-11, 3 seeds",
            "values": {"optimizer.lr": 0.0004, "optimizer.weight_decay": 0.3},
        },
        "corpora": corpora,
        "tokenizer": {"kind": "byte-level BPE", "vocab_size": 2048, "sha256": "9f2c" * 16},
        "data_fingerprint": "embedded-3.11-5d0c8a77",
    }


def config() -> dict[str, Any]:
    return {
        "name": "lion_nano",
        "seed": 1234,
        "resume": "auto",
        "model": {
            "name": "nano",
            "hidden_size": 128,
            "num_layers": 4,
            "num_heads": 4,
            "num_kv_heads": 4,
            "tie_embeddings": True,
        },
        "data": {"name": "embedded", "source": "embedded", "path": None, "weights": None},
        "optimizer": {
            "name": "lion",
            "lr": 0.0004,
            "lr_scale": 1.0,
            "weight_decay": 0.3,
            "weight_decay_mode": "decoupled",
            "betas": [0.9, 0.99],
            "max_grad_norm": 1.0,
            "state_dtype": "float32",
            "implementation": "auto",
        },
        "schedule": {"name": "linear", "warmup": 0.05, "min_ratio": 0.0, "decay": 0.2},
        "scale": {"name": "demo", "tokens": 1638400},
        "trainer": {"precision": "auto", "compile": False, "deterministic": True},
        "evaluation": {"suite": "mini", "tasks": ["hellaswag", "mmlu", "humaneval"]},
    }


def env() -> dict[str, Any]:
    return {
        "python": "3.11.7",
        "platform": "Linux-6.1-x86_64",
        "packages": {"torch": "2.13.0+cpu", "lightning": "2.6.6", "transformers": "5.23.0", "lm_eval": "0.4.13"},
        "device": "cpu",
        "device_name": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
        "cpu_count": 2,
        "num_threads": 2,
        "git_commit": "4f0c2b9d5f7e4a1c8a55f0e0b2a3c4d5e6f70812",
        "git_dirty": False,
        "data_fingerprint": "embedded-3.11-5d0c8a77",
    }


def evaluation() -> dict[str, Any]:
    return {
        "suite": "mini",
        "comparable": False,
        "hellaswag": {
            "metric": "acc_norm",
            "value": 0.43,
            "stderr": 0.0498,
            "n": 100,
            "shots": 0,
            "chance": 0.25,
            "truncated": 0,
        },
        "mmlu": {
            "metric": "acc",
            "value": 0.27,
            "stderr": 0.0446,
            "n": 100,
            "shots": 5,
            "chance": 0.25,
            "truncated": 83,
        },
        "humaneval": {"skipped": "this machine cannot isolate generated code (no user namespaces)"},
    }


def metric_rows() -> list[dict[str, float]]:
    noise = random.Random(7)
    rows = []
    for step in range(1, STEPS + 1):
        fall = (1 + step / 25) ** -0.42
        loss = 3.55 + 4.1 * fall + noise.gauss(0, 0.09) - 0.35 * max(0, step - 500) / 300
        rate = min(step / 40, (STEPS - step) / (STEPS - 40))
        wobble = 1 + abs(noise.gauss(0, 0.03)) + (0.5 if step % 200 == 0 else 0)
        row = {"step": step, "tokens": step * TOKENS_PER_STEP, "time_s": round(0.152 * step + 0.9 * (step // 200), 3)}
        row |= {"train/loss": loss, "grad_norm": 0.75 + 2.6 * fall * abs(noise.gauss(1, 0.18))}
        row |= {f"lr/{role}": peak * rate for role, peak in ROLES.items()}
        row |= {f"grad_norm/{role}": row["grad_norm"] * f for role, f in zip(ROLES, (0.9, 0.4, 0.06), strict=True)}
        if step > 1:
            row["grad_norm_change"] = abs(noise.gauss(0, 0.2)) + 0.02
        if step > 50:
            row["loss_volatility"] = 0.02 + 0.1 * fall * abs(noise.gauss(1, 0.1))
        if step > 3:
            parts = {
                "data_ms": 0.9 * wobble,
                "forward_backward_ms": 139 * wobble,
                "optimizer_ms": 4.7 * wobble,
                "other_ms": 3.1,
            }
            total = sum(parts.values())
            row |= parts | {"step_ms": total, "optimizer_share": parts["optimizer_ms"] / total}
            row["tokens_per_s_per_device"] = TOKENS_PER_STEP / total * 1000
        row |= {"memory_allocated_bytes": 412_000_000 + 100 * step, "memory_peak_bytes": 655_000_000}
        row["optimizer_state_bytes"] = 4 * 1_066_112
        if step % 100 == 0:
            left = ((1 + step / 25) ** -0.42 - (1 + STEPS / 25) ** -0.42) * 3.6
            losses = {name: final + left * (1 + i / 6) for i, (name, (_, final)) in enumerate(CORPORA.items())}
            row |= {f"val/loss/{name}": value for name, value in losses.items()}
            row["val/loss"] = sum(losses.values()) / 3
            row |= {"val/perplexity": math.exp(row["val/loss"]), "val/bits_per_byte": row["val/loss"] / 3 / math.log(2)}
        rows.append(row)
    return rows


def write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def build_run(folder: Path, **changes: Any) -> Path:
    """Writes the folder; ``changes`` replace a part: plan, config, env, status, evaluation, events, overrides, rows."""
    from lightning_opt.run_folder import RunFolder, summarize

    folder.mkdir(parents=True, exist_ok=True)
    paths = RunFolder(folder)
    paths.evaluation.mkdir(exist_ok=True)
    paths.model.mkdir(exist_ok=True)
    paths.config.write_text(yaml.safe_dump(changes.get("config", config()), sort_keys=False))
    paths.overrides.write_text("\n".join(changes.get("overrides", ["optimizer=lion"])) + "\n")
    status = {"state": "FINISHED", "step": STEPS, "reason": None, "config_hash": "1a2b3c4d", "owner": {}}
    events = [
        {"time": 1764000000.0, "kind": "started", "step": 0, "resumed": False},
        {
            "time": 1764000061.2,
            "kind": "step_skipped",
            "step": 388,
            "reason": "gradient norm 41.2 above 10 x its median",
        },
        {"time": 1764000131.9, "kind": "exported", "step": 800, "path": "model"},
    ]
    for path, value in (
        (paths.plan, changes.get("plan", plan())),
        (paths.env, changes.get("env", env())),
        (paths.status, changes.get("status", status)),
        (paths.results, {"suite": "mini", "results": {}, "summary": changes.get("evaluation", evaluation())}),
    ):
        path.write_text(json.dumps(value))
    paths.events.write_text("".join(json.dumps(event) + "\n" for event in changes.get("events", events)))
    write_csv(paths.metrics, changes.get("rows", metric_rows()))
    paths.summary.write_text(json.dumps(summarize(paths)))
    return folder
