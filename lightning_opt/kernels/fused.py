"""torch's own fused functionals, for the rules torch has them for.

Their decay is that of torch's optimizers: inside the kernel where that is ours too, else a pass of its own before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_opt.kernels import foreach
from lightning_opt.kernels.experts import kept
from lightning_opt.kernels.rule import Bucket, Rule

_DEVICES = ("cpu", "cuda", "mps", "xpu")
_ONLY = {"adagrad": ("cpu", "cuda")}  # where torch has the kernel on fewer devices
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def supports(rule: Rule, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether torch's kernel takes these tensors, and rightly: weights, gradients and state all of one dtype."""
    if device.type == "cpu" and rule.name in ("sgd", "momentum") and dtypes[0].itemsize < 4:
        return False  # torch 2.13 leaves them as they are, but for the last few
    return (
        rule.fused is not None
        and device.type in _ONLY.get(rule.name, _DEVICES)
        and len(set(dtypes)) == 1
        and dtypes[0] in _DTYPES
    )


def run(rule: Rule, bucket: Bucket) -> None:
    """Carries the update out in place; torch's kernels know one count of steps: states of unlike age are foreach's."""
    assert rule.fused is not None
    if getattr(bucket.step, "since", None):
        foreach.run(rule, bucket)
    else:
        rule.fused(bucket)


def adam(bucket: Bucket) -> None:
    """Adam; ``bucket.options`` has lr, betas, eps."""
    _shrink(bucket)
    _fused_adam(torch._fused_adam_, bucket, bucket.l2 or 0.0)


def adamw(bucket: Bucket) -> None:
    """Adam and AdamW in one pass: decoupled decay runs inside torch's kernel, the other modes as `adam` does them."""
    lr = bucket.options["lr"]
    if bucket.l2 is not None or bucket.shrink is None or bucket.shrink != 1 - lr * bucket.options["weight_decay"]:
        adam(bucket)
    else:
        _fused_adam(torch._fused_adamw_, bucket, bucket.options["weight_decay"])


def sgd(bucket: Bucket) -> None:
    """SGD in one pass: p (1 - lr wd) - lr g is p - lr (g + wd p), so every decay runs inside torch's kernel."""
    lr = bucket.options["lr"]
    decay = bucket.l2 or 0.0
    if bucket.shrink is not None and lr:
        decay = (1 - bucket.shrink) / lr
    _fused_sgd(bucket, [], decay, momentum=0.0, dampening=0.0, nesterov=False, is_first_step=False)


def momentum(bucket: Bucket) -> None:
    """SGD with momentum; ``bucket.options`` has momentum, dampening, nesterov."""
    _shrink(bucket)
    own = {key: bucket.options[key] for key in ("momentum", "dampening", "nesterov")}
    _fused_sgd(bucket, bucket.states[0], bucket.l2 or 0.0, is_first_step=bucket.step == 1, **own)


def adagrad(bucket: Bucket) -> None:
    """AdaGrad; ``bucket.options`` has lr_decay and eps."""
    _shrink(bucket)
    torch._fused_adagrad_(
        bucket.params,
        bucket.grads,
        bucket.states[0],
        _counts(bucket),
        lr=bucket.options["lr"],
        lr_decay=bucket.options["lr_decay"],
        weight_decay=bucket.l2 or 0.0,
        eps=bucket.options["eps"],
        maximize=False,
        found_inf=_found(bucket),
    )


def _shrink(bucket: Bucket) -> None:
    if bucket.shrink is not None:
        if bucket.skip is None:
            torch._foreach_mul_(bucket.params, bucket.shrink)
        else:
            shrunk = zip(bucket.params, torch._foreach_mul(bucket.params, bucket.shrink), strict=True)
            torch._foreach_copy_(bucket.params, [kept(old, new, bucket.skip) for old, new in shrunk])


def _counts(bucket: Bucket) -> list[Tensor]:
    return [torch.full((), float(bucket.step), device=bucket.params[0].device)] * len(bucket.params)


def _found(bucket: Bucket) -> Tensor | None:
    """What torch's loss scaling calls it: 1 where the step must not happen."""
    return None if bucket.skip is None else bucket.skip.float()


def _fused_sgd(bucket: Bucket, buffers: list[Tensor], weight_decay: float, **own: Any) -> None:
    torch._fused_sgd_(
        bucket.params,
        bucket.grads,
        buffers,
        lr=bucket.options["lr"],
        weight_decay=weight_decay,
        maximize=False,
        found_inf=_found(bucket),
        **own,
    )


def _fused_adam(kernel: Callable[..., None], bucket: Bucket, weight_decay: float) -> None:
    exp_avgs, exp_avg_sqs, *largest = bucket.states
    beta1, beta2 = bucket.options["betas"]
    kernel(
        bucket.params,
        bucket.grads,
        exp_avgs,
        exp_avg_sqs,
        largest[0] if largest else [],
        _counts(bucket),
        lr=bucket.options["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=bucket.options["eps"],
        amsgrad=bool(largest),
        maximize=False,
        found_inf=_found(bucket),
    )
