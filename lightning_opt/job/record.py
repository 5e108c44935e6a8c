"""What a run writes down about itself before its first step: env.json and plan.json."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_opt.plan import RunPlan, available_cpus, data_phases
from lightning_opt.plan.lengths import steps_for_warmup

_PACKAGES = [
    "lightning_opt",
    "torch",
    "lightning",
    "torchmetrics",
    "transformers",
    "hydra-core",
    "omegaconf",
    "lm_eval",
    "grain",
    "datasets",
    "tokenizers",
    "numpy",
]


def environment(data_fingerprint: str, device: str, trainer: dict[str, Any]) -> dict[str, Any]:
    """Versions, device and commit of this process, and how many train with it.

    Args:
        data_fingerprint: identity of the tokenised data.
        device: ``cuda`` or ``cpu``: where the run trains.
        trainer: the ``trainer`` group of the configuration.

    Returns:
        The content of ``env.json``; what cannot be told is None.
    """
    import torch

    on_gpu = device == "cuda"
    commit, dirty = _git()
    world_size = trainer["devices"] * trainer["num_nodes"]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "device": device,
        "device_name": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "cpu_count": available_cpus(),
        "num_threads": torch.get_num_threads(),
        "world_size": world_size,
        "num_nodes": trainer["num_nodes"],
        "strategy": {"auto": "ddp"}.get(trainer["strategy"], trainer["strategy"]) if world_size > 1 else None,
        "git_commit": commit,
        "git_dirty": dirty,
        "data_fingerprint": data_fingerprint,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "lightning_opt":
            from lightning_opt import __version__

            return __version__
        return None


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def _git() -> tuple[str | None, bool | None]:
    """Commit of the checkout this code lies in, and whether tracked files differ; installed copies have none."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None, None

    def ask(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    changes = ask("status", "--porcelain", "--untracked-files=no")
    return ask("rev-parse", "HEAD"), None if changes is None else bool(changes)


def own_warmup(group: dict[str, Any], plan: RunPlan) -> int:
    """Steps of a rule's own warm-up, beside which the schedule has none."""
    return steps_for_warmup(group.get("warmup_steps", 0), plan.max_steps)


def planned(
    config: dict[str, Any],
    plan: RunPlan,
    *,
    token_data: Any,
    anatomy: Any,
    optimizer: Any,
    flops_per_token: float | None,
    precision: tuple[str, str],
    tuned: dict[str, Any] | None,
) -> dict[str, Any]:
    """The content of ``plan.json``: all that is known before the first step.

    Args:
        config: the resolved configuration.
        plan: lengths and batches.
        token_data: the built data.
        anatomy: the model's parameters by role.
        optimizer: the built optimizer.
        flops_per_token: training FLOPs per token, or None where the shape is not known.
        precision: the precision and why.
        tuned: tuned values that were merged, with their source.
    """
    epochs = token_data.epochs(plan.tokens)
    return {
        "name": config["name"],
        "optimizer": config["optimizer"]["name"],
        "model": config["model"]["name"],
        "data": config["data"]["name"],
        "params_total": anatomy.total,
        "params_active": anatomy.active,
        "params_non_embedding": anatomy.non_embedding,
        "flops_per_token": flops_per_token,
        "seed": config["seed"],
        **asdict(plan),
        "warmup_steps": max(plan.warmup_steps, *(own_warmup(group, plan) for group in optimizer.param_groups)),
        "schedule": config["schedule"],
        "precision": precision[0],
        "precision_reason": precision[1],
        "tuned": tuned,
        "routing": optimizer.routing_table(),
        "implementations": optimizer.implementations,
        "corpora": [{**asdict(corpus), "epochs": epochs.get(corpus.name)} for corpus in token_data.corpora],
        "mixture": list(_mixture(config, plan, token_data)),
        "warn_above_epochs": config["data"].get("warn_above_epochs"),
        "documents_apart": bool(config["data"].get("block_cross_document_attention")),
        "tokenizer": {
            "kind": token_data.tokenizer_kind,
            "vocab_size": token_data.vocab_size,
            "sha256": token_data.tokenizer_sha256,
        },
        "data_fingerprint": token_data.fingerprint,
    }


def _mixture(config: dict[str, Any], plan: RunPlan, token_data: Any) -> Iterator[dict[str, Any]]:
    """Each phase of the data: until which token of the run, its shares, and how often all was read by then."""
    names = [phase.name for phase in data_phases(config["data"])] or [None]
    ends = [*(seam * plan.sequence_length for seam in plan.data_seams), plan.tokens]
    for name, end, phase in zip(names, ends, token_data.train.phases, strict=True):
        yield {"phase": name, "until_token": end, "weights": phase.shares, "epochs": token_data.epochs(end)}
