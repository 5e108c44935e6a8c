"""A skipped step never was: weights, states and counts are bit for bit those of a run without it, every way it runs."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_opt import kernels, optim
from lightning_opt.kernels import Bucket, compiled, rule
from lightning_opt.optim.groups import COMMON

SHAPES = [(7,), (16, 5), (), (40_000,)]
BAD = 2  # the step that is skipped, of STEPS
STEPS = 5


def ways():
    for name in optim.list_optimizers():
        for way in kernels.possible(optim.find_rule(name)):
            yield pytest.param(name, way, id=f"{name}-{way}")


def start(name, way, dtype=torch.float32, **hyper):
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape in SHAPES
        if len(shape) >= optim.find_rule(name).least_ndim
    ]
    make = getattr(optim, optim.OPTIMIZERS[name])
    optimizer = make(params, lr=1e-2, weight_decay=0.1, implementation=way, **hyper)
    optimizer.observe(**{signal: {} for signal in optimizer.needs})
    return params, optimizer


def feed(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if step == BAD:
            p.grad.view(-1)[0] = torch.nan


def train(name, way, flag_of, steps=range(STEPS), **more):
    """`flag_of(step)` is what a before-update hook hands to skip_step, or None for no hook's word."""
    params, optimizer = start(name, way, **more)
    now = [0]

    def hook(optimizer):
        if (flag := flag_of(now[0])) is not None:
            optimizer.skip_step(flag)

    optimizer.register_before_update_hook(hook)
    for now[0] in steps:
        feed(params, now[0])
        optimizer.step()
    return params, optimizer


def masked(step):
    return torch.tensor(step == BAD)


def same(a, b):
    """Weights, and whole state with its counts."""
    (params, optimizer), (others, other) = a, b
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    ours, theirs = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for key, state in ours.items():
        assert state.keys() == theirs[key].keys()
        assert state["step"] == theirs[key]["step"] == STEPS - 1
        assert all(torch.equal(state[n], theirs[key][n]) for n in state if n != "step")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "way"), ways())
def test_a_masked_step_leaves_no_trace(name, way, dtype):
    without = [step for step in range(STEPS) if step != BAD]
    masks = train(name, way, masked, dtype=dtype)
    cpu_cannot_mask = way == "compiled"  # its C++ loop never sees a mask: foreach does that
    never = train(name, "foreach" if cpu_cannot_mask else way, lambda _: None, without, dtype=dtype)
    same(masks, never)


@pytest.mark.parametrize(("name", "way"), ways())
def test_a_step_skipped_by_the_host_leaves_no_trace(name, way):
    if way == "compiled" and not kernels.can_compile("cpu")[0]:
        pytest.skip("no C++ compiler")
    without = [step for step in range(STEPS) if step != BAD]
    same(train(name, way, lambda step: step == BAD), train(name, way, lambda _: None, without))


@pytest.mark.parametrize("mode", ["decoupled", "independent", "l2"])
@pytest.mark.parametrize("way", ["eager", "foreach", "fused"])
def test_decay_is_masked_too(way, mode):
    without = [step for step in range(STEPS) if step != BAD]
    same(
        train("adamw", way, masked, weight_decay_mode=mode),
        train("adamw", way, lambda _: None, without, weight_decay_mode=mode),
    )


def test_the_first_step_may_be_the_skipped_one():
    params, optimizer = train("adamw", "eager", lambda step: torch.tensor(True), [0])
    fresh, _ = start("adamw", "eager")
    assert all(torch.equal(p, q) for p, q in zip(params, fresh, strict=True))
    for state in optimizer.state_dict()["state"].values():
        assert state["step"] == 0
        assert not any(state[name].any() for name in ("exp_avg", "exp_avg_sq"))


def test_flags_add_up_and_last_one_step():
    params, optimizer = start("lion", "eager")
    flags = [False, torch.tensor(True), False]
    off = [optimizer.register_before_update_hook(lambda o, flag=flag: o.skip_step(flag)) for flag in flags]
    before = copy.deepcopy(params)
    feed(params, 0)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    for remove in off:
        remove()
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert {state["step"] for state in optimizer.state_dict()["state"].values()} == {1}


def test_a_skipped_step_still_fires_the_hooks_of_torch():
    params, optimizer = start("lion", "eager")
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_before_update_hook(lambda o: o.skip_step(True))
    feed(params, 0)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert seen == ["after"]


def test_loading_forgets_the_open_step():
    params, optimizer = train("adamw", "eager", lambda _: torch.tensor(False))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.register_before_update_hook(lambda o: o.skip_step(torch.tensor(True)))
    feed(params, 0)
    optimizer.step()
    optimizer.load_state_dict(saved)
    assert {state["step"] for state in optimizer.state_dict()["state"].values()} == {STEPS}


def in_graphs(spec):
    """Elementwise, and not measured in blocks, which are eager's."""
    return spec.elementwise and (spec.measure is None or spec.measure.block is None)


def graphs():
    """One of each kind in the fast tier: compiling takes seconds."""
    for name in optim.list_optimizers():
        if in_graphs(optim.find_rule(name)):
            fast = name in ("adamw", "lion", "mars")
            yield pytest.param(name, marks=[] if fast else pytest.mark.slow)


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.skipif(not kernels.can_compile("cpu")[0], reason="no C++ compiler")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("l2", [None, 0.3])
@pytest.mark.parametrize("name", graphs())
def test_the_graph_of_a_gpu_masks_too(name, l2, backend, monkeypatch):
    """What torch.compile makes of the graph, run on the CPU: bit for bit the old values, or its own without a mask."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **how: compile_(*args, **how, backend=backend))
    monkeypatch.setattr(compiled, "_compiled", compiled._compiled.__wrapped__)
    spec = optim.find_rule(name)
    generator = torch.Generator().manual_seed(1)
    rows = [[torch.rand(size, generator=generator) for size in (3, 65)] for _ in range(2 + len(spec.state))]
    group = {**COMMON, **spec.defaults, "lr": 0.1}
    numbers = spec.scalars(kernels.Step(3), group)

    def run(skip, poisoned=False):
        params, grads, *states = copy.deepcopy(rows)
        if poisoned:
            grads[0][0] = torch.inf
        bucket = Bucket(params, grads, tuple(states), numbers, 3, None if l2 else 0.9, l2, group, skip)
        assert compiled._run_graph(spec, bucket) == []
        return [t for column in (bucket.params, *bucket.states) for t in column]

    old = [t for k, column in enumerate(rows) if k != 1 for t in column]
    plain = run(None)
    assert all(torch.equal(a, b) for a, b in zip(run(torch.tensor(True), poisoned=True), old, strict=True))
    for got, want, was in zip(run(torch.tensor(False)), plain, old, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
        assert not torch.equal(got, was) or spec.observed  # Sophia's Hessian is written by its signal


def test_part_keeps_the_mask():
    bucket = Bucket([torch.ones(1)] * 2, [torch.ones(1)] * 2, (), {}, 1, skip=torch.tensor(True))
    assert bucket.part([1]).skip is bucket.skip
    assert replace(bucket).part([]).params == []


def test_what_is_not_masked_is_not_copied():
    tensor = torch.ones(3)
    assert rule.scratch(tensor, None) is tensor
    assert rule.kept(tensor, tensor, None) is tensor
    assert rule.scratch(tensor, torch.tensor(False)) is not tensor


@pytest.mark.parametrize(("name", "way"), [("muon", "whole"), ("soap", "whole"), ("adamw", "foreach")])
def test_masters_move_under_a_mask_that_lets_the_step_through(name, way):
    how = {"dtype": torch.bfloat16, "weight_rounding": "master"}
    same(train(name, way, masked, **how), train(name, way, lambda _: None, [0, 1, 3, 4], **how))
