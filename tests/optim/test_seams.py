"""At a seam between phases, for every rule: one name means one thing, and each state counts its own updates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_opt import optim
from lightning_opt.optim import Optimizer, Phased

STEPS, WARM = 150, 50
# First moments that forget alike, second moments that have forgotten nothing yet.
OWN = {
    "adafactor": {"beta1": 0.9, "relative_step": False, "scale_parameter": False},
    "adopt": {"betas": (0.9, 0.9)},  # its second moment begins at the first gradient's square, which 0.9 forgets
    "kron": {"beta1": 0.9},
    "lion": {"betas": (0.9, 0.9)},
    "lion_sign_first": {"beta1": 0.9},
    "rmsprop": {"alpha": 0.9, "momentum": 0.9},
    "soap": {"betas": (0.9, 0.9)},
    **{name: {"momentum": 0.9} for name in ("momentum", "muon", "normuon", "scion", "signum")},
}
# A sum of squares, which only grows, is that of the filling's steps.
RATIO = {"adagrad": (STEPS / WARM) ** 0.5}
TOLERANCE = {"kron": 0.4}  # its preconditioner has not settled in 50 steps


def own(name):
    rule = optim.find_rule(name)
    betas = {"betas": (0.9, 0.999)} if "betas" in rule.defaults else {}
    return {**OWN.get(name, betas), **({"implementation": "eager"} if rule.elementwise else {})}


def gradient(k, size):
    return size * torch.randn(16, 16, generator=torch.Generator().manual_seed(k))


def stepped(make, steps, size=0.01):
    """The optimizer, its weight, and the root mean square of the last step, after gradients of no weight's."""
    p = nn.Parameter(torch.randn(16, 16, generator=torch.Generator().manual_seed(99)))
    optimizer = make(p)
    optimizer.observe(**{signal: {} for signal in optimizer.needs})
    for k in range(steps):
        p.grad = gradient(k, size)
        before = p.detach().clone()
        optimizer.step()
    return optimizer, p, (p.detach() - before).square().mean().sqrt().item()


def alone(name):
    return lambda p: Optimizer([p], rule=name, lr=1e-3, **own(name))


def after(first, name):
    phases = {"a": {"rule": first, "until": STEPS, **own(first)}, "b": {"rule": name, **own(name)}}
    return lambda p: Phased([p], phases, lr=1e-3, warm=WARM)


@pytest.mark.parametrize("name", [name for name in optim.list_optimizers() if not optim.find_rule(name).writes])
def test_the_first_step_behind_a_seam_is_that_of_the_rule_alone(name):
    first = "lion" if name == "adamw" else "adamw"
    want = stepped(alone(name), STEPS + 1)[2]
    got = stepped(after(first, name), STEPS + 1)[2]
    assert got == pytest.approx(want * RATIO.get(name, 1.0), rel=TOLERANCE.get(name, 0.1))


def test_a_rule_that_writes_its_weights_begins_with_its_own_warmup():
    phases = {"a": {"rule": "adamw", "until": STEPS}, "b": {"rule": "schedule_free_adamw", "warmup_steps": 100}}
    got = stepped(lambda p: Phased([p], phases, lr=1e-3, warm=WARM), STEPS + 1)[2]
    assert got == pytest.approx(1e-3 / 100, rel=0.1)


def test_states_of_one_name_are_the_same_of_the_same_gradients():
    seen = {}
    for name in optim.list_optimizers():
        optimizer, p, _ = stepped(alone(name), STEPS, size=1.0)
        for state, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor):
                seen.setdefault(state, []).append((name, value))
    shared = {state: held for state, held in seen.items() if len(held) > 1}
    assert {"exp_avg", "exp_avg_sq"} <= shared.keys()
    apart = []
    for state, held in shared.items():
        known = dict(held)
        right = known.get("adamw", held[0][1])
        for name, value in held:
            if (value - right).norm() > 0.05 * right.norm():
                apart.append((state, name))
    assert not apart


@pytest.mark.parametrize(("first", "name"), [("rmsprop", "momentum"), ("momentum", "rmsprop"), ("signum", "momentum")])
def test_momenta_of_another_meaning_do_not_go_on(first, name):
    want = stepped(alone(name), STEPS + 1)[2]
    assert stepped(after(first, name), STEPS + 1)[2] == pytest.approx(want, rel=0.1)


def test_a_vector_that_lacks_nothing_does_not_keep_a_matrix_from_being_filled():
    v, m = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, 4))
    phases = {"a": {"rule": "adamw", "until": 10}, "b": {"rule": "soap"}}
    optimizer = Phased([v, m], phases, lr=1e-3, warm=5)
    optimizer.state[v] |= {"step": 0, "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
    optimizer.state[v] |= {"rotated_avg": torch.zeros(4), "rotated_avg_sq": torch.zeros(4)}
    for _ in range(8):
        for p in (v, m):
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert "rotated_avg" in optimizer.state[m]


def test_a_rule_that_works_on_all_tensors_together_is_filled_so_too(monkeypatch):
    seen = []
    rule = optim.find_rule("mars").form({"clip": "global"})
    see = rule.together

    def together(buckets):
        seen.append(len(buckets))
        see(buckets)

    object.__setattr__(rule, "together", together)
    monkeypatch.setattr(optim.mars, "_TOGETHER", rule, raising=False)
    p = nn.Parameter(torch.ones(4, 4))
    phases = {"a": {"rule": "lion", "until": 4}, "b": {"rule": "mars", "clip": "global"}}
    optimizer = Phased([p], phases, lr=1e-3, warm=2)
    try:
        for _ in range(4):
            p.grad = torch.ones_like(p)
            optimizer.step()
    finally:
        object.__setattr__(rule, "together", see)
    assert seen == [1, 1]
