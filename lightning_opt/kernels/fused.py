"""torch's own fused functionals, for the rules torch has them for."""

from __future__ import annotations

import torch

from lightning_opt.kernels.rule import Bucket, Rule, kept

_DEVICES = ("cpu", "cuda", "mps", "xpu")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def supports(rule: Rule, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether torch's kernel takes these tensors: weights, gradients and state all of one dtype."""
    return rule.fused is not None and device.type in _DEVICES and len(set(dtypes)) == 1 and dtypes[0] in _DTYPES


def run(rule: Rule, bucket: Bucket) -> None:
    """Carries the update out in place."""
    assert rule.fused is not None
    rule.fused(bucket)


def adam(bucket: Bucket) -> None:
    """Adam and AdamW; ``bucket.options`` has lr, betas, eps."""
    if bucket.shrink is not None:
        if bucket.skip is None:
            torch._foreach_mul_(bucket.params, bucket.shrink)
        else:
            shrunk = zip(bucket.params, torch._foreach_mul(bucket.params, bucket.shrink), strict=True)
            torch._foreach_copy_(bucket.params, [kept(old, new, bucket.skip) for old, new in shrunk])
    _fused_adam(torch._fused_adam_, bucket, bucket.l2 or 0.0)


def adamw(bucket: Bucket) -> None:
    """AdamW in one pass: decoupled decay runs inside torch's kernel, the other modes as `adam` does them."""
    lr = bucket.options["lr"]
    if bucket.l2 is not None or bucket.shrink is None or bucket.shrink != 1 - lr * bucket.options["weight_decay"]:
        adam(bucket)
    else:
        _fused_adam(torch._fused_adamw_, bucket, bucket.options["weight_decay"])


def _fused_adam(kernel: object, bucket: Bucket, weight_decay: float) -> None:
    exp_avgs, exp_avg_sqs = bucket.states
    beta1, beta2 = bucket.options["betas"]
    steps = [torch.full((), float(bucket.step), device=bucket.params[0].device)] * len(bucket.params)
    kernel(  # type: ignore[operator]
        bucket.params,
        bucket.grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=bucket.options["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=bucket.options["eps"],
        amsgrad=False,
        maximize=False,
        found_inf=None if bucket.skip is None else bucket.skip.float(),
    )
