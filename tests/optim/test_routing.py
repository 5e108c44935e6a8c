"""From roles to one optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_opt import optim
from lightning_opt.plan import ConfigError


class Tiny(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8, bias=False)
        self.out = nn.Linear(8, 11, bias=False)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, x):
        return self.out(self.down(self.up(self.norm(self.table(x))).relu()))


CONFIG = {
    "name": "lion",
    "lr": 1e-3,
    "lr_scale": 2.0,
    "weight_decay": 0.1,
    "betas": [0.9, 0.95],
    "eps": 1e-6,
    "max_grad_norm": 1.0,
    "roles": {
        "default": {"rule": "adamw", "lr_scale": 0.5},
        "matrix": {"rule": "lion", "betas": [0.95, 0.98]},
        "norm": {"weight_decay": 0.0},
        "embedding": {"weight_decay": 0.0, "lr_scale": 3.0},
    },
}


def by_role(optimizer):
    return {group["role"]: group for group in optimizer.param_groups}


def test_top_level_defaults_role_overrides_and_rates_multiply():
    model = Tiny()
    groups = by_role(optim.build(model, CONFIG))
    assert {role: group["rule"] for role, group in groups.items()} == {
        "matrix": "lion",
        "embedding": "adamw",
        "head": "adamw",
        "norm": "adamw",
        "bias": "adamw",
    }
    rates = {role: group["lr"] for role, group in groups.items()}
    assert rates == pytest.approx({"matrix": 2e-3, "embedding": 6e-3, "head": 1e-3, "norm": 1e-3, "bias": 1e-3})
    assert {role: group["weight_decay"] for role, group in groups.items()} == {
        "matrix": 0.1,
        "embedding": 0.0,
        "head": 0.1,
        "norm": 0.0,
        "bias": 0.1,
    }
    assert groups["matrix"]["betas"] == (0.95, 0.98)
    assert groups["head"]["betas"] == (0.9, 0.95)
    assert "eps" not in groups["matrix"]
    assert groups["head"]["eps"] == 1e-6
    assert all(group["initial_lr"] == group["lr"] for group in groups.values())


def test_every_trainable_parameter_once_and_the_table_adds_up():
    model = Tiny(tied=True)
    model.down.weight.requires_grad_(False)
    optimizer = optim.build(model, CONFIG)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in held}) == len(held)
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert "head" not in by_role(optimizer)
    model(torch.arange(5)).sum().backward()
    planned = optimizer.routing_table()
    optimizer.step()
    assert optimizer.routing_table() == planned
    assert sum(row["params"] for row in planned) == sum(p.numel() for p in held)
    assert sum(row["state_bytes"] for row in planned) == optimizer.state_bytes()
    assert set(planned[0]) == {
        "role", "rule", "implementation", "tensors", "params", "lr", "weight_decay", "max_grad_norm", "state_bytes",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"roles": {"matrx": {}}}, "matrix"),
        ({"roles": {"default": {"rule": "lionn"}}}, "lion"),
        ({"roles": {"norm": {"weight_deca": 0}}}, "weight_decay"),
        ({"roles": {"matrix": {"rule": "lion", "eps": 1e-3}}}, r"roles\.matrix\.eps"),
        ({"lrr": 3}, "lr"),
        ({"lr": -1.0}, r"optimizer\.lr "),
        ({"lr_scale": 0.0}, "lr_scale"),
        ({"roles": {"norm": {"lr": "abc"}}}, r"roles\.norm\.lr"),
        ({"implementation": "fused"}, "fused"),
    ],
)
def test_refused_in_one_line(change, words):
    config = copy.deepcopy(CONFIG)
    for key, value in change.items():
        config[key] = {**config["roles"], **value} if key == "roles" else value
    with pytest.raises(ConfigError, match=words) as error:
        optim.build(Tiny(), config)
    assert "\n" not in str(error.value)


def test_a_rule_alone_and_nothing_to_train():
    assert {g["rule"] for g in optim.build(Tiny(), {"name": "lion", "lr": 1e-3}).param_groups} == {"lion"}
    frozen = Tiny().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        optim.build(frozen, CONFIG)


def test_a_hybrid_is_each_rule_on_its_own_part():
    """One optimizer over two rules moves each part as that rule's own optimizer does."""
    torch.manual_seed(0)
    together = Tiny()
    apart = copy.deepcopy(together)
    hybrid = optim.build(together, {**CONFIG, "max_grad_norm": None})
    groups = by_role(optim.build(apart, {**CONFIG, "max_grad_norm": None}))
    lion = optim.Lion(groups["matrix"]["params"], lr=2e-3, betas=(0.95, 0.98), weight_decay=0.1)
    adam = optim.AdamW(
        [
            {"params": groups[role]["params"], "lr": groups[role]["lr"], "weight_decay": groups[role]["weight_decay"]}
            for role in groups
            if role != "matrix"
        ],
        betas=(0.9, 0.95),
        eps=1e-6,
    )
    for _ in range(4):
        for model in (together, apart):
            model.zero_grad()
            model(torch.arange(5)).square().sum().backward()
        hybrid.step()
        lion.step()
        adam.step()
    assert all(torch.equal(a, b) for a, b in zip(together.parameters(), apart.parameters(), strict=True))
    again = copy.deepcopy(hybrid)
    assert again.routing_table() == hybrid.routing_table()


def test_decay_modes():
    """With a zero gradient AdamW only decays; halving the rate halves decoupled and independent decay alike."""
    for mode, expected in {"decoupled": 1 - 0.05 * 0.1, "independent": 1 - 0.5 * 0.1}.items():
        p = nn.Parameter(torch.ones(4))
        optimizer = optim.AdamW([p], lr=0.1, weight_decay=0.1, weight_decay_mode=mode)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
        p.grad = torch.zeros(4)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((4,), expected))
        by_hand = nn.Parameter(torch.ones(4))
        optimizer = optim.AdamW([by_hand], lr=0.1, weight_decay=0.1, weight_decay_mode=mode)
        optimizer.param_groups[0]["lr"] /= 2
        by_hand.grad = torch.zeros(4)
        optimizer.step()
        torch.testing.assert_close(by_hand.detach(), p.detach())
    for implementation in ("eager", "foreach", "fused"):
        torch.manual_seed(0)
        ours = nn.Parameter(torch.randn(50))
        theirs = nn.Parameter(ours.detach().clone())
        optimizer = optim.AdamW([ours], lr=0.1, weight_decay=0.1, weight_decay_mode="l2", implementation=implementation)
        adam = torch.optim.Adam([theirs], lr=0.1, weight_decay=0.1)
        for _ in range(10):
            ours.grad = torch.randn(50)
            theirs.grad = ours.grad.clone()
            optimizer.step()
            adam.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_signals_nobody_needs_are_refused():
    optimizer = optim.Lion([nn.Parameter(torch.ones(1))])
    assert optimizer.needs == frozenset()
    with pytest.raises(ConfigError, match="no signals"):
        optimizer.observe(tokens_per_expert=torch.ones(2))


@pytest.mark.parametrize("implementation", ["eager", "foreach", "compiled", "fused"])
def test_adamw_is_torchs(implementation):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(n, 130)) for n in (3, 140)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = optim.AdamW(ours, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), implementation=implementation)
    torchs = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), fused=implementation == "fused")
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        torchs.step()
    exact = {"rtol": 0, "atol": 0} if implementation == "fused" else {"rtol": 1e-5, "atol": 1e-6}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **exact)


def test_caution_said_at_the_top_is_for_the_rule_of_the_name_where_one_rule_is_cautious_by_itself():
    def caution(**config):
        return {group["rule"]: group["cautious"] for group in optim.build(Tiny(), config).param_groups}

    both = {"adamw": False, "cautious_adamw": True}
    assert caution(name="adamw", cautious=False, roles={"norm": {"rule": "cautious_adamw"}}) == both
    assert caution(name="cautious_adamw", cautious=True, roles={"norm": {"rule": "adamw"}}) == both
    assert caution(name="cautious_adamw", cautious=False) == {"cautious_adamw": False}
    assert caution(name="lion", cautious=True, roles={"norm": {"rule": "adamw"}}) == {"lion": True, "adamw": True}
    phases = {"a": {"rule": "lion", "until": 5}, "b": {"rule": "cautious_adamw"}}
    phased = optim.build(Tiny(), {"name": "phased", "cautious": False, "phases": phases})
    for _ in range(5):
        assert {group["cautious"] for group in phased.param_groups} == {False}
        phased.step()
    assert {group["cautious"] for group in phased.param_groups} == {True}
