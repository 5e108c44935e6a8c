"""How stacked experts of transformers' models are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from lightning_opt.plan import ConfigError

_OURS = "lightning_opt_grouped_mm"


def implement_experts(model: nn.Module, how: str) -> None:
    """Chooses how a transformers model computes its stacked experts; a model without any stays as it is.

    - ``grouped_mm``: tokens sorted by expert, one grouped matrix product; under autocast in its type, while
      transformers' own then multiplies in the weights' float32;
    - ``eager``: expert by expert; the gradient of each is as large as the whole stack's;
    - ``batched_mm``: a copy of the chosen expert for each token, for very few tokens;
    - ``auto``: ``grouped_mm`` where the model's code lets it choose.

    Args:
        model: any module.
        how: one of these words.

    Raises:
        ConfigError: the model's code leaves no choice.
    """
    can = getattr(type(model), "_can_set_experts_implementation", lambda: False)()
    if not can:
        if how not in ("auto", "eager"):
            why = f"auto or eager: {type(model).__name__} computes its experts, if it has any, in its own way"
            raise ConfigError("model.experts_implementation", how, why)
        return
    model.set_experts_implementation(_OURS if how in ("auto", "grouped_mm") else how)


class _Cast:
    """An experts module whose weights are read in another type."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self._experts, self._dtype = experts, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.to(self._dtype) if isinstance(value, nn.Parameter) else value


def _grouped(experts: nn.Module, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """`grouped_mm_experts_forward` in autocast's type, which torch's grouped product knows nothing of."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        experts = _Cast(experts, torch.get_autocast_dtype(device))
    return grouped_mm_experts_forward(experts, hidden, chosen, weights)


ALL_EXPERTS_FUNCTIONS.register(_OURS, _grouped)
