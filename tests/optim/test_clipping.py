"""Clipping against torch.nn.utils.clip_grad_norm_."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import nn

from lightning_opt import optim


def parameters(count=5, scale=1.0, dtype=torch.float32):
    torch.manual_seed(3)
    params = [nn.Parameter(torch.zeros(3 + k, 4, dtype=dtype)) for k in range(count)]
    for p in params:
        p.grad = torch.randn_like(p) * scale
    return params


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_limit_for_all_is_torchs_global_clip(scale, dtype):
    ours, theirs = parameters(scale=scale, dtype=dtype), parameters(scale=scale, dtype=dtype)
    groups = [{"params": ours[:2], "role": "matrix"}, {"params": ours[2:], "role": "norm"}]
    optimizer = optim.Lion(groups, max_grad_norm=1.0)
    norm = optimizer.clip_()
    expected = nn.utils.clip_grad_norm_(theirs, 1.0)
    exact = {} if dtype != torch.bfloat16 else {"rtol": 1e-2, "atol": 1e-5}
    torch.testing.assert_close(norm.to(expected.dtype), expected, **exact)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **exact)
    assert optimizer.last_grad_norm is norm
    parts = optimizer.grad_norms()
    assert set(parts) == {"matrix", "norm"}
    assert math.hypot(*(float(v) for v in parts.values())) == pytest.approx(float(norm), rel=1e-5)


def test_groups_with_other_limits_are_clipped_by_themselves():
    ours, theirs = parameters(4), parameters(4)
    groups = [
        {"params": ours[:1], "max_grad_norm": None},
        {"params": ours[1:2], "max_grad_norm": 0.5},
        {"params": ours[2:3], "max_grad_norm": 0.5},
        {"params": ours[3:], "max_grad_norm": 0.5, "clip_group": "own"},
    ]
    total = optim.AdamW(groups).clip_()
    assert float(total) == pytest.approx(float(nn.utils.get_total_norm([p.grad for p in theirs])))
    nn.utils.clip_grad_norm_(theirs[1:3], 0.5)
    nn.utils.clip_grad_norm_(theirs[3:], 0.5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_step_clips_where_nobody_has_and_only_then():
    (a,), (b,), (c,) = parameters(1, 10.0), parameters(1, 10.0), parameters(1, 10.0)
    forgetful = optim.AdamW([a], max_grad_norm=1.0, eps=1.0)
    forgetful.step()
    by_hand = optim.AdamW([b], eps=1.0)
    nn.utils.clip_grad_norm_([b], 1.0)
    by_hand.step()
    assert torch.equal(a, b)
    careful = optim.AdamW([c], max_grad_norm=1.0, eps=1.0)
    norm = careful.clip_()
    careful.step()
    assert torch.equal(a, c)
    assert careful.last_grad_norm is norm, "clipped gradients were clipped again"
    c.grad = 10 * torch.ones_like(c)
    careful.step()
    assert float(careful.last_grad_norm) == pytest.approx(10 * math.sqrt(c.numel()))
    assert float(c.grad.norm()) == pytest.approx(1.0, rel=1e-5)


def replaced(p):
    version = p.grad._version
    p.grad = torch.ones_like(p)
    while p.grad._version < version:  # so that the version alone does not tell
        p.grad.mul_(10)


def zeroed_and_refilled(p):
    p.grad.zero_()
    (p * 100).sum().backward()


CHANGES = {
    "replaced": replaced,
    "zeroed and refilled": zeroed_and_refilled,
    "accumulated on top": lambda p: (p * 100).sum().backward(),
    "written": lambda p: p.grad.mul_(5.0),
    "written in a list": lambda p: torch._foreach_mul_([p.grad], 5.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_clip_counts_only_for_the_gradients_it_left(change):
    """After a skipped step, or more accumulation: the update never sees a norm above the limit."""
    p, other = parameters(2, 10.0)
    optimizer = optim.Lion([p, other], max_grad_norm=1.0)
    optimizer.clip_()
    CHANGES[change](p)
    seen = []
    optimizer.register_before_update_hook(lambda _: seen.append(float(nn.utils.get_total_norm([p.grad, other.grad]))))
    optimizer.step()
    assert seen == [pytest.approx(1.0, rel=1e-4)]
    assert float(optimizer.last_grad_norm) > 1.5


def test_a_gradient_that_came_later_and_one_written_unseen_are_clipped():
    p, late = parameters(2, 10.0)
    late.grad = None
    optimizer = optim.Lion([p, late], max_grad_norm=1.0)
    optimizer.clip_()
    late.grad = torch.ones_like(late)
    for _ in range(2):
        optimizer.step()
        assert float(nn.utils.get_total_norm([p.grad, late.grad])) == pytest.approx(1.0, rel=1e-4)
        p.grad.data.mul_(100.0)  # its version does not tell, nor does it when a CUDA graph writes


def test_a_clip_keeps_no_gradient_alive():
    (p,) = parameters(1)
    optimizer = optim.Lion([p], max_grad_norm=1.0)
    optimizer.clip_()
    gradient = weakref.ref(p.grad)
    optimizer.zero_grad()
    gc.collect()
    assert gradient() is None


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_leaves_gradients_and_is_reported(poison):
    params = parameters(3)
    params[1].grad[0, 0] = poison
    before = [p.grad.clone() for p in params]
    norm = optim.Lion(params, max_grad_norm=0.1).clip_()
    assert not torch.isfinite(norm)
    for p, grad in zip(params, before, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=0, equal_nan=True)


def test_without_gradients_the_norm_is_zero():
    optimizer = optim.Lion([nn.Parameter(torch.ones(2))], max_grad_norm=1.0)
    assert float(optimizer.clip_()) == 0.0
    optimizer.step()
    assert optimizer.state_bytes() == 0
