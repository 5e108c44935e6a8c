"""A stack of matrices (experts in one 3-D weight) moves as its matrices would alone; a Conv1d is one matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_opt import optim
from lightning_opt.optim.blocks import is_stack

RULES = [
    ("adafactor", {"clip_threshold": 0.5}),
    ("muon", {"scale": "weight_rms"}),
    ("normuon", {"scale": "weight_rms"}),
    ("soap", {"normalize_grads": True}),
    ("adam_mini", {}),
]


@pytest.mark.parametrize(("name", "more"), RULES, ids=[name for name, _ in RULES])
def test_every_matrix_of_a_stack_moves_as_it_would_alone(name, more):
    """Weights 10 and gradients 100 times apart: what is averaged over the stack would show."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 8, 6, generator=generator) * torch.tensor([1.0, 10.0])[:, None, None]
    stack, alone = nn.Parameter(weights.clone()), [nn.Parameter(w.clone()) for w in weights]
    optimizers = [
        optim.Optimizer([{"params": [stack], "role": "expert"}], rule=name, lr=1e-2, **more),
        optim.Optimizer([{"params": alone, "role": "matrix"}], rule=name, lr=1e-2, **more),
    ]
    for _ in range(3):
        stack.grad = torch.randn(2, 8, 6, generator=generator) * torch.tensor([1.0, 0.01])[:, None, None]
        for p, g in zip(alone, stack.grad, strict=True):
            p.grad = g.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert not torch.equal(stack.detach(), weights)
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in alone]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "role", "stacked"),
    [((3, 4, 5), "all", True), ((3, 4, 5), "matrix", False), ((3, 4, 5, 6), "all", False), ((3, 4), "expert", False)],
)
def test_what_is_a_stack(shape, role, stacked):
    assert is_stack(torch.empty(shape), role) == stacked


def test_adam_mini_has_one_number_per_output_of_a_convolution():
    p = nn.Parameter(torch.ones(8, 6, 3))
    p.grad = torch.ones_like(p)
    optimizer = optim.AdamMini([{"params": [p], "role": "matrix"}], lr=0.1)
    optimizer.step()
    assert optimizer.state[p]["block_sq"].shape == (8,)


@pytest.mark.parametrize(("name", "key"), [("muon", "exp_avg"), ("adafactor", "step_avg")])
def test_narrow_states_of_whole_matrices_are_rounded_by_chance(name, key):
    """A momentum of 0.999 in bfloat16 stalls at a quarter of a constant gradient, but not on average by chance."""
    relative = {"beta1": 0.999, "relative_step": False, "scale_parameter": False}
    more = {"momentum": 0.999, "ns_steps": 1} if name == "muon" else relative
    found = {}
    for rounding in ("nearest", "stochastic"):
        p = nn.Parameter(torch.zeros(64, 64))
        optimizer = optim.Optimizer([p], rule=name, lr=1.0, state_dtype="bfloat16", state_rounding=rounding, **more)
        p.grad = torch.ones_like(p)
        for _ in range(600):
            optimizer.step()
        assert optimizer.state[p][key].dtype == torch.bfloat16
        found[rounding] = optimizer.state[p][key].float().mean().item()
    right = 1 - 0.999**600
    assert found["nearest"] == 0.25
    assert abs(found["stochastic"] - right) < 0.002
