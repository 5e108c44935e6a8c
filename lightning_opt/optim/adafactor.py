"""Adafactor: the second moment of a matrix as one number per row and one per column, and steps relative to the weights.

With gradient g, step t from 1, rate lr, decay wd, b = 1 - t^-decay_exponent, means over the last two dimensions:

    p <- p (1 - lr wd)
    matrices   r <- b r + (1 - b) row means of (g^2 + eps);  c <- b c + (1 - b) column means of (g^2 + eps)
               u <- g / sqrt(r c / mean(r))
    vectors    v <- b v + (1 - b) (g^2 + eps);  u <- g / sqrt(v)
    u <- u / max(1, rms(u) / clip_threshold)
    a <- lr, or with `relative_step` min(lr, 1 / sqrt(t));  with `scale_parameter` times max(scale_floor, rms(p))
    beta1 > 0  m <- beta1 m + (1 - beta1) a u, and p <- p - m;  else  p <- p - a u

Shazeer and Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (arXiv 1804.04235), Algorithms 4
and 5; the class's defaults are the paper's table, where lr stands for its 1e-2 as torch.optim.Adafactor has it.
pytorch_optimizer's AdaFactor (big_vision's, with momentum) follows the same path, but that its decay too is scaled with
the weights' rms. torch does not add eps to g^2 but holds the divisors above its eps1, the dtype's resolution, so it
agrees only where gradients are far larger.

Tuning: under a schedule use `relative_step: false` and `scale_parameter: true`, lr 1e-2 (weights of rms 0.03 to 0.1
then move like AdamW's at 3e-4 to 1e-3). `relative_step` ignores the schedule once 1 / sqrt(t) is below it. beta1 0.9
costs 4 bytes per weight and steadies training at high rates (PaLM and big_vision have it); 0, for memory, is the
paper's.

Traps: the decay b starts at 0, so the first step divides by the first gradient alone, and single elements of u may be
large in any step: the clip holds only the rms of u, so a is the largest rms of a step, not the largest change of a
weight. The decay of the second moment slows down for ever (b = 0.996 at step 1000): after a long run it hardly forgets.
A weight that starts at zero moves by scale_floor times lr. With `scale_parameter` a rate is not comparable with
AdamW's. Convolutions are factored over their last two dimensions, as torch does it. In a stack of experts every matrix
has its own rms, of steps and of weights (torch takes one over the stack). On a CPU a step takes 3.7 times what its
bytes would (its fastest peer 3.6 times; benchmarks/results): rows, columns and two rms must each be known before the
next pass over the matrix can begin, and the passes are torch's own, none of them merged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_opt.kernels import Bucket, Rule, gathered, wide, wide_dtype
from lightning_opt.optim.base import Optimizer
from lightning_opt.optim.blocks import own_dims


class Adafactor(Optimizer):
    """Adafactor as a torch optimizer; see the module's text for the rule and how to tune it.

    Args:
        params: parameters, named parameters or parameter groups, as for any torch optimizer.
        lr: step size, relative to the weights' rms with `scale_parameter`; typical 1e-2.
        beta1: decay of the momentum; 0 = none, and no state for it.
        decay_exponent: the second moment's decay is 1 - t to minus this.
        eps: added to squared gradients.
        scale_floor: smallest rms of weights that the rate is scaled with.
        clip_threshold: largest rms of a step before the rate.
        scale_parameter: the rate is scaled with the weights' rms.
        relative_step: the rate is at most 1 / sqrt(t).
        weight_decay: typical 0 to 0.1.
        max_grad_norm: the gradient is clipped to this norm before the update; None = no clipping.
        weight_decay_mode: ``decoupled``, ``independent`` or ``l2`` (see `Optimizer`).
        cautious, cautious_weight_decay: see `Optimizer`.
        implementation: auto or whole, which are one.
        state_dtype: of the momentum, ``float32`` or ``bfloat16``.
        **common: `state_rounding`, `weight_rounding` and what experts have of their own: see `Optimizer`.

    Raises:
        ConfigError: for a value out of range or an unknown hyperparameter.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        beta1: float = 0.0,
        decay_exponent: float = 0.8,
        eps: float = 1e-30,
        scale_floor: float = 1e-3,
        clip_threshold: float = 1.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float | None = None,
        weight_decay_mode: str = "decoupled",
        cautious: bool = False,
        cautious_weight_decay: bool = False,
        state_dtype: str = "float32",
        implementation: str = "auto",
        **common: Any,
    ) -> None:
        super().__init__(
            params,
            rule="adafactor",
            lr=lr,
            beta1=beta1,
            decay_exponent=decay_exponent,
            eps=eps,
            scale_floor=scale_floor,
            clip_threshold=clip_threshold,
            scale_parameter=scale_parameter,
            relative_step=relative_step,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            weight_decay_mode=weight_decay_mode,
            cautious=cautious,
            cautious_weight_decay=cautious_weight_decay,
            state_dtype=state_dtype,
            implementation=implementation,
            **common,
        )


def scalars(step: Any, group: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one step."""
    rate = min(group["lr"], step**-0.5) if group["relative_step"] else group["lr"]
    age = min(step.of("row"), step.of("whole_sq"))  # of the second moment, in whichever form it is
    return {"rate": rate, "new2": float(age ** -group["decay_exponent"])}


def initial(p: Tensor, group: Mapping[str, Any], layout: Mapping[str, Any]) -> dict[str, Tensor]:
    """Zeros: of the second moment float32 (float64 for float64 weights), of the momentum as `state_dtype` says."""
    exact = wide_dtype(p)
    if p.ndim < 2:
        state = {"whole_sq": torch.zeros_like(p, dtype=exact)}
    else:
        shapes = {"row": p.shape[:-1], "column": (*p.shape[:-2], p.shape[-1])}
        state = {name: torch.zeros(shape, dtype=exact, device=p.device) for name, shape in shapes.items()}
    if group["beta1"]:
        narrow = exact if exact == torch.float64 else getattr(torch, group["state_dtype"])
        state["step_avg"] = torch.zeros_like(p, dtype=narrow)
    return state


def whole(bucket: Bucket) -> list[Tensor]:
    """The steps; the states are written."""
    assert bucket.extra is not None
    return [_step(*row, bucket) for row in zip(bucket.params, bucket.grads, bucket.extra, strict=True)]


def _step(p: Tensor, g: Tensor, state: dict[str, Any], bucket: Bucket) -> Tensor:
    group, rate, new2 = bucket.options, bucket.scalars["rate"], bucket.scalars["new2"]
    p, g = wide(p), wide(g)
    u, eps = g.square(), group["eps"]  # one buffer from here to the step: fresh memory costs more than arithmetic
    if "row" in state:
        row, column = state["row"], state["column"]
        row.lerp_(u.mean(-1).add_(eps), new2)
        column.lerp_(u.mean(-2).add_(eps), new2)
        by_row = (row / row.mean(-1, keepdim=True)).rsqrt_()
        torch.mul(by_row.unsqueeze(-1), column.rsqrt().unsqueeze(-2), out=u)
    else:
        u = state["whole_sq"].lerp_(u.add_(eps), new2).rsqrt()
    u.mul_(g)
    factor = rate / torch.clamp(_rms(u, group.get("role")) / group["clip_threshold"], min=1.0)
    if group["scale_parameter"]:
        factor = factor * torch.clamp(_rms(p, group.get("role")), min=group["scale_floor"])
    u.mul_(factor)
    if "step_avg" not in state:
        return u
    m = wide(state["step_avg"]).lerp_(u, 1 - group["beta1"])
    state["step_avg"].copy_(m)
    return m.clone() if m is state["step_avg"] else m


def _rms(x: Any, role: object) -> Tensor:
    """Root mean square, of each matrix of a stack its own."""
    dims = own_dims(x, role)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    count = math.prod(x.shape[dim] for dim in dims)
    return gathered(norm) / max(1, count) ** 0.5


RULE = Rule(
    "adafactor",
    None,
    scalars,
    state=(),
    defaults={
        "beta1": 0.0,
        "decay_exponent": 0.8,
        "eps": 1e-30,
        "scale_floor": 1e-3,
        "clip_threshold": 1.0,
        "scale_parameter": True,
        "relative_step": True,
    },
    traffic=20,
    whole=whole,
    initial=initial,
)
