"""Ways to run a rule: the list that acts as a tensor, the choice, and what happens without a compiler."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_opt import kernels, optim
from lightning_opt.kernels import Many, compiled, device, foreach


def lists(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64) + 0.1 for n in (1, 4, 6)]


EXPRESSIONS = [
    lambda a, b: a + b,
    lambda a, b: a * 2.5 - b,
    lambda a, b: 3.0 - a * b,
    lambda a, b: 1.0 / (a + 7.0) + b / 2.0,
    lambda a, b: -a / (b * b + 1.0),
    lambda a, b: torch.sign(a) * torch.sqrt(torch.abs(b)),
    lambda a, b: torch.lerp(a, b, 0.3),
    lambda a, b: torch.maximum(a, b) ** 2,
    lambda a, b: torch.where(a * b > 0.0, a, b),
    lambda a, b: a * (torch.mean(torch.abs(b)) + 1.0),
    lambda a, b: torch.sqrt(b * b).mul_(a).add_(0.5).sub_(b).lerp_(a, 0.25).clamp_(-1.0, 1.0),
    lambda a, b: (a * 1.0).copysign_(b).div_(torch.exp(a)),
    lambda a, b: torch.clamp(a, max=0.5) + torch.clamp(b, min=-0.5, max=0.5),
]


@pytest.mark.parametrize("number", range(len(EXPRESSIONS)))
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_many_is_each_tensor_alone(number, seed):
    expression = EXPRESSIONS[number]
    a, b = lists(seed), lists(seed + 1)
    together = expression(Many(a), Many(b))
    assert isinstance(together, Many)
    for got, x, y in zip(together.tensors, a, b, strict=True):
        torch.testing.assert_close(got, expression(x, y), rtol=1e-15, atol=1e-15)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 5, 40, foreach.BLOCK, foreach.BLOCK + 1, 3 * foreach.BLOCK - 1]), min_size=1)
)
def test_foreach_blocks_hold_every_element_once(sizes):
    counted = [torch.zeros(size) for size in sizes]
    rows = (block for tensor in counted for block in foreach._blocks((tensor, tensor)))
    for part in foreach._lists(rows, foreach.BLOCK):
        assert sum(p.numel() for p, _ in part) <= foreach.BLOCK
        for p, _ in part:
            p.add_(1)
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in counted)


def implementation(name, elements, asked="auto", dtype=torch.float32, where="cpu"):
    rule = optim.find_rule(name)
    dtypes = [dtype] * (2 + len(rule.state))
    return kernels.choose(rule, asked, torch.device(where), dtypes, elements)


def test_auto_is_the_fastest_right_thing(monkeypatch):
    monkeypatch.setattr("lightning_opt.kernels.choice.can_compile", lambda device: (True, "g++"))
    assert implementation("adamw", 10**6).implementation == "fused"
    assert implementation("adamw", 10**9, where="cuda").implementation == "fused"
    assert implementation("lion", 10**6).implementation == "foreach"
    assert implementation("lion", 27 * 10**6).implementation == "compiled"
    assert implementation("lion", 10**6, where="cuda").implementation == "compiled"
    rule = optim.find_rule("adamw")
    mixed = [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert kernels.choose(rule, "auto", torch.device("cpu"), mixed, 27 * 10**6).implementation == "compiled"
    refused = kernels.choose(rule, "fused", torch.device("cpu"), mixed, 27 * 10**6)
    assert refused.implementation == "foreach"
    assert "bfloat16" in str(refused)


def test_without_a_compiler_foreach_runs_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    device.cpp_compiler.cache_clear()
    try:
        for asked in ("auto", "compiled"):
            choice = implementation("lion", 27 * 10**6, asked)
            assert choice.implementation == "foreach"
            assert "no C++ compiler" in choice.why
        p = nn.Parameter(torch.ones(compiled.SMALL + 1))
        optimizer = optim.Lion([p], lr=0.5, implementation="compiled")
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert torch.equal(p, torch.full_like(p, 0.5))
        assert optimizer.implementations == {"lion": "foreach (no C++ compiler found)"}
    finally:
        device.cpp_compiler.cache_clear()


def test_a_failing_compiler_falls_back_once_and_changes_nothing_twice(monkeypatch, caplog):
    def no_backend(graph, inputs):
        raise RuntimeError("no space left")

    graph = compiled._graph(optim.find_rule("lion"), ("lr", "new1", "new2"), False)
    monkeypatch.setattr(compiled, "_compiled", lambda *args: torch.compile(graph, backend=no_backend))
    monkeypatch.setattr(compiled, "_broken", set())
    params = [nn.Parameter(torch.ones(compiled.SMALL + k)) for k in range(3)]
    optimizer = optim.Lion(params, lr=0.25, implementation="compiled")
    with caplog.at_level(logging.WARNING, "lightning_opt.kernels"):
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
    assert all(torch.equal(p, torch.full_like(p, 0.5)) for p in params)
    assert len(caplog.records) == 1
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert "failed" in optimizer.implementations["lion"]


@pytest.mark.skipif(not kernels.can_compile("cpu")[0], reason="no C++ compiler")
def test_changing_rates_and_sizes_never_recompiles():
    params = [nn.Parameter(torch.ones(compiled.SMALL + 17 * k)) for k in range(1, 4)]
    optimizer = optim.Lion(params, lr=1e-3, weight_decay=0.1, implementation="compiled")

    def step(k):
        optimizer.param_groups[0]["lr"] = 1e-3 / (1 + k)
        optimizer.param_groups[0]["betas"] = (0.9, 0.99 - 0.001 * k)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()

    step(0)
    with torch.compiler.set_stance("fail_on_recompile"):
        for k in range(1, 4):
            step(k)


@pytest.mark.skipif(not kernels.can_compile("cpu")[0], reason="no C++ compiler")
def test_many_kinds_of_buckets_are_all_compiled(monkeypatch):
    """Dynamo compiles 8 variants of one function and runs the ninth eager in silence."""
    compiled._compiled.cache_clear()
    torch._dynamo.reset()
    graphs = []
    count = lambda graph, inputs: graphs.append(graph) or graph.forward  # noqa: E731
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: real(function, backend=count, **how))
    kinds = 0
    for cls in (optim.Lion, optim.AdamW):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for mode in ("decoupled", "l2"):
                p = nn.Parameter(torch.ones(compiled.SMALL, dtype=dtype))
                optimizer = cls([p], lr=0.1, weight_decay=0.1, weight_decay_mode=mode, implementation="compiled")
                p.grad = torch.ones_like(p)
                optimizer.step()
                kinds += 1
                assert len(graphs) == kinds
    compiled._compiled.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("name", optim.list_optimizers())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_agrees_on_a_gpu(name, dtype):
    results = {}
    for way in kernels.possible(optim.find_rule(name)):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(n, 64, device="cuda", dtype=dtype)) for n in (1, 7, 300)]
        optimizer = getattr(optim, optim.OPTIMIZERS[name])(params, lr=1e-3, implementation=way, max_grad_norm=1.0)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results[way] = params
    for way, params in results.items():
        for a, b in zip(params, results["eager"], strict=True):
            torch.testing.assert_close(a, b, msg=way)
