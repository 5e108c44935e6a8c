"""Every implementation of every rule on a GPU against float64 numpy, and which one is taken."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from lightning_opt import kernels, optim

pytestmark = pytest.mark.gpu

SHAPES = [(64, 96), (96,), (257, 33), (), (1,)]
STEPS = 5
BETAS = (0.9, 0.95)


def reference(name: str) -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "reference" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"reference_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ways() -> list[tuple[str, str]]:
    return [(name, way) for name in optim.list_optimizers() for way in kernels.possible(optim.find_rule(name))]


def make(name: str, params: list[torch.nn.Parameter], **hyper: Any) -> torch.optim.Optimizer:
    return getattr(optim, optim.OPTIMIZERS[name])(params, **hyper)


def problem() -> tuple[list[np.ndarray], list[list[np.ndarray]], list[float]]:
    random = np.random.default_rng(0)
    weights = [random.standard_normal(shape) for shape in SHAPES]
    gradients = [[random.standard_normal(shape) for shape in SHAPES] for _ in range(STEPS)]
    return weights, gradients, [1e-2 * (1 - 0.1 * t) for t in range(STEPS)]


def on_gpu(name: str, way: str, dtype: torch.dtype, **hyper: Any) -> list[np.ndarray]:
    """The weights after all steps, with a rate that changes every step."""
    weights, gradients, rates = problem()
    params = [torch.nn.Parameter(torch.tensor(w, device="cuda", dtype=dtype)) for w in weights]
    optimizer = make(name, params, betas=BETAS, weight_decay=0.1, implementation=way, **hyper)
    for grads, rate in zip(gradients, rates, strict=True):
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g, device="cuda", dtype=dtype)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    assert all(optimizer.implementations[rule].startswith(way) for rule in optimizer.implementations)
    return [p.detach().double().cpu().numpy() for p in params]


def expected(name: str) -> tuple[list[np.ndarray], Any]:
    more = {"eps": 1e-8} if name == "adamw" else {}
    return reference(name).run(*problem(), betas=BETAS, weight_decay=0.1, **more)


@pytest.mark.parametrize(("name", "way"), ways())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_every_way_equals_the_float64_reference(name: str, way: str, dtype: torch.dtype, tolerance: float) -> None:
    weights, arguments = expected(name)
    found = on_gpu(name, way, dtype)
    for i, (right, got) in enumerate(zip(weights, found, strict=True)):
        # Where a sign's argument is all rounding, either sign is right.
        sure = np.ones(np.shape(right), dtype=bool)
        for step in arguments or []:
            value, size = step[i]
            sure &= np.abs(value) > 1e-6 * size
        np.testing.assert_allclose(got[sure], right[sure], rtol=tolerance, atol=tolerance)
        assert sure.mean() > 0.99


@pytest.mark.parametrize(("name", "way"), ways())
def test_bfloat16_weights_are_the_float32_update_rounded(name: str, way: str) -> None:
    """One step from weights and gradients that bfloat16 holds exactly."""
    values = torch.linspace(-2, 2, 4096).bfloat16().reshape(64, 64)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.nn.Parameter(values.to("cuda", dtype))
        p.grad = values.flip(0).to("cuda", dtype)
        make(name, [p], lr=1e-2, weight_decay=0.1, implementation=way).step()
        results[dtype] = p.detach().float().cpu()
    torch.testing.assert_close(results[torch.bfloat16], results[torch.float32], rtol=2**-8, atol=1e-6)


def test_auto_takes_the_fastest_kernel_there_is() -> None:
    made = {}
    for name in ("adamw", "lion"):
        p = torch.nn.Parameter(torch.ones(1024, 1024, device="cuda"))
        optimizer = make(name, [p], lr=1e-3)
        made[name] = optimizer.implementations[name].partition(" ")[0]
    assert made == {"adamw": "fused", "lion": "compiled" if kernels.can_compile("cuda")[0] else "foreach"}


@pytest.mark.parametrize(("name", "way"), ways())
def test_a_step_with_clipping_never_waits_for_the_device(name: str, way: str) -> None:
    params = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in [(256, 256), (256,)]]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = make(name, params, lr=1e-3, max_grad_norm=1.0, implementation=way)
    optimizer.step()  # compiles, and makes the state
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.clip_()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("way", ["eager", "foreach", "compiled"])
@pytest.mark.parametrize(
    ("name", "more"),
    [("adamw", {"cautious": True}), ("adam_mini", {}), ("mars", {}), ("mars", {"clip": "global"})],
    ids=["cautious", "adam_mini", "mars", "mars-global"],
)
def test_what_is_measured_stays_on_the_device(name: str, more: dict[str, Any], way: str) -> None:
    params = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for shape in [(256, 256), (256,)]]
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = make(name, groups, lr=1e-3, implementation=way, **more)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", optim.list_optimizers())
def test_a_schedule_compiles_nothing_anew(name: str) -> None:
    from torch._dynamo.utils import counters

    p = torch.nn.Parameter(torch.randn(512, 512, device="cuda"))
    p.grad = torch.randn_like(p)
    optimizer = make(name, [p], lr=1e-3, implementation="compiled")
    optimizer.step()
    before = counters["stats"]["unique_graphs"]
    for step in range(5):
        optimizer.param_groups[0]["lr"] = 1e-3 / (step + 2)
        optimizer.step()
    assert counters["stats"]["unique_graphs"] == before
