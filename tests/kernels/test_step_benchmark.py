"""The benchmark of optimizer steps: what would make its numbers wrong."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import optimizer_step, step_contenders, step_tables
from lightning_opt import optim
from lightning_opt.kernels import native

every = optimizer_step.ours
SMALL = optimizer_step.Setting(4, 1, 8, 4, rounds=1, slow=False)


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
    contender = optimizer_step.Contender("name", "sgd", make)
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
    absent = [step_contenders.Peer("absent", "no_such_package", "Lion", "lion")]
    monkeypatch.setattr(optimizer_step, "ours", lambda dtype: [])
    monkeypatch.setattr(step_contenders, "PEERS", absent + [p for p in step_contenders.PEERS if p.cls == "AdamW"][:1])
    families, left_out = optimizer_step.measure(SMALL, torch.float32, "cpu", False, 1)
    assert [family.rule for family in families] == ["adamw"]  # Lion's has nobody but the yardstick
    assert step_contenders.YARDSTICK in [c.name for c in families[0].contenders]
    assert "absent Lion (No module named 'no_such_package')" in left_out
    assert "torch AdamW default (slow by its many calls: see the smaller set)" in left_out
    assert "torch AdamW compiled, pytorch-optimizer Lion compiled (--quick takes no time to compile it)" in left_out


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
        optimizer_step.measure(SMALL, torch.float32, "cpu", False, 1)
        assert built == [1]


def stepped(name, rule, *walls, **more):
    own = [(2 * wall, wall) for wall in walls]
    return optimizer_step.Contender(name, rule, None, own=own, floor=[(1.0, 1.0)] * len(own), traffic=20, **more)


def test_ours_is_compared_with_the_fastest_peer_of_its_rule_and_storage_round_by_round():
    ours = stepped("ours lion compiled", "lion", 1.0, 4.0, 2.0)
    peers = [stepped("fast Lion", "lion", 2.0, 4.0, 1.0), stepped("slow Lion", "lion", 9.0, 9.0, 9.0)]
    coded = stepped("Lion8bit", "lion", 0.1, 0.1, 0.1, storage="int8")
    fused = stepped(step_contenders.YARDSTICK, "adamw", 0.1, 0.1, 0.1)
    family = optimizer_step.Family("lion", [ours, *peers, coded, fused], 1, flats=[(1.0, 1.0)] * 3)
    rivals = step_tables.fastest_peers([family])
    assert {kind: rival.name for kind, rival in rivals.items()} == {"lion": "fast Lion", "lion int8": "Lion8bit"}
    assert step_tables.against(ours, rivals["lion"], 1) == "1.00 (0.50 to 2.00)"
    assert step_tables.against(peers[1], rivals["lion"], 1) is None
    assert step_tables.against(ours, rivals.get("muon"), 1) is None
    row = step_tables.summary(family, "lion", 4, "cpu")
    assert (row["ours"], row["fastest peer"], row["wall / peer"]) == ("compiled", "fast Lion", "1.00 (0.50 to 2.00)")
    assert row["wall / floor"] == pytest.approx(2 * 12 / 20)
    assert step_tables.rows_of(family, 4, "cpu")[0]["optimizer"] == "Lion8bit"


def test_a_step_of_a_whole_period_is_its_mean_and_held_against_the_products_rate(monkeypatch):
    """Ten steps of SOAP, one of them dear, count as ten; operations over time, relative to the matrix product's."""
    calls = []
    monkeypatch.setattr(optimizer_step, "timed", lambda work, device: (work(), (10.0, 20.0))[1])
    monkeypatch.setattr(optimizer_step, "product", lambda device: (lambda: None, 4e6))
    monkeypatch.setattr(optimizer_step, "is_matrix_rule", lambda rule: True)
    monkeypatch.setattr(optimizer_step, "flops", lambda rule, shapes: 1e3 * sum(map(math.prod, shapes)))
    one = next(c for c in every(torch.float32) if c.rule == "soap")
    make = one.make

    def counted(params):
        optimizer = make(params)
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
        return optimizer

    one.make = counted
    params = optimizer_step.tensors([(8, 4), (4, 4), (6, 4), (4,)], torch.float32, "cpu")
    family = optimizer_step.compete("soap", [one], params, "cpu", 5)
    assert one.period == 10
    assert len(calls) == 3 + 10
    assert one.own == [(1.0, 2.0)]
    assert family.size == 24  # neither embeddings nor vectors
    (row,) = step_tables.matrix_rows(family, "cpu")
    assert row["wall ms of a step"] == 2000
    assert row["of the product's rate, wall"] == pytest.approx(20 / 2 * 24e3 / 4e6)


@pytest.mark.parametrize("name", optim.list_optimizers())
def test_the_floor_is_what_the_rule_moves(name):
    """In float32 as the rule says; the storage it is scaled by is what the optimizer holds."""
    one = next(c for c in every(torch.float32) if c.rule == name and c.storage == "float32")
    params = optimizer_step.tensors([(8, 4), (64, 32)], torch.float32, "cpu")
    assert optimizer_step.prepare(one, params, [p.grad.clone() for p in params], "cpu")
    rule = optim.find_rule(name)
    assert one.traffic == rule.traffic
    several = rule.measure is not None or "cautious" in rule.defaults
    if rule.elementwise and not several and name != "sophia":  # one pass over everything
        assert one.traffic == 12 + 2 * one.state


def test_narrower_storage_has_a_lower_floor():
    assert step_contenders.floor_bytes("lion", 4, 1 + 4 / 256, "int8") == pytest.approx(14.03, abs=0.01)
    assert step_contenders.floor_bytes("lion", 2, 2, "bfloat16") == 10
    assert step_contenders.floor_bytes("cautious_adamw", 2, 4, "bfloat16") == 20


def test_every_rule_is_there_and_every_peer_has_a_rule_of_ours():
    assert {c.rule for c in every(torch.float32)} == set(optim.list_optimizers())
    assert {c.rule for c in step_contenders.peers("cuda")} <= set(optim.list_optimizers())
    assert {c.rule for c in every(torch.float32) if c.storage == "int8"} >= {"lion", "signum", "momentum", "adamw"}
    for dtype in (torch.float32, torch.bfloat16):
        names = [c.name for c in (*every(dtype), *step_contenders.peers("cuda"))]
        assert len(set(names)) == len(names)


@pytest.mark.slow
def test_quick_run_writes_table_plot_and_json(tmp_path, repository):
    command = [sys.executable, "-m", "benchmarks.optimizer_step", "--quick", "--rounds", "3", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=repository, timeout=600, env={**os.environ, "GOMP_SPINCOUNT": "2000"})
    (page,) = tmp_path.glob("*-optimizer_step-quick.md")
    assert page.with_suffix(".png").stat().st_size > 10_000
    record = json.loads(page.with_suffix(".json").read_text())
    rules, contenders, matrices = record["tables"]
    bound = {name for name in optim.list_optimizers() if step_contenders.is_matrix_rule(name)}
    assert {row["rule"] for row in rules["rows"] if "int8" not in row["rule"]} == {*optim.list_optimizers()} - bound
    names = {row["optimizer"] for row in contenders["rows"]}
    assert {"ours lion compiled", "ours adamw fused", "torch AdamW foreach", step_contenders.YARDSTICK} <= names
    for row in contenders["rows"]:
        assert row["wall / floor"] > 0
        assert row["floor bytes"] >= 12
    assert {row["optimizer"].split()[1] for row in matrices["rows"] if row["optimizer"].startswith("ours")} == bound
    assert all(0 < row["of the product's rate, wall"] < 5 for row in matrices["rows"])
