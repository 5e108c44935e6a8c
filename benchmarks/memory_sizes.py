"""Optimizer bytes by model size, without training anything: models on the meta device, each YAML's own routing by role.

Article 1 claims that Lion takes 37 % and 42 % less memory than AdamW, more the larger the model. What can be true of it
is arithmetic: beside weights and gradients AdamW holds 8 bytes per weight and Lion 4 in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from benchmarks import presets
from lightning_opt import optim
from lightning_opt.plan import ConfigError

YAMLS = Path(__file__).resolve().parents[1] / "conf" / "optimizer"
SIZES = ("pico", "nano", "gpt2_124m", "llama_130m", "llama_300m", "llama_520m", "llama_1_2b", "glm_4_5_air")
STORAGES = ("float32", "bfloat16", "int8")
_DENSE = 8  # bytes of a float32 weight and its gradient


def on_meta(name: str) -> nn.Module:
    """A model of shapes only: one of conf/model, or GLM-4.5-Air (transformers' defaults; 106.85B without its MTP)."""
    if name != "glm_4_5_air":
        return presets.build(presets.preset(name), "meta")
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    with torch.device("meta"):
        return Glm4MoeForCausalLM(Glm4MoeConfig(head_dim=128, attention_bias=True))


def state_bytes(model: nn.Module, optimizer: str, storage: str) -> int | None:
    """Bytes of all states under the optimizer's YAML; None where it has no such storage.

    Args:
        model: on any device.
        optimizer: name of the YAML.
        storage: of `STORAGES`.
    """
    config: Any = OmegaConf.to_container(OmegaConf.load(YAMLS / f"{optimizer}.yaml"))
    config |= {"state_dtype": storage, "implementation": "eager"}
    try:
        made = optim.build(model, config)
    except ConfigError as error:
        if "state_dtype" not in str(error):
            raise
        return None
    return sum(row["state_bytes"] for row in made.routing_table())


def by_size(sizes: Sequence[str], optimizers: Sequence[str]) -> list[dict[str, Any]]:
    """A row per optimizer and storage: bytes of state per weight at each size, and the share they are of the static
    memory (float32 weights, gradients and states) at the largest."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for size in sizes:
        model = on_meta(size)
        weights = sum(p.numel() for p in model.parameters())
        for name in optimizers:
            for storage in STORAGES:
                held = state_bytes(model, name, storage)
                if held is None:
                    continue
                row = found.setdefault((name, storage), {"optimizer": name, "state": storage})
                each = held / weights
                row[f"{size} ({shown(weights)})"] = f"{each:.2f} ({each / (each + _DENSE):.0%})"
    return list(found.values())


def claims() -> list[dict[str, Any]]:
    """By how much Lion needs less than AdamW, whatever the size of the model: nothing but what is kept per weight."""
    kept = {
        "weights, gradients and states in float32": (4, 4, 8, 4),
        "the same, gradients released in the backward pass": (4, 0, 8, 4),
        "bfloat16 weights and gradients, float32 states": (2, 2, 8, 4),
        "bfloat16 weights, gradients released, float32 states": (2, 0, 8, 4),
        "bfloat16 and float32 master weights, bfloat16 gradients, float32 states": (6, 2, 8, 4),
        "float32, Lion's momentum in int8 against AdamW's float32": (4, 4, 8, 1 + 4 / 256),
        "the states alone": (0, 0, 8, 4),
    }
    rows = []
    for what, (weight, gradient, adamw, lion) in kept.items():
        others = weight + gradient
        saved = (adamw - lion) / (others + adamw)
        rows.append({
            "what is kept": what,
            "AdamW, bytes per weight": others + adamw,
            "Lion, bytes per weight": round(others + lion, 2),
            "Lion less": f"{saved:.0%}",
        })  # fmt: skip
    return rows


def shown(weights: int) -> str:
    """``1.07M``."""
    return f"{weights / 1e9:.1f}B" if weights >= 1e9 else f"{weights / 1e6:.{2 if weights < 1e7 else 0}f}M"
