"""What bfloat16 can hold: states that must stay wide, and weights that do not move."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from lightning_opt import kernels, optim
from lightning_opt.plan import ConfigError

EVERY = [name for name in optim.list_optimizers() if (rule := optim.find_rule(name)).elementwise and rule.state]
SIGNS = ("lion", "lion_sign_first", "signum", "sophia")  # with this gradient Sophia's steps are all at its limit


@pytest.mark.parametrize("way", ["eager", "foreach"])
@pytest.mark.parametrize(
    "name", [name if name in ("adamw", "lion") else pytest.param(name, marks=pytest.mark.slow) for name in EVERY]
)
def test_bfloat16_state_follows_float32_state_over_a_thousand_steps(name, way):
    """Constant gradient, the slow betas: a state that stalls below its limit shows in a thousand steps.

    Lion's momentum may stall a quarter below (beta2 0.99), which its sign does not see: the weights must be equal.
    """
    states = {}
    for state_dtype in ("float32", "bfloat16"):
        p = nn.Parameter(torch.zeros(3))
        two = len(optim.find_rule(name).defaults.get("betas", ())) == 2
        slow = {"betas": (0.9, 0.99 if name.startswith("lion") else 0.999)} if two else {}
        optimizer = optim.Optimizer([p], rule=name, lr=1e-4, state_dtype=state_dtype, implementation=way, **slow)
        optimizer.observe(**{signal: {} for signal in optimizer.needs})
        for k in range(1000):
            swing = 0.5 * (-1) ** k if name == "adabelief" else 0.0  # it divides by how far gradients differ
            p.grad = torch.tensor([1.0, -0.1, 3.0]) * (1 + swing)
            if "hessian_diagonal" in optimizer.needs:
                optimizer.observe(hessian_diagonal={p: p.grad.square()})
            optimizer.step()
        states[state_dtype] = [optimizer.state[p][key].float() for key in optim.find_rule(name).state] + [p.detach()]
        assert optimizer.state_bytes() == sum(row["state_bytes"] for row in optimizer.routing_table())
    for narrow, wide in zip(states["bfloat16"], states["float32"], strict=True):
        torch.testing.assert_close(narrow, wide, rtol=0.3 if name == "lion" else 0.03, atol=0)
    if name in SIGNS:
        assert torch.equal(states["bfloat16"][-1], states["float32"][-1])


@pytest.mark.parametrize("rounding", ["nearest", "master", "stochastic"])
def test_float16_weights_are_not_rounded_by_chance(rounding):
    p = nn.Parameter(torch.ones(4, dtype=torch.float16))
    if rounding != "stochastic":
        assert optim.Lion([p], weight_rounding=rounding).param_groups[0]["weight_rounding"] == rounding
        return
    with pytest.raises(ConfigError, match=r"lion.weight_rounding = stochastic: nearest or master"):
        optim.Lion([p], weight_rounding=rounding)


def test_cautious_decay_has_no_l2_form():
    p = nn.Parameter(torch.ones(4))
    with pytest.raises(ConfigError, match=r"adamw.cautious_weight_decay = true: .*weight_decay_mode decoupled"):
        optim.AdamW([p], weight_decay=0.1, weight_decay_mode="l2", cautious_weight_decay=True)
    assert optim.AdamW([p], weight_decay=0.1, weight_decay_mode="independent", cautious_weight_decay=True)


def test_the_second_moment_stays_wide_and_is_planned_so():
    model = nn.Linear(8, 4, bias=False)
    optimizer = optim.build(model, {"name": "adamw", "lr": 1e-3, "state_dtype": "bfloat16"})
    assert optimizer.routing_table()[0]["state_bytes"] == 32 * (2 + 4)
    assert kernels.Rule.__dataclass_fields__["wide_state"].default == ()


def first_step(caplog, lr, scale, dtype=torch.bfloat16):
    weights = [nn.Parameter(torch.full((4,), s, dtype=dtype)) for s in (0.01, scale)]
    optimizer = optim.Lion([{"params": weights, "role": "norm"}], lr=lr)
    with caplog.at_level(logging.WARNING, "lightning_opt.optim"):
        for _ in range(2):
            for p in weights:
                p.grad = torch.ones_like(p)
            optimizer.step()
    return [record.getMessage() for record in caplog.records], weights[1]


def test_one_warning_where_bfloat16_weights_cannot_move(caplog):
    # below 1 the neighbours are 2^-8 apart, from 1 on 2^-7: half of that is 0.0039
    messages, stuck = first_step(caplog, 1e-3, 1.0)
    assert torch.equal(stuck, torch.ones_like(stuck))
    assert len(messages) == 1
    assert "1 of 2 bfloat16" in messages[0]
    assert "role norm" in messages[0]


@pytest.mark.parametrize(("lr", "dtype"), [(5e-3, torch.bfloat16), (1e-3, torch.float32)])
def test_no_warning_where_they_can(caplog, lr, dtype):
    messages, moved = first_step(caplog, lr, 1.0, dtype)
    assert not torch.equal(moved, torch.ones_like(moved))
    assert messages == []
