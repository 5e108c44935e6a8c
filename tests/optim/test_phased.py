"""One optimizer whose rule changes on the way: what goes on at a seam, what starts, and that nobody notices."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from lightning_opt import optim
from lightning_opt.optim import Phased
from lightning_opt.plan import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf" / "optimizer"
PHASES = {
    "start": {"rule": "lion", "until": 12, "lr_scale": 0.1, "weight_decay": 0.5, "betas": [0.95, 0.98]},
    "middle": {"rule": "adamw", "until": 24, "betas": [0.9, 0.95]},
    "end": {"rule": "lion", "lr_scale": 0.2},
}
STEPS, WARM, LR = 34, 5, 1e-2


def problem(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1)).to(dtype)


def take(model, optimizer, first, last, flag=lambda k: None):
    """Steps `first` to `last` - 1, counted from 0, each with its own batch."""
    losses = []
    for k in range(first, last):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(k)).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True).sin()).float().square().mean()
        loss.backward()
        if (mask := flag(k)) is not None:
            undo = optimizer.register_before_update_hook(lambda o, mask=mask: o.skip_step(mask))
        optimizer.step()
        if mask is not None:
            undo()
        losses.append(loss.item())
    return losses


def phased(model, **more):
    return Phased(model.parameters(), PHASES, lr=LR, **{"warm": WARM, "weight_decay": 0.1, **more})


def by_hand(weights, gradients):
    """Lion, AdamW, Lion in float64, from the papers; v runs along for the last WARM steps of the first phase."""
    p, m, v = (x.copy() for x in (weights, np.zeros_like(weights), np.zeros_like(weights)))
    for k, g in enumerate(gradients, start=1):
        if k <= 12 or k > 24:
            lr, wd, (b1, b2) = (1e-3, 0.5, (0.95, 0.98)) if k <= 12 else (2e-3, 0.1, (0.9, 0.99))
            step = lr * np.sign(b1 * m + (1 - b1) * g)
            p = p * (1 - lr * wd) - step
            m = b2 * m + (1 - b2) * g
            if 12 - WARM < k <= 12:
                v = 0.95 * v + 0.05 * g * g
        else:
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            m_hat, v_hat = m / (1 - 0.9**k), v / (1 - 0.95 ** (k - 12 + WARM))
            p = p * (1 - LR * 0.1) - LR * m_hat / (np.sqrt(v_hat) + 1e-8)
    return p


@pytest.mark.parametrize("implementation", ["eager", "foreach", "compiled", "auto"])
def test_the_whole_course_equals_one_written_by_hand(implementation):
    rng = np.random.default_rng(0)
    weights, gradients = rng.normal(size=(7, 3)), rng.normal(size=(STEPS, 7, 3))
    p = nn.Parameter(torch.tensor(weights))
    optimizer = Phased([p], PHASES, lr=LR, warm=WARM, weight_decay=0.1, implementation=implementation)
    for g in gradients:
        p.grad = torch.tensor(g)
        optimizer.step()
    np.testing.assert_allclose(p.detach().numpy(), by_hand(weights, gradients), rtol=0, atol=1e-12)


def test_states_come_and_go():
    model = problem()
    optimizer = phased(model)
    p = next(model.parameters())
    held = {}
    for k in range(STEPS):
        take(model, optimizer, k, k + 1)
        held[k + 1] = set(optimizer.state[p]) & {"exp_avg", "exp_avg_sq"}
    both = {"exp_avg", "exp_avg_sq"}
    assert [step for step in held if held[step] == both] == list(range(12 - WARM + 1, 24))
    assert all(held[step] in (both, {"exp_avg"}) for step in held)
    assert optimizer.state_bytes() == sum(q.numel() * 8 for q in model.parameters())


@pytest.mark.parametrize("cut", [3, 7, 9, 12, 13, 20, 24, 30])
def test_a_resume_in_any_phase_goes_on_bit_for_bit(cut):
    whole = problem(torch.float32)
    take(whole, phased(whole), 0, STEPS)
    first = problem(torch.float32)
    optimizer = phased(first)
    take(first, optimizer, 0, cut)
    file = io.BytesIO()
    torch.save((first.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second = problem(torch.float32)
    second.load_state_dict(weights)
    again = phased(second)
    again.load_state_dict(state)
    assert [group["rule"] for group in again.param_groups] == [group["rule"] for group in optimizer.param_groups]
    take(second, again, cut, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_a_resume_under_values_of_now_takes_those_of_its_phase():
    model = problem()
    optimizer = phased(model)
    take(model, optimizer, 0, 26)
    changed = copy.deepcopy(PHASES)
    changed["end"]["weight_decay"] = 0.7
    again = Phased(model.parameters(), changed, lr=LR, warm=WARM)
    again.load_state_dict(again.with_own_values(optimizer.state_dict()))
    assert again.phase == "end"
    assert again.param_groups[0]["weight_decay"] == 0.7
    assert again.param_groups[0]["lr_factor"] == 0.2
    other = Phased(model.parameters(), {"only": {"rule": "lion"}}, lr=LR)
    assert other.with_own_values(optimizer.state_dict()) is None
    with pytest.raises(ConfigError, match=r"phases = end: the checkpoint's phase must be one of only"):
        other.load_state_dict(optimizer.state_dict())


def test_schedules_scale_and_phases_multiply():
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = Phased([p], {"a": {"rule": "lion", "until": 4, "lr_scale": 0.5}, "b": {"rule": "lion"}}, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (k + 1))
    moved = []
    for _ in range(8):
        before = p.detach().clone()
        p.grad = torch.ones_like(p)
        optimizer.step()
        moved.append(float((before - p.detach())[0]))
        schedule.step()
    assert moved == pytest.approx([0.1 / (k + 1) * (0.5 if k < 4 else 1.0) for k in range(8)])
    assert schedule.base_lrs == [0.1]


def test_the_rate_ramps_up_behind_a_seam_only():
    p = nn.Parameter(torch.zeros(3))
    optimizer = Phased([p], {"a": {"rule": "lion", "until": 2}, "b": {"rule": "lion", "lr": 0.2}}, lr=0.1, ramp=3)
    factors = []
    for _ in range(7):
        factors.append(optimizer.param_groups[0]["lr_factor"])
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert factors == pytest.approx([1, 1, 0.5, 1, 1.5, 2, 2])


def test_groups_with_a_rule_keep_it_and_own_values_hold_in_every_phase():
    phased_one, own, fixed = (nn.Parameter(torch.ones(4)) for _ in range(3))
    groups = [
        {"params": [phased_one]},
        {"params": [own], "weight_decay": 0.0, "eps": 1e-3},
        {"params": [fixed], "rule": "adamw", "lr": 0.5},
    ]
    optimizer = Phased(groups, PHASES, lr=LR, warm=WARM, weight_decay=0.1)
    seen = []
    for _ in range(30):
        seen.append([(g["rule"], g["weight_decay"], g.get("eps"), g["lr_factor"]) for g in optimizer.param_groups])
        for p in (phased_one, own, fixed):
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert seen[0] == [("lion", 0.5, None, 0.1), ("lion", 0.0, None, 0.1), ("adamw", 0.1, 1e-8, 1.0)]
    assert seen[15] == [("adamw", 0.1, 1e-8, 1.0), ("adamw", 0.0, 1e-3, 1.0), ("adamw", 0.1, 1e-8, 1.0)]
    assert seen[25][:2] == [("lion", 0.1, None, 0.2), ("lion", 0.0, None, 0.2)]
    assert optimizer.state[fixed]["step"] == 30
    assert "since" not in optimizer.state[fixed]


@pytest.mark.parametrize("kind", [bool, torch.tensor])
def test_skipped_steps_count_for_the_phase_and_for_no_state(kind):
    skipped = {9, 12, 20}
    model = problem()
    optimizer = phased(model)
    take(model, optimizer, 0, STEPS - 10, flag=lambda k: kind(k in skipped))
    state = optimizer.state_dict()["state"][0]
    assert optimizer.phase == "end"
    optimizer = phased(problem())
    model = problem()
    optimizer = phased(model)
    take(model, optimizer, 0, 22, flag=lambda k: kind(k in skipped))
    state = optimizer.state_dict()["state"][0]
    assert optimizer.taken == 22
    assert state["step"] == 19
    assert state["step"] - state["since"]["exp_avg_sq"] == 22 - 7 - 3
    assert optimizer.phase == "middle"


def test_fused_is_not_asked_with_states_of_several_ages():
    results = []
    for implementation in ("fused", "foreach"):
        model = problem(torch.float32)
        phases = {"a": {"rule": "lion", "until": 5, "implementation": "auto"}, "b": {"rule": "adamw"}}
        optimizer = Phased(model.parameters(), phases, lr=LR, warm=3, implementation=implementation)
        take(model, optimizer, 0, 12)
        results.append([p.detach().clone() for p in model.parameters()])
        assert optimizer.implementations["adamw"].startswith("foreach")
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_bfloat16_weights_keep_a_float32_moment_while_it_is_filled():
    model = problem(torch.bfloat16)
    optimizer = phased(model, state_dtype="bfloat16")
    take(model, optimizer, 0, 10)
    p = next(model.parameters())
    assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32
    again = phased(model, state_dtype="bfloat16")
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.state[p]["exp_avg_sq"].dtype == torch.float32
    assert again.state[p]["exp_avg"].dtype == torch.bfloat16
    take(model, again, 10, 14)
    assert again.state[p]["exp_avg_sq"].dtype == torch.float32


def test_rules_of_whole_matrices_are_phases_too():
    p = nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    phases = {"a": {"rule": "adamw", "until": 6}, "b": {"rule": "muon", "until": 12}, "c": {"rule": "soap"}}
    optimizer = Phased([p], phases, lr=1e-3, warm=4)
    for k in range(18):
        p.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(k))
        before = p.detach().clone()
        optimizer.step()
        moved = (p.detach() - before).square().mean().sqrt()
        assert 0 < moved < 5e-3, f"step {k}"
    with pytest.raises(ValueError, match="takes matrices"):
        Phased([nn.Parameter(torch.ones(3))], phases)


def test_fractions_wait_for_the_length_of_the_run():
    model = problem()
    optimizer = Phased(model.parameters(), {"a": {"rule": "lion", "until": 0.25}, "b": {"rule": "adamw"}}, warm=0.1)
    assert optimizer.needs == {"run_length"}
    with pytest.raises(ConfigError, match="needs run_length"):
        take(model, optimizer, 0, 1)
    optimizer.observe(run_length=40)
    assert optimizer.describe() == "a (lion) until step 10, then b (adamw)"
    take(model, optimizer, 0, 7)
    assert "exp_avg_sq" in optimizer.state[next(model.parameters())]
    switches = []
    optimizer.register_switch_hook(switches.append)
    take(model, optimizer, 7, 12)
    assert [(s.step, s.before, s.after, s.rule) for s in switches] == [(10, "a", "b", "adamw")]
    assert str(switches[0]) == "a -> b (adamw) after step 10: a ends there"


@pytest.mark.parametrize(
    ("warm", "until", "first"), [(0.02, 20, 11), (2, 20, 19), (0.3, 20, 9), (0.02, 6, 2), (0, 20, None)]
)
def test_a_fraction_warms_ten_steps_at_least(warm, until, first):
    model = problem()
    p = next(model.parameters())
    optimizer = Phased(model.parameters(), {"a": {"rule": "lion", "until": until}, "b": {"rule": "adamw"}}, warm=warm)
    if "run_length" in optimizer.needs:
        optimizer.observe(run_length=40)
    filled = [k for k in range(1, until) if take(model, optimizer, k - 1, k) and "exp_avg_sq" in optimizer.state[p]]
    assert filled == ([] if first is None else list(range(first, until)))


def fed(p, estimates, warm, cut=None):
    """Lion, then Sophia from step 20 on; `estimates` by step; reloaded after step `cut`."""
    phases = {"a": {"rule": "lion", "until": 20}, "b": {"rule": "sophia", "betas": [0.9, 0.8], "gamma": 0.5}}
    optimizer = Phased([p], phases, lr=LR, warm=warm)
    optimizer.observe(hessian_diagonal={})
    for k in range(26):
        if k == cut:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = Phased([p], phases, lr=LR, warm=warm)
            optimizer.load_state_dict(state)
        p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(k), dtype=p.dtype)
        optimizer.observe(hessian_diagonal={p: estimates[k]} if k in estimates else {})
        optimizer.step()
        if k == 19:
            before = p.detach().clone(), optimizer.state[p]["exp_avg"].clone()
            curved = optimizer.state[p]["hessian"].clone()
        if k == 20:
            step = before[0] - p.detach(), before[1].lerp(p.grad, 0.1)
    return curved, step, optimizer


def test_sophia_begins_with_the_mean_of_the_estimates_before_the_seam(caplog):
    estimates = {k: torch.full((4, 3), 2.0 + k, dtype=torch.float64) for k in (0, 5, 10, 15, 25)}
    p = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    curved, (step, momentum), optimizer = fed(p, estimates, warm=12)
    torch.testing.assert_close(curved, (estimates[10] + estimates[15]) / 2)  # those of the last 12 steps
    torch.testing.assert_close(step, LR * (momentum / (0.5 * curved)).clamp(-1, 1))
    assert (momentum / (0.5 * curved)).abs().max() < 1, "not one sign among the first steps"
    torch.testing.assert_close(optimizer.state[p]["hessian"], curved.lerp(estimates[25], 0.2))
    assert "starts from zero" not in caplog.text
    again = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    fed(again, estimates, warm=12, cut=13)
    assert torch.equal(p, again)


@pytest.mark.parametrize(("warm", "steps"), [(0, (0, 10)), (4, (0, 10))])
def test_sophia_without_an_estimate_before_the_seam_is_told(caplog, warm, steps):
    estimates = {k: torch.ones(4, 3) for k in steps}
    curved, _, _ = fed(nn.Parameter(torch.ones(4, 3)), estimates, warm)
    assert not curved.any()
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("phase b begins before any hessian_diagonal came: sophia starts from zero")


def test_a_copy_goes_on_alike():
    model = problem()
    optimizer = phased(model)
    take(model, optimizer, 0, 10)
    both = copy.deepcopy(SimpleNamespace(model=model, optimizer=optimizer))
    take(model, optimizer, 10, 28)
    take(both.model, both.optimizer, 10, 28)
    assert both.optimizer.phase == "end"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), both.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ({}, "optimizer.phases"),
        ({"a": {"until": 3}}, "must name its rule"),
        ({"a": {"rule": "lino"}}, "did you mean lion?"),
        ({"a": {"rule": "lion"}, "b": {"rule": "adamw"}}, r"phases.a.until = null: must say where the phase ends"),
        ({"a": {"rule": "lion", "until": 5}}, r"phases.a.until = 5: must be null"),
        ({"a": {"rule": "lion", "until": 0}, "b": {"rule": "lion"}}, r"phases.a.until = 0"),
        ({"a": {"rule": "lion", "until": 9}, "b": {"rule": "lion", "until": 9}, "c": {"rule": "lion"}}, "later than 9"),
        ({"a": {"rule": "lion", "eps": 1e-8}}, r"phases.a.eps"),
        ({"a": {"rule": "lion", "state_dtype": "bfloat16"}}, r"phases.a.state_dtype"),
        ({"a": {"rule": "lion", "lr": -1.0}}, r"phases.a.lr = -1.0: must be a number > 0"),
        ({"a": {"rule": "lion", "betas": [0.9]}}, r"phases.a.betas"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(phases, words):
    with pytest.raises(ConfigError, match=words) as error:
        Phased([nn.Parameter(torch.ones(2))], phases)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"did you mean weight_decay\?"):
        Phased([nn.Parameter(torch.ones(2))], PHASES, weight_deca=0.1)


@pytest.mark.parametrize("name", ["phased", "lion_adamw_lion", "dynamic"])
def test_the_yaml_builds_it_by_role(name):
    config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    config["roles"]["bias"] = {"rule": "adamw", "lr_scale": 2.0}
    optimizer = optim.build(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), {**config, "lr_scale": 0.5})
    rows = {group["role"]: group for group in optimizer.param_groups}
    first, decay = ("adamw", 0.1) if name == "dynamic" else ("lion", 1.0)
    assert {role: group["rule"] for role, group in rows.items()} == {"matrix": first, "norm": first, "bias": "adamw"}
    assert {role: group["weight_decay"] for role, group in rows.items()} == {"matrix": decay, "norm": 0, "bias": 0.1}
    assert {role: group["lr"] for role, group in rows.items()} == {"matrix": 5e-4, "norm": 5e-4, "bias": 1e-3}
    assert optimizer.routing_table()[0]["lr"] == pytest.approx(5e-4 if name == "dynamic" else 5e-5)
    if name == "lion_adamw_lion":
        assert [phase.until for phase in optimizer._phases.values()] == [30000, 80000, None]


def language(steps, warm, spoil=False):
    """Losses of a small recurrent model on a Markov chain; the rule changes after 150."""
    torch.manual_seed(1)
    size = 24
    table = torch.softmax(2.5 * torch.randn(size, size), -1)
    embed, net, head = nn.Embedding(size, 32), nn.GRU(32, 32, batch_first=True), nn.Linear(32, size)
    params = [*embed.parameters(), *net.parameters(), *head.parameters()]
    phases = {"a": {"rule": "lion", "until": 150, "lr_scale": 0.1}, "b": {"rule": "adamw", "betas": [0.9, 0.98]}}
    optimizer = Phased(params, phases, lr=1e-2, warm=warm)
    generator, losses = torch.Generator().manual_seed(2), []
    for k in range(steps):
        tokens = [torch.randint(size, (12,), generator=generator)]
        for _ in range(10):
            tokens.append(torch.multinomial(table[tokens[-1]], 1, generator=generator).squeeze(1))
        text = torch.stack(tokens, 1)
        logits = head(net(embed(text[:, :-1]))[0])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if spoil and k == 149:  # the trap: a second moment that starts at zero under the first's count
            for state in optimizer.state.values():
                state["exp_avg_sq"].zero_()
                state.pop("since", None)
        losses.append(loss.item())
    return np.array(losses)


def jump(losses):
    """How far the five losses behind the seam lie above the forty before it, in their standard deviations."""
    before = losses[110:150]
    trend = np.polyval(np.polyfit(np.arange(40), before, 1), np.arange(40, 45))
    noise = np.std(before - np.polyval(np.polyfit(np.arange(40), before, 1), np.arange(40)))
    return float(np.max(losses[150:155] - trend) / noise)


def test_no_loss_jump_at_the_seam_and_one_where_the_count_is_shared():
    smooth, spoilt = language(160, warm=100), language(160, warm=100, spoil=True)
    assert smooth[149] < smooth[0] - 0.5, "it learns"
    assert jump(smooth) < 3
    assert jump(spoilt) > 6
    assert math.isfinite(smooth[-1])


def test_an_average_of_a_phase_to_come_is_known_from_the_start():
    p = nn.Parameter(torch.ones(3))
    phases = {"a": {"rule": "adamw", "until": 2}, "b": {"rule": "schedule_free_adamw"}}
    optimizer = Phased([p], phases, lr=0.1)
    assert optimizer.averages
    assert not phased(problem()).averages
    for swapped in (False, True, True):  # the rule changes at the end of the second step
        p.grad = torch.ones(3)
        optimizer.step()
        optimizer.eval()
        assert optimizer.swapped is swapped
        optimizer.train()
