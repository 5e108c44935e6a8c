"""Two rules and a signal that says which: no flapping, a reason for each switch, and resumes that go on alike."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lightning_opt.optim import Dynamic
from lightning_opt.plan import ConfigError

PHASES = {"calm": {"rule": "adamw", "betas": [0.9, 0.95]}, "rough": {"rule": "lion", "lr_scale": 0.1}}


def made(p, **more):
    return Dynamic([p], PHASES, lr=1e-2, **{"threshold": 0.1, "hysteresis": 0.5, "patience": 3, "dwell": 6, **more})


def weight():
    return nn.Parameter(torch.ones(5, dtype=torch.float64))


def take(p, optimizer, values, start=0):
    """One step per value of the signal; the phase each step was taken in."""
    phases = []
    for k, value in enumerate(values, start=start):
        p.grad = torch.randn(5, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        optimizer.observe(loss_volatility=torch.tensor(value))
        phases.append(optimizer.phase)
        optimizer.step()
    return phases


def test_it_switches_after_patience_and_back_below_the_hysteresis():
    p = weight()
    optimizer = made(p)
    switches = []
    optimizer.register_switch_hook(switches.append)
    values = [0.01] * 8 + [0.2] * 6 + [0.07] * 10 + [0.02] * 10
    phases = take(p, optimizer, values)
    # value 8 (from 0) is read at the end of step 9, and for 4 steps in all: step 13 is the first of the new phase
    assert phases == ["calm"] * 13 + ["rough"] * 16 + ["calm"] * 5
    assert [(s.step, s.after) for s in switches] == [(13, "rough"), (29, "calm")]
    assert switches[0].reason == "loss_volatility 0.2 is above 0.1 for 4 steps"
    assert switches[1].reason == "loss_volatility 0.02 is below 0.05 for 4 steps"


def test_a_leap_does_not_switch_and_what_was_filled_for_it_is_dropped():
    p = weight()
    optimizer = Dynamic([p], dict(reversed(PHASES.items())), lr=1e-2, threshold=0.1, patience=3, dwell=2)
    held = []
    for k, value in enumerate([0.01] * 6 + [0.5] * 2 + [0.01] * 6):
        take(p, optimizer, [value], start=k)
        held.append("exp_avg_sq" in optimizer.state[p])
    assert optimizer.phase == "rough"  # the first: Lion here
    assert held == [False] * 8 + [True] + [False] * 5
    assert set(optimizer.state[p]) <= {"step", "exp_avg", "since"}
    assert not optimizer.state[p].get("since")


def test_a_phase_lasts_and_no_number_switches_nothing():
    p = weight()
    optimizer = made(p, dwell=20, patience=0)
    phases = take(p, optimizer, [9.9] * 40)
    assert phases == ["calm"] * 21 + ["rough"] * 19
    optimizer = made(weight(), dwell=0, patience=0)
    assert set(take(optimizer.param_groups[0]["params"][0], optimizer, [math.nan] * 10)) == {"calm"}


@pytest.mark.parametrize("cut", [5, 10, 12, 13, 20, 29])
def test_a_resume_goes_on_bit_for_bit(cut):
    values = [0.01] * 8 + [0.2] * 6 + [0.07] * 10 + [0.02] * 10
    whole = weight()
    undisturbed = made(whole)
    phases = take(whole, undisturbed, values)
    p = weight()
    first = made(p)
    take(p, first, values[:cut])
    state = copy.deepcopy(first.state_dict())
    again = made(p)
    again.load_state_dict(state)
    assert take(p, again, values[cut:], start=cut) == phases[cut:]
    assert torch.equal(p, whole)
    assert again.state_dict()["phases"] == undisturbed.state_dict()["phases"]


def test_it_needs_its_signal_and_two_phases():
    p = weight()
    optimizer = made(p, signal="grad_norm_change")
    assert optimizer.needs == {"grad_norm_change"}
    p.grad = torch.ones_like(p)
    with pytest.raises(ConfigError, match="needs grad_norm_change: add the callback OptimizerSignals"):
        optimizer.step()
    with pytest.raises(ConfigError, match="must be two"):
        Dynamic([p], {"calm": {"rule": "adamw"}})
    with pytest.raises(ConfigError, match=r"phases.calm.until"):
        Dynamic([p], {"calm": {"rule": "adamw", "until": 5}, "rough": {"rule": "lion"}})
    for wrong in ({"signal": "weather"}, {"threshold": 0.0}, {"hysteresis": 2}, {"patience": -1}, {"dwell": 0.5}):
        with pytest.raises(ConfigError, match=f"optimizer.{next(iter(wrong))}"):
            made(p, **wrong)
