"""Checkpoints that do not fit are refused in one line; torch's AdamW goes in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_opt import optim
from lightning_opt.plan import ConfigError


def stepped(make, seed=0, **hyper):
    torch.manual_seed(seed)
    params = [nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(4))]
    optimizer = make(params, lr=1e-2, **hyper)
    for _ in range(3):
        step(optimizer, params)
    return optimizer, params


def step(optimizer, params, seed=1):
    if isinstance(optimizer, optim.Optimizer):  # torch's own come here too
        optimizer.observe(**{signal: {} for signal in optimizer.needs})
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


def refused(optimizer, saved, *words):
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ConfigError) as error:
        optimizer.load_state_dict(saved)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


def test_another_rule_role_or_number_of_groups_is_refused():
    (lion, params), (adamw, _) = stepped(optim.Lion), stepped(optim.AdamW)
    refused(adamw, lion.state_dict(), "param_groups[0].rule", "lion", "adamw")
    refused(lion, adamw.state_dict(), "param_groups[0].rule", "adamw", "lion")
    one, two = ([{"params": [p], "role": r} for p, r in zip(params, roles, strict=True)]
                for roles in (("matrix", "bias"), ("matrix", "norm")))  # fmt: skip
    refused(optim.Lion(one), optim.Lion(two).state_dict(), "param_groups[1].role", "norm", "bias")
    refused(optim.Lion(one), lion.state_dict(), "param_groups = 1", "2")


@pytest.mark.parametrize("how", [{}, {"fused": True}, {"foreach": True}])
def test_a_state_of_torchs_adamw_goes_on_here(how):
    theirs, their_params = stepped(torch.optim.AdamW, weight_decay=0.2, betas=(0.8, 0.9), **how)
    ours, params = stepped(optim.AdamW, seed=5, max_grad_norm=1e6)
    with torch.no_grad():
        for a, b in zip(params, their_params, strict=True):
            a.copy_(b)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))  # torch hands on the tensors themselves
    (group,) = ours.param_groups
    assert (group["weight_decay"], group["betas"], group["max_grad_norm"]) == (0.2, (0.8, 0.9), 1e6)
    assert "amsgrad" not in group
    assert all(type(ours.state[p]["step"]) is int for p in params)
    for _ in range(3):
        step(ours, params)
        step(theirs, their_params)
    for a, b in zip(params, their_params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_torch_does_otherwise_is_refused():
    ours, _ = stepped(optim.AdamW)
    refused(ours, stepped(torch.optim.AdamW, amsgrad=True)[0].state_dict(), "amsgrad", "true")
    refused(ours, stepped(torch.optim.AdamW, maximize=True)[0].state_dict(), "maximize")
    refused(ours, stepped(torch.optim.Adam)[0].state_dict(), "decoupled_weight_decay")
    refused(ours, stepped(torch.optim.SGD, momentum=0.9)[0].state_dict(), "momentum_buffer", "exp_avg_sq")


def test_how_it_runs_and_clips_is_not_taken_from_the_checkpoint():
    saved = stepped(optim.Lion, max_grad_norm=5.0, implementation="eager", weight_decay=0.5)[0].state_dict()
    mine, params = stepped(optim.Lion, max_grad_norm=None, implementation="foreach")
    mine.load_state_dict(saved)
    (group,) = mine.param_groups
    assert (group["max_grad_norm"], group["implementation"], group["weight_decay"]) == (None, "foreach", 0.5)
    old = copy.deepcopy(saved)
    del old["param_groups"][0]["initial_lr"], old["param_groups"][0]["weight_decay_mode"]
    mine.load_state_dict(old)
    step(mine, params)
    assert (group["weight_decay_mode"], group["initial_lr"]) == ("decoupled", 1e-2)


def test_state_saved_by_torch_in_bfloat16_is_widened_where_the_rule_needs_it():
    p = nn.Parameter(torch.randn(5, dtype=torch.bfloat16))
    theirs, ours = torch.optim.AdamW([p]), optim.AdamW([p])
    step(theirs, [p])
    assert theirs.state[p]["exp_avg_sq"].dtype == torch.bfloat16
    ours.load_state_dict(theirs.state_dict())
    assert {ours.state[p][name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}


@pytest.mark.parametrize("made_first", [True, False])
def test_a_resumed_scheduler_goes_on(made_first):
    def pair():
        p = nn.Parameter(torch.ones(3))
        optimizer = optim.Lion([p], lr=1e-2, weight_decay=0.1, weight_decay_mode="independent")
        return optimizer, [p]

    def schedule(optimizer, **more):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / 10, **more)

    straight, params = pair()
    scheduler = schedule(straight)
    for k in range(6):
        if k == 3:
            saved = copy.deepcopy((straight.state_dict(), scheduler.state_dict(), params[0].detach()))
        step(straight, params)
        scheduler.step()
    again, others = pair()
    resumed = schedule(again) if made_first else None
    again.load_state_dict(saved[0])
    if made_first:
        resumed.load_state_dict(saved[1])
    else:
        resumed = schedule(again, last_epoch=2)
    with torch.no_grad():
        others[0].copy_(saved[2])
    for _ in range(3):
        step(again, others)
        resumed.step()
    assert again.param_groups[0]["lr"] == pytest.approx(straight.param_groups[0]["lr"])
    assert torch.equal(params[0], others[0])


@pytest.mark.parametrize("name", optim.list_optimizers())
def test_rates_torch_takes(name):
    ones = torch.ones((3,) if optim.find_rule(name).least_ndim < 2 else (3, 2))
    p = nn.Parameter(ones.clone())
    make = getattr(optim, optim.OPTIMIZERS[name])
    betas = {"betas": (torch.tensor(0.5), 0.75)} if "betas" in optim.find_rule(name).defaults else {}
    optimizer = make([p], lr=torch.tensor([2e-3], dtype=torch.float64), **betas)
    assert optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["initial_lr"] == 2e-3
    assert type(optimizer.param_groups[0]["lr"]) is float
    assert not betas or optimizer.param_groups[0]["betas"] == (0.5, 0.75)
    mode = "decoupled" if optim.find_rule(name).writes else "independent"
    still = make([p], lr=0, weight_decay=0.1, weight_decay_mode=mode)
    step(still, [p])
    assert torch.equal(p, ones)
    still.param_groups[0]["lr"] = 1e-2
    step(still, [p])
    assert not torch.equal(p, ones)
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        optim.build(nn.Linear(2, 2), {"name": name, "lr": 0.0})


def gone_on(make, before, after, *shape, dtype=torch.float32):
    """An optimizer under `after` that took over the state of one under `before`, after two steps, and its weight."""
    made = []
    for hyper in (before, after):
        p = nn.Parameter(torch.ones(shape, dtype=dtype))
        made.append((make([p], **hyper), p))
    (old, p), (new, q) = made
    for _ in range(2):
        step(old, [p])
    new.load_state_dict(new.with_own_values(old.state_dict()))
    return new, q


def test_a_master_that_the_options_of_now_want_is_made_and_one_they_do_not_is_dropped():
    near = {"lr": 1e-4, "weight_rounding": "nearest"}
    master = {**near, "weight_rounding": "master"}
    new, p = gone_on(optim.AdamW, near, master, 4, dtype=torch.bfloat16)
    assert torch.equal(new.state[p]["master"], p.detach().float())
    with torch.no_grad():
        p.fill_(3.0)  # weights may be loaded later than states
    for _ in range(200):
        p.grad = torch.ones_like(p)
        new.step()
    assert 2.97 < p[0].item() < 2.99
    new, p = gone_on(optim.AdamW, master, near, 4, dtype=torch.bfloat16)
    assert "master" not in new.state[p]


@pytest.mark.parametrize(
    ("make", "before", "after", "words"),
    [
        (optim.Adafactor, {}, {"beta1": 0.9}, "optimizer.beta1 = 0.9: must stay 0.0: adafactor's state step_avg"),
        (optim.SOAP, {"max_precond_dim": 10}, {"max_precond_dim": 100}, "optimizer.max_precond_dim = 100: must stay"),
        (optim.SOAP, {}, {"block_size": 4, "betas": (0.9, 0.9)}, "optimizer.block_size = 4: must stay null"),
        (optim.RMSprop, {"momentum": 0.5}, {"momentum": 0.0}, "optimizer.momentum = 0.0: must stay 0.5"),
    ],
)
def test_options_that_need_other_states_are_refused(make, before, after, words):
    with pytest.raises(ConfigError) as error:
        gone_on(make, before, after, 8, 16)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_states_of_another_shape_are_refused():
    saved = stepped(optim.Lion)[0].state_dict()
    saved["state"][0]["exp_avg"] = torch.zeros(3, 3)
    refused(stepped(optim.Lion)[0], saved, "param_groups[0].state.exp_avg", "(6, 5)", "lion")


def test_torch_casts_no_state_while_it_loads(monkeypatch):
    """It would make float32 of codes: eight bytes per weight more for as long as it takes."""
    optimizer, _ = stepped(optim.AdamW)
    saved = optimizer.state_dict()
    monkeypatch.setattr(
        torch.optim.Optimizer, "_process_value_according_to_param_policy", lambda *_, **__: pytest.fail("cast")
    )
    optimizer.load_state_dict(saved)
