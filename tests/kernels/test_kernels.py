"""Ways to run a rule: the list that acts as a tensor, the choice, and what happens without a compiler."""

from __future__ import annotations

import logging
import re
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_opt import kernels, optim
from lightning_opt.kernels import Bucket, Many, Rule, Variant, compiled, device, foreach, native

needs_compiler = pytest.mark.skipif(not kernels.can_compile("cpu")[0], reason="no C++ compiler")


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
    lambda a, b: torch.minimum(a, b).abs_().add_(1.0).rsqrt_() + torch.where(a < b, 1.0, torch.tanh(a)),
    lambda a, b: torch.addcmul(a, a, b) + torch.addcdiv(a, b, b * b + 1.0) + torch.square(b).reciprocal_(),
    lambda a, b: (a * 1.0).zero_().copy_(b).where(a > 0.0, a) + torch.log(b * b + 1.0),
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


def made(name, expression, states=1):
    """A rule that adds an expression of weight and gradient to the weight and keeps it as its state."""

    def update(p, g, m, *, number):
        m.copy_(expression(p, g))
        p.add_(m).mul_(number)

    return Rule(name, update, lambda step, group: {}, state=("m",), defaults={}, traffic=20)


def bucket(rule, weights, grads, **more):
    states = tuple([torch.zeros_like(w) for w in weights] for _ in rule.state)
    return Bucket([w.clone() for w in weights], grads, states, {"number": 0.75}, 1, **more)


@needs_compiler
def test_every_spelling_is_what_torch_computes():
    """All expressions at once (compiling takes time), element by element against torch in float64."""
    elementwise = [e for i, e in enumerate(EXPRESSIONS) if i != 9]  # the one with a mean

    def every(p, g):
        total = p * 0.0
        for k, expression in enumerate(elementwise):
            total = total + expression(p, g) * float(k + 1)
        return total

    rule = made("every", every)
    weights, grads = lists(1), lists(2)
    for shrink, l2 in ((None, None), (0.9, 0.3)):
        ours = bucket(rule, weights, grads, shrink=shrink, l2=l2)
        plain = bucket(rule, weights, grads, shrink=shrink, l2=l2)
        assert native.run(rule, ours) == []
        kernels.run("eager", rule, plain)
        for a, b in zip((*ours.params, *ours.states[0]), (*plain.params, *plain.states[0]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
            assert not torch.equal(a, torch.zeros_like(a))


@needs_compiler
def test_cpp_handles_what_is_not_a_number_as_torch_does():
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0])
    a, b = (x.reshape(-1).contiguous() for x in torch.meshgrid(odd, odd, indexing="ij"))
    parts = [torch.maximum, torch.minimum, lambda a, b: torch.clamp(a, -0.5, 0.5), lambda a, b: torch.clamp(a, max=0.1)]
    for k, part in enumerate([*parts, lambda a, b: torch.where(a > b, a, b)]):
        rule = made(f"odd{k}", part)
        ours, plain = bucket(rule, [a], [b]), bucket(rule, [a], [b])
        native.run(rule, ours)
        kernels.run("eager", rule, plain)
        torch.testing.assert_close(ours.states[0][0], plain.states[0][0], rtol=0, atol=0, equal_nan=True)


@needs_compiler
def test_cpp_rounds_to_bfloat16_as_torch_does():
    """Every pattern of the upper bits with the lower ones at, around and between the ties."""
    upper = torch.arange(1 << 16, dtype=torch.int32) << 16
    values = torch.cat([upper + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(torch.float32)
    rule = Rule("rounding", lambda p, g, *, number: p - g, lambda s, g: {}, state=(), defaults={}, traffic=6)
    narrow = Bucket([torch.zeros(len(values), dtype=torch.bfloat16)], [values], (), {"number": 0.0}, 1)
    native.run(rule, narrow)
    got, want = narrow.params[0], values.bfloat16()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


@needs_compiler
@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 3, 40, 65535, 65536, 65537, 140_000]), min_size=1, max_size=8),
    threads=st.integers(1, 2),
)
def test_one_call_updates_every_element_of_a_list_once(sizes, threads):
    rule = Rule("count", lambda p, g, m, *, number: -m.add_(1.0), lambda s, g: {}, ("m",), {}, 20)
    base = torch.arange(sum(sizes), dtype=torch.float64)
    weights = list(base.clone().split(sizes))  # neighbours in memory: a step too far would show
    grads, states = [torch.ones_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        native.run(rule, Bucket(weights, grads, (states,), {"number": 0.0}, 1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat(weights), base + 1)
    assert all(torch.equal(m, torch.ones_like(m)) for m in states)
    assert all(torch.equal(g, torch.ones_like(g)) for g in grads)


@needs_compiler
def test_an_element_comes_out_the_same_wherever_it_lies_and_however_many_threads():
    rule = optim.find_rule("adamw")
    row = torch.randn(300_001, generator=torch.Generator().manual_seed(0))
    one = {"rate": 1e-2, "root": 0.9, "new1": 0.1, "new2": 0.05, "eps": 1e-8}
    results = []
    before = torch.get_num_threads()
    for sizes, threads in (([300_001], 1), ([7, 100_000, 1, 199_993], 2)):
        states = tuple(list((row.abs() * scale).split(sizes)) for scale in (0.1, 0.2))
        weights, grads = list(row.clone().split(sizes)), list((row * 3).split(sizes))
        try:
            torch.set_num_threads(threads)
            native.run(rule, Bucket(weights, grads, states, one, 1, 0.99))
        finally:
            torch.set_num_threads(before)
        results.append(torch.cat([*weights, *states[0], *states[1]]))
    assert torch.equal(*results)


@needs_compiler
def test_autograd_sees_that_the_update_wrote_the_weights():
    p = nn.Parameter(torch.ones(4))
    optimizer = optim.Lion([p], implementation="compiled")
    loss = (p * p).sum()
    p.grad = torch.ones(4)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of loaded libraries")
def test_the_library_runs_on_torchs_threads():
    """A second OpenMP runtime has threads of its own, which would spin against torch's."""
    torch.zeros(1 << 17).add_(1)
    rule = made("threads", lambda p, g: p * g)
    loaded = lambda: set(re.findall(r"/\S*(?:gomp|iomp|libomp)\S*", Path("/proc/self/maps").read_text()))  # noqa: E731
    before = loaded()
    assert before
    native.run(rule, bucket(rule, lists(1), lists(2)))
    assert loaded() == before


class Elsewhere(torch.Tensor):
    """A subclass, which may keep its numbers anywhere."""


@needs_compiler
def test_what_is_not_plain_memory_is_left_to_foreach():
    p = nn.Parameter(torch.ones(4, 6).t())
    other, plain = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    rule = optim.find_rule("lion")
    grads = [torch.ones(6, 4), torch.ones(5).as_subclass(Elsewhere), torch.ones(()).expand(5)]
    rows = Bucket([p.data, other.data, plain.data], grads, ([torch.zeros(6, 4), torch.zeros(5), torch.zeros(5)],),
                  {"lr": 0.25, "new1": 0.1, "new2": 0.01}, 1)  # fmt: skip
    assert native.run(rule, rows) == [0, 1, 2]
    assert torch.equal(p, torch.ones(6, 4))
    kernels.run("compiled", rule, rows)
    assert all(torch.equal(w, torch.full_like(w, 0.75)) for w in (p, other, plain))
    short = Bucket([torch.ones(5)], [torch.ones(5)], ([torch.zeros(4)],), rows.scalars, 1)
    with pytest.raises(RuntimeError, match="size of tensor"):
        kernels.run("compiled", rule, short)


@needs_compiler
def test_a_rule_that_has_no_cpp_runs_as_foreach_and_says_so(caplog, monkeypatch):
    monkeypatch.setattr(compiled, "_broken", {})
    rule = made("with_a_mean", lambda p, g: p * torch.mean(g))
    with pytest.raises(native.CannotCompile, match="mean"):
        native.run(rule, bucket(rule, lists(1), lists(2)))
    ours, plain = bucket(rule, lists(1), lists(2)), bucket(rule, lists(1), lists(2))
    with caplog.at_level(logging.WARNING, "lightning_opt.kernels"):
        kernels.run("compiled", rule, ours)
    kernels.run("eager", rule, plain)
    torch.testing.assert_close(ours.params, plain.params)
    assert "no C++ for mean" in caplog.text
    assert kernels.choose(rule, "compiled", torch.device("cpu"), [torch.float64] * 3, 10).implementation == "foreach"


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 5, 40, foreach.BLOCK, foreach.BLOCK + 1, 3 * foreach.BLOCK - 1]), min_size=1)
)
def test_foreach_blocks_hold_every_element_once(sizes):
    counted = [torch.zeros(size) for size in sizes]
    rows = (block for tensor in counted for block in foreach._cut((tensor, tensor), 0))
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
    monkeypatch.setattr(native, "prepare", lambda *_: None)
    monkeypatch.setattr("lightning_opt.kernels.compiled.can_compile", lambda device: (True, "g++"))
    assert implementation("adamw", 10**6).implementation == "fused"
    assert implementation("adamw", 27 * 10**6).implementation == "compiled"
    assert implementation("adamw", 10**9, where="cuda").implementation == "fused"
    assert implementation("lion", 10**5).implementation == "foreach"
    assert implementation("lion", 10**6).implementation == "compiled"
    assert implementation("lion", 10**5, where="cuda").implementation == "compiled"
    half = implementation("lion", 10**9, "compiled", torch.float16)
    assert half.implementation == "foreach"
    assert "bfloat16" in half.why
    rule = optim.find_rule("adamw")
    mixed = [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert kernels.choose(rule, "auto", torch.device("cpu"), mixed, 10**6).implementation == "compiled"
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
        p = nn.Parameter(torch.ones(9))
        optimizer = optim.Lion([p], lr=0.5, implementation="compiled")
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert torch.equal(p, torch.full_like(p, 0.5))
        assert optimizer.implementations == {"lion": "foreach (no C++ compiler found)"}
    finally:
        device.cpp_compiler.cache_clear()


def no_space(*args, **kwargs):
    raise subprocess.CalledProcessError(1, "g++", stderr="no space left\nin detail")


def no_backend(graph, inputs):
    raise RuntimeError("no space left")


@pytest.mark.parametrize("where", ["C++", "graph"])
def test_a_failing_compiler_falls_back_once_and_changes_nothing_twice(monkeypatch, caplog, where):
    graph = compiled._graph(optim.find_rule("lion"), ("lr", "new1", "new2"), Variant())
    monkeypatch.setattr(compiled, "_compiled", lambda *args: (torch.compile(graph, backend=no_backend), []))
    monkeypatch.setattr(compiled, "can_compile", lambda device: (True, "g++"))
    monkeypatch.setattr(compiled, "_broken", {})
    native._library.cache_clear()
    monkeypatch.setattr(subprocess, "run", no_space)
    as_on_a_gpu = where == "graph"  # which learns of it in its first step, and a CPU before
    if as_on_a_gpu:
        monkeypatch.setattr(native, "run", compiled._run_graph)
        monkeypatch.setattr(native, "prepare", lambda *_: None)
    params = [nn.Parameter(torch.ones(20 + k)) for k in range(3)]
    optimizer = optim.Lion(params, lr=0.25, implementation="compiled")
    fallen = {"lion": "foreach (compiling failed: no space left)"}
    with caplog.at_level(logging.WARNING, "lightning_opt.kernels"):
        assert optimizer.implementations == ({"lion": "compiled (as asked, g++)"} if as_on_a_gpu else fallen)
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
    assert all(torch.equal(p, torch.full_like(p, 0.5)) for p in params)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "lightning_opt.kernels"]
    assert "no space left" in said
    assert "\n" not in said
    ((name, failed),) = optimizer.implementations.items()
    assert (name, failed.split(":")[0]) == ("lion", "foreach (compiling failed")
    assert "no space left" in failed


def test_a_compiler_that_says_nothing_is_named_and_other_dtypes_are_tried(monkeypatch, tmp_path, caplog):
    silent = tmp_path / "c++"
    silent.write_text("#!/bin/sh\nexit 3\n")
    silent.chmod(0o755)
    monkeypatch.setattr(native, "cpp_compiler", lambda: str(silent))
    monkeypatch.setattr(compiled, "can_compile", lambda device: (True, "c++"))
    monkeypatch.setattr(compiled, "_broken", {})
    native._library.cache_clear()
    with caplog.at_level(logging.WARNING, "lightning_opt.kernels"):
        for asked in ("auto", "compiled"):
            choice = implementation("lion", 10**6, asked)
            assert choice.implementation == "foreach"
            assert f"{silent} ended with code 3 and said nothing" in choice.why
        adamw = implementation("adamw", 27 * 10**6)
        assert adamw.implementation == "fused"
        assert "said nothing" in adamw.why
        assert implementation("lion", 10**5).why.endswith("too few to pay for compiling")  # nobody tried
    assert [record.getMessage().split()[1] for record in caplog.records] == ["lion", "adamw"]
    monkeypatch.setattr(native, "prepare", lambda *_: None)
    assert implementation("lion", 10**6).implementation == "foreach"
    assert implementation("lion", 10**6, dtype=torch.float64).implementation == "compiled"


def test_where_every_tensor_is_left_nothing_is_called(monkeypatch):
    def refuse(*_):
        raise AssertionError("called for no tensor: OpenMP takes no team of 0 threads")

    monkeypatch.setattr(native, "_library", lambda *_: [refuse])
    rule = made("left", lambda p, g: p * g)
    assert native.run(rule, bucket(rule, [torch.ones(3, 2)], [torch.ones(2, 3).t()])) == [0]


@needs_compiler
def test_changing_rates_and_sizes_never_recompiles(monkeypatch):
    params = [nn.Parameter(torch.ones(1000 + 17 * k)) for k in range(1, 4)]
    optimizer = optim.Lion(params, lr=1e-3, weight_decay=0.1, implementation="compiled")
    builds = []
    build = native._build
    native._library.cache_clear()
    monkeypatch.setattr(native, "_build", lambda text: builds.append(text) or build(text))
    for k in range(4):
        optimizer.param_groups[0]["lr"] = 1e-3 / (1 + k)
        optimizer.param_groups[0]["betas"] = (0.9, 0.99 - 0.001 * k)
        optimizer.param_groups[0]["weight_decay"] = 0.1 * k
        for p in params[k // 2 :]:
            p.grad = torch.ones_like(p)
        if k == 2:
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
            optimizer.param_groups[1]["params"][0].grad = torch.ones(3)
        optimizer.step()
    assert len(builds) == 1


def test_many_kinds_of_buckets_are_all_compiled(monkeypatch):
    """As on a GPU. Dynamo compiles 8 variants of one function and runs the ninth eager in silence."""
    compiled._compiled.cache_clear()
    torch._dynamo.reset()
    monkeypatch.setattr(native, "run", compiled._run_graph)
    monkeypatch.setattr(native, "prepare", lambda *_: None)
    monkeypatch.setattr(compiled, "can_compile", lambda device: (True, "Triton"))
    graphs = []
    count = lambda graph, inputs: graphs.append(graph) or graph.forward  # noqa: E731
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: real(function, backend=count, **how))
    kinds = 0
    for cls in (optim.Lion, optim.AdamW):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for mode in ("decoupled", "l2"):
                p = nn.Parameter(torch.ones(5, dtype=dtype))
                optimizer = cls([p], lr=0.1, weight_decay=0.1, weight_decay_mode=mode, implementation="compiled")
                p.grad = torch.ones_like(p)
                optimizer.step()
                kinds += 1
                assert len(graphs) == kinds
    compiled._compiled.cache_clear()


def test_each_list_of_shapes_is_compiled_up_to_a_limit_and_then_foreach_runs(monkeypatch, caplog):
    """As on a GPU, where experts without tokens have no gradient: 14 lists are more than Dynamo's 8."""
    compiled._compiled.cache_clear()
    torch._dynamo.reset()
    monkeypatch.setattr(native, "run", compiled._run_graph)
    monkeypatch.setattr(native, "prepare", lambda *_: None)
    monkeypatch.setattr(compiled, "can_compile", lambda device: (True, "Triton"))
    monkeypatch.setattr(compiled, "_shapes", {})
    monkeypatch.setattr(compiled, "_full", set())
    monkeypatch.setattr(compiled, "_MOST", 14)
    graphs = []
    count = lambda graph, inputs: graphs.append(graph) or graph.forward  # noqa: E731
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: real(function, backend=count, **how))
    p = nn.Parameter(torch.ones(()))
    with caplog.at_level(logging.WARNING, "lightning_opt.kernels"):
        for turn in range(2):
            for size in range(16):
                p = nn.Parameter(torch.ones(10 + size))
                p.grad = torch.ones_like(p)
                optim.Lion([p], lr=0.25, implementation="compiled").step()
                assert torch.equal(p.detach(), torch.full_like(p, 0.75))
                assert len(graphs) == (14 if turn else min(size + 1, 14))
    assert [record.getMessage() for record in caplog.records] == [
        "lion: 14 lists of shapes are compiled, torch's kernels take all others"
    ]
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
