"""What torch.compile makes of experts that go each their own way, run on the CPU beside tensor by tensor."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_opt import kernels, optim
from lightning_opt.kernels import Bucket, compiled, eager
from lightning_opt.kernels.experts import spread
from lightning_opt.plan import COMMON

OWN = torch.tensor([[1.0, 0.0, 0.5, 0.0], [0.9, 1.0, 0.95, 0.9], [0.3, 0.0, 0.3, 0.3], [0.0, 1.0, 0.0, 0.0]])
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.skipif(not kernels.can_compile("cpu")[0], reason="no C++ compiler")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("l2", [None, 0.3])
@pytest.mark.parametrize("name", ["adamw", "lion", "mars", "schedule_free_adamw"])
def test_the_graph_of_a_gpu_is_what_eager_does(name, l2, backend, monkeypatch):
    """Awake, resting, at half the rate, with the step alone at rest; the resting one's gradient is infinite."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **how: compile_(*args, **how, backend=backend))
    monkeypatch.setattr(compiled, "_compiled", compiled._compiled.__wrapped__)
    spec = optim.find_rule(name)
    generator = torch.Generator().manual_seed(1)
    rows = [[torch.rand(4, 6, 5, generator=generator)] for _ in range(2 + len(spec.state))]
    if spec.measure is None:
        rows[1][0][1] = torch.inf
    group = {**COMMON, **spec.defaults, "lr": 0.1}
    numbers = spec.scalars(kernels.Step(3), group)
    found = []
    for how in (compiled._run_graph, eager.run):
        for skip in (None, torch.tensor(False), torch.tensor(True)):
            params, grads, *states = copy.deepcopy(rows)
            shrink = None if l2 or spec.own_decay else 0.9
            own = OWN.clone()
            own[1] = own[1] if shrink else 1.0
            given = (params, grads, tuple(states), numbers, 3, shrink, None if spec.own_decay else l2, group, skip)
            bucket = Bucket(*given, experts=[own])
            how(spec, bucket)
            found.append([bucket.params[0], *(column[0] for column in bucket.states)])
    old = [rows[0][0], *(column[0] for column in rows[2:])]
    for graphs, plain in zip(found[:2], found[3:5], strict=True):
        for got, want, was in zip(graphs, plain, old, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
            assert torch.equal(got[1], was[1])
            assert not torch.equal(got[0], was[0])
    for got, was in zip(found[2] + found[5], old + old, strict=True):
        assert torch.equal(got, was)


def test_a_number_per_expert_meets_rows_scales_and_single_numbers():
    column = torch.tensor([1.0, 2.0])
    assert spread(column, torch.zeros(2, 3, 4)).shape == (2, 1, 1)
    assert spread(column, torch.zeros(6, 4)).flatten().tolist() == [1, 1, 1, 2, 2, 2]
    assert spread(column, torch.zeros(4)).tolist() == [1, 1, 2, 2]
    assert spread(torch.tensor(3.0), torch.zeros(4)).shape == ()
    assert spread(column[:0], torch.zeros(0, 3)).shape == (0, 1)


def test_a_part_of_a_bucket_keeps_its_experts():
    stacks = [torch.ones(4, 2)] * 2
    bucket = Bucket(stacks, stacks, (), {}, 1, experts=[OWN, OWN + 1])
    assert bucket.part([1]).experts[0] is bucket.experts[1]
    assert bucket.variant.experts
