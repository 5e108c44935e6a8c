"""What weights and states are stored in, and what that storage cannot hold."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_opt.kernels import Rule

log = logging.getLogger("lightning_opt.optim")


def state_dtypes(rule: Rule, group: Mapping[str, Any], p: Tensor) -> dict[str, torch.dtype]:
    """The dtype of each of a parameter's states: `state_dtype`, but what the rule needs wide is never narrower."""
    if p.dtype == torch.float64:
        return dict.fromkeys(rule.state, torch.float64)
    asked = getattr(torch, group["state_dtype"])
    return {name: torch.float32 if name in rule.wide_state else asked for name in rule.state}


def fresh_state(rule: Rule, group: Mapping[str, Any], p: Tensor, layout: Mapping[str, Any]) -> dict[str, Tensor]:
    """A parameter's states before its first update, on its device."""
    state = {
        name: torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        for name, dtype in state_dtypes(rule, group, p).items()
    }
    if rule.measure is not None and rule.measure.state:
        assert rule.measure.block is not None
        blocks = max(1, local(p).numel() // max(1, rule.measure.block(local(p), layout)))
        exact = torch.float64 if p.dtype == torch.float64 else torch.float32
        state |= {name: torch.zeros(blocks, dtype=exact, device=p.device) for name in rule.measure.state}
    return state if rule.initial is None else state | rule.initial(p, group, layout)


def planned_bytes(rule: Rule, group: Mapping[str, Any], p: Tensor, layout: Mapping[str, Any]) -> int:
    """Bytes of state that a parameter will have, over all ranks."""
    return bytes_held(fresh_state(rule, group, torch.empty(p.shape, dtype=p.dtype, device="meta"), layout))


def bytes_held(state: Mapping[str, Any]) -> int:
    """Bytes of a parameter's state on this process, measured."""
    return sum(local(value).nbytes for value in state.values() if isinstance(value, Tensor))


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor on this rank; a plain tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def warn_of_lost_updates(groups: list[dict[str, Any]]) -> None:
    """One warning where bfloat16 weights are too coarse for their peak rate.

    A bfloat16 number has 8 significant bits: one that is changed by less than half the distance to its neighbour, and
    written rounded to nearest, stays where it was. Reads the size of every bfloat16 weight once (it waits for the GPU).
    """
    trained, lost = 0, []
    for group in groups:
        rate = group.get("initial_lr") or group["lr"]
        for p in group["params"]:
            if p.grad is not None and p.dtype == torch.bfloat16 and p.numel():
                trained += 1
                rms = float(local(p).detach().float().square().mean().sqrt())
                half_ulp = math.ldexp(1.0, math.frexp(rms)[1] - 9) if math.isfinite(rms) and rms else 0.0
                if 0 < rate < half_ulp:
                    lost.append(f"role {group['role']}, rms {rms:.3g}, half a step is {half_ulp:.2g}, lr {rate:.2g}")
    if lost:
        log.warning(
            "%d of %d bfloat16 weight tensors will hardly move: lr is below half a step of their storage, which rounds "
            "to nearest (the first: %s); keep the weights in float32 (bf16-mixed)",
            len(lost),
            trained,
            lost[0],
        )
