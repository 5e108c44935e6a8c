"""Muon, NorMuon and Scion beside the implementations of others, step by step on the same gradients.

Theirs run Newton-Schulz in bfloat16, ours here in float32, so they differ by bfloat16's noise: below 2 % of the way the
weights went, where the wrong Nesterov alone makes more than 5 %. With torch's in float32 the two agree to rounding.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_opt import optim

SHAPES = [(48, 48), (24, 96), (96, 24), (40, 64)]
STEPS = 12
EXACT = {"ns_dtype": "float32"}


def normal(rng, shape):
    return torch.tensor(rng.normal(size=shape), dtype=torch.float32)


def weights(shapes=SHAPES):
    rng = np.random.default_rng(0)
    return [nn.Parameter(normal(rng, shape)) for shape in shapes]


def run(params, optimizer):
    rng = np.random.default_rng(0)
    for p in params:
        normal(rng, p.shape)  # the weights came first
    for _ in range(STEPS):
        for p in params:
            p.grad = normal(rng, p.shape)
        optimizer.step()


def farthest(ours, theirs):
    """Largest root mean square of the difference of two weights, as a share of how far they went."""
    start = weights([p.shape for p in ours])
    rms = lambda x: x.detach().float().square().mean().sqrt()  # noqa: E731
    return max(float(rms(a - b) / rms(a - s)) for a, b, s in zip(ours, theirs, start, strict=True))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_torchs_muon(scale, nesterov):
    how = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    ours, theirs = weights(), weights()
    run(ours, optim.Muon(ours, scale=scale, **how, **EXACT))
    run(theirs, torch.optim.Muon(theirs, adjust_lr_fn=scale, **how))
    assert farthest(ours, theirs) < 0.02
    other = weights()
    run(other, optim.Muon(other, scale=scale, **{**how, "nesterov": not nesterov}))
    assert farthest(other, theirs) > 0.05


def test_torchs_muon_in_float32(monkeypatch):
    """With its Newton-Schulz in float32 the same but for rounding: nothing but the dtype differs."""
    module = importlib.import_module("torch.optim._muon")
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    assert module.EPS == 1e-7
    ours, theirs = weights(), weights()
    run(ours, optim.Muon(ours, lr=0.02, weight_decay=0.1, ns_dtype="float32"))
    run(theirs, torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1))
    assert farthest(ours, theirs) < 2e-5


def test_the_momentum_of_bfloat16_weights_is_not_normalised():
    """As torch 2.13's is without Nesterov: its in-place division reaches the state (pytorch/pytorch#190597)."""
    p = nn.Parameter(torch.randn(32, 32).bfloat16())
    optimizer = optim.Muon([p], nesterov=False, state_dtype="bfloat16")
    p.grad = torch.randn(32, 32).bfloat16() * 10
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"].float(), 0.05 * p.grad.float(), rtol=1e-2, atol=1e-3)


def peers():
    return pytest.importorskip("pytorch_optimizer", reason="a peer of the extra `peers`")


@pytest.mark.parametrize("coefficients", ["jordan", "quintic"])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_pytorch_optimizers_muon(scale, coefficients):
    ours, theirs = weights(), weights()
    run(ours, optim.Muon(ours, lr=0.02, weight_decay=0.1, scale=scale, coefficients=coefficients, **EXACT))
    group = {"params": theirs, "use_muon": True}
    name = {"jordan": "original"}.get(coefficients, coefficients)
    adjusted = scale == "match_rms_adamw"
    peer = peers().Muon([group], lr=0.02, weight_decay=0.1, ns_coeffs=name, use_adjusted_lr=adjusted)
    run(theirs, peer)
    assert farthest(ours, theirs) < 0.02


@pytest.mark.parametrize(("scale", "peers_scale"), [("original", "preserve_norm"), ("match_rms_adamw", "match_rms")])
def test_pytorch_optimizers_normuon(scale, peers_scale):
    ours, theirs = weights(), weights()
    run(ours, optim.NorMuon(ours, lr=0.02, weight_decay=0.1, scale=scale, **EXACT))
    group = {"params": theirs, "use_muon": True}
    run(theirs, peers().NorMuon([group], lr=0.02, weight_decay=0.1, update_scale=peers_scale))
    assert farthest(ours, theirs) < 0.02


NORMS = [
    ("spectral", {"norm_type": 2}, (24, 40), {}),
    ("auto", {"norm_type": 3}, (12, 6, 3, 3), {}),
    ("sign", {"norm_type": 4}, (24, 40), {}),
    ("rms", {"norm_type": 5}, (40,), {}),
    ("col", {"norm_type": 6}, (24, 40), {}),
    ("col", {"norm_type": 6, "norm_kwargs": {"transpose": True}}, (40, 24), {"role": "embedding"}),
    ("row", {"norm_type": 7}, (24, 40), {}),
]


@pytest.mark.parametrize(("norm", "peer", "shape", "group"), NORMS)
@pytest.mark.parametrize("constrained", [True, False])
def test_pytorch_optimizers_scion(norm, peer, shape, group, constrained):
    ours, theirs = weights([shape]), weights([shape])
    decay = 1.0 if constrained else 0.0
    run(ours, optim.Scion([{"params": ours, **group}], lr=0.01, norm=norm, radius=5.0, weight_decay=decay, **EXACT))
    settings = {"lr": 0.01, "momentum": 0.1, "scale": 5.0, "constraint": constrained, **peer}
    run(theirs, peers().SCION(theirs, **settings))
    assert farthest(ours, theirs) < (0.02 if norm in ("spectral", "auto") else 1e-5)


RECORDED = Path(__file__).resolve().parents[1] / "reference" / "data"
AUTHORS = {
    "KellerJordan/Muon@857d1ad": lambda p: optim.Muon(p, lr=0.02, weight_decay=0.1, **EXACT),
    "zichongli5/NorMuon@d45c9a4": lambda p: optim.NorMuon(p, lr=0.02, weight_decay=0.1, **EXACT),
    "LIONS-EPFL/scion@f58a393 Spectral": lambda p: optim.Scion(p, lr=0.01, radius=5.0, norm="spectral", **EXACT),
    "LIONS-EPFL/scion@f58a393 Sign": lambda p: optim.Scion(p, lr=0.01, radius=5.0, norm="sign"),
    "LIONS-EPFL/scion@f58a393 RowNorm": lambda p: optim.Scion(p, lr=0.01, radius=5.0, norm="row"),
    "LIONS-EPFL/scion@f58a393 ColNorm": lambda p: optim.Scion(p, lr=0.01, radius=5.0, norm="col"),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_own_code(name):
    """Their repositories' classes, recorded by `tests/reference/data/record_muon.py`."""
    recorded = [torch.tensor(x) for x in json.loads((RECORDED / "muon.json").read_text())[name]]
    shapes = [x.shape for x in recorded]
    ours = weights(shapes)
    run(ours, AUTHORS[name](ours))
    assert farthest(ours, recorded) < (0.02 if any(word in name for word in ("Muon", "Spectral")) else 1e-5)
