"""The models that benchmarks train: those of ``conf/model``, and two sizes between that no user needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from lightning_opt import models
from lightning_opt.launch.task import instantiate

CONF = Path(__file__).resolve().parents[1] / "conf" / "model"
_BETWEEN = {  # changes of nano
    "wide": {"hidden_size": 256, "num_layers": 6, "intermediate_size": 704, "vocab_size": 4096},
    "27M": {"hidden_size": 512, "num_layers": 6, "num_heads": 8, "intermediate_size": 1408, "vocab_size": 16384},
}


def names() -> list[str]:
    """Every model that `preset` knows."""
    return sorted([*_BETWEEN, *(file.stem for file in CONF.glob("*.yaml") if file.stem != "hf")])


def preset(name: str, **changes: Any) -> dict[str, Any]:
    """A model's configuration.

    Args:
        name: one of `names`.
        **changes: values that replace its own.
    """
    base = OmegaConf.load(CONF / f"{'nano' if name in _BETWEEN else name}.yaml")
    merged = OmegaConf.merge(base, _BETWEEN.get(name, {}), {"name": name}, changes)
    config = OmegaConf.to_container(merged, resolve=True)
    assert isinstance(config, dict)
    return config  # type: ignore[return-value]


def build(config: dict[str, Any], device: str = "cpu") -> nn.Module:
    """The model with fresh weights, made on the device: drawing a billion numbers on a CPU takes minutes."""
    with torch.device(device):
        return models.build(config, vocab_size=config["vocab_size"], instantiate=instantiate)
