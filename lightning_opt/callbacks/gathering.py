"""Whole tensors of a model that may be split over ranks (FSDP2, tensor parallelism)."""

from __future__ import annotations

from torch import Tensor, nn


def full_state(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """A model's ``state_dict`` with whole tensors: split ones are gathered to the CPU, tied ones stay one tensor.

    Where anything is split, every rank must call it.

    Args:
        model: any module.
        keep: False takes part in the gathering and returns an empty dict, holding one tensor at a time.
    """
    whole: dict[int, Tensor | None] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in whole:
            full = tensor.detach()
            if hasattr(full, "full_tensor"):
                full = full.full_tensor().cpu() if keep else full.full_tensor()
            whole[id(tensor)] = full if keep else None
        if keep:
            state[name] = whole[id(tensor)]  # type: ignore[assignment]
    return state
