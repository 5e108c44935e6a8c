"""The benchmark of optimizer steps: what would make its numbers wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import optimizer_step
from lightning_opt import optim
from lightning_opt.kernels import native

every = optimizer_step.ours


class Clears(torch.optim.SGD):
    """Steps, then drops its gradients: every later step would be free."""

    def step(self, closure=None):
        super().step(closure)
        self.zero_grad()


class Overwrites(torch.optim.SGD):
    """Uses its gradients as scratch space."""

    def step(self, closure=None):
        super().step(closure)
        self.param_groups[0]["params"][0].grad.mul_(0.5)


def prepared(make):
    params = optimizer_step.tensors([(4, 3), (5,)], torch.float32, "cpu")
    kept = [p.grad.clone() for p in params]
    contender = optimizer_step.Contender("name", "rule", make)
    return optimizer_step.prepare(contender, params, kept, "cpu"), contender, params, kept


@pytest.mark.parametrize("cls", [Clears, Overwrites])
def test_gradients_are_there_for_the_next_one(cls, capsys):
    runs, contender, params, kept = prepared(lambda p: cls(p, lr=0.1))
    assert runs == (cls is Overwrites)
    assert "overwrites" in contender.name if runs else "clears" in capsys.readouterr().out
    assert all(torch.equal(p.grad, g) for p, g in zip(params, kept, strict=True))


def test_a_contender_that_fails_here_is_left_out(capsys):
    assert not prepared(lambda p: torch.optim.SGD(p, lr=-1.0))[0]
    assert "Invalid learning rate" in capsys.readouterr().out


def test_a_peer_that_is_not_installed_is_named_with_the_cause(monkeypatch):
    absent = list(optimizer_step._peer("no_such_package", "Lion", "absent Lion", {}))
    monkeypatch.setattr(optimizer_step, "ours", lambda dtype: [])
    monkeypatch.setattr(optimizer_step, "peers", lambda device: absent)
    setting = optimizer_step.Setting(4, 1, 8, 4, rounds=1, slow=False)
    contenders, _, left_out = optimizer_step.measure(setting, torch.float32, "cpu", False, 1)
    assert optimizer_step.YARDSTICK in [c.name for c in contenders]
    assert "absent Lion (No module named 'no_such_package')" in left_out
    assert "torch AdamW default (slow by its many calls: see the smaller set)" in left_out
    assert "torch AdamW compiled (--quick takes no time to compile it)" in left_out


def test_every_table_compiles_anew(monkeypatch):
    """Ours is compiled within the first step that is timed, whatever was compiled before."""
    built = []
    build = native._build
    monkeypatch.setattr(native, "_build", lambda text: built.append(len(inside)) or build(text))
    inside = []
    timed = optimizer_step.timed
    monkeypatch.setattr(optimizer_step, "timed", lambda work, device: inside.append(1) or timed(work, device))
    monkeypatch.setattr(
        optimizer_step, "ours", lambda dtype: [c for c in every(dtype) if c.name == "ours lion compiled"]
    )
    monkeypatch.setattr(optimizer_step, "peers", lambda device: [])
    for _ in range(2):
        built.clear(), inside.clear()
        optimizer_step.measure(optimizer_step.Setting(4, 1, 8, 4, 1, slow=False), torch.float32, "cpu", False, 1)
        assert built == [1]


def test_ours_is_compared_with_the_fastest_peer_of_its_rule_round_by_round():
    def contender(name, rule, *walls):
        return optimizer_step.Contender(name, rule, None, own=[(2 * wall, wall) for wall in walls])

    ours = contender("ours lion compiled", "lion", 1.0, 4.0, 2.0)
    peers = [contender("fast Lion", "lion", 2.0, 4.0, 1.0), contender("slow Lion", "lion", 9.0, 9.0, 9.0)]
    rivals = optimizer_step.fastest_peers([ours, *peers, contender("fastest AdamW", "adamw", 0.1, 0.1, 0.1)])
    assert rivals["lion"].name == "fast Lion"
    assert optimizer_step.against(ours, rivals["lion"], 1) == "1.00 (0.50 to 2.00)"
    assert optimizer_step.against(peers[1], rivals["lion"], 1) is None
    assert optimizer_step.against(ours, rivals.get("muon"), 1) is None


@pytest.mark.parametrize("name", optim.list_optimizers())
def test_the_floor_is_what_the_rule_moves(name):
    _, contender, *_ = prepared(lambda p: getattr(optim, optim.OPTIMIZERS[name])(p, lr=1e-3))
    assert contender.traffic == optim.find_rule(name).traffic


@pytest.mark.slow
def test_quick_run_writes_table_plot_and_json(tmp_path, repository):
    command = [sys.executable, "-m", "benchmarks.optimizer_step", "--quick", "--rounds", "3", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=repository, timeout=300, env={**os.environ, "GOMP_SPINCOUNT": "2000"})
    (page,) = tmp_path.glob("*-optimizer_step-quick.md")
    assert page.with_suffix(".png").stat().st_size > 10_000
    record = json.loads(page.with_suffix(".json").read_text())
    (table,) = record["tables"]
    names = {row["optimizer"] for row in table["rows"]}
    assert {"ours lion compiled", "ours adamw fused", "torch AdamW foreach", optimizer_step.YARDSTICK} <= names
    assert all(row["wall / floor"] > 0 and row["floor bytes"] in (20, 28) for row in table["rows"])
