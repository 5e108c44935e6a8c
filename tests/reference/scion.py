"""Scion in float64 numpy, written from Pethick et al. 2025 (arXiv 2502.07529), Algorithm 2 and its tables of norms."""

import importlib.util
from pathlib import Path

import numpy as np

_spec = importlib.util.spec_from_file_location("reference_muon", Path(__file__).with_name("muon.py"))
_muon = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_muon)

QUADRATIC = 0.1
HYPER = {"ns_dtype": "float32"}
FLOAT32 = _muon.FLOAT32


def oracle(kind, m, steps, coefficients):
    """lmo up to its sign, of a matrix or vector, radius 1."""
    if kind == "auto":
        kind = "spectral" if m.ndim > 1 else "rms"
    if kind == "rms":
        return m / (np.sqrt((m**2).mean()) + 1e-8)
    if m.ndim > 2:
        return np.stack([oracle(kind, part, steps, coefficients) for part in m])
    out, fan_in = m.shape
    if kind == "spectral":
        return np.sqrt(out / fan_in) * _muon.orthogonal(m, steps, coefficients)
    if kind == "sign":
        return np.sign(m) / fan_in
    if kind == "col":
        return np.stack([c / (np.sqrt((c**2).mean()) + 1e-8) for c in m.T], axis=1)
    return np.stack([r / (np.sqrt(fan_in) * np.linalg.norm(r) + 1e-8) for r in m])


def run(weights, gradients, rates, *, momentum, norm, radius, ns_steps, coefficients, weight_decay, split_fused,
        per_head, ns_dtype):  # fmt: skip
    """Final weights; the authors' constrained form is `weight_decay` 1."""
    theta = [np.array(w, dtype=np.float64) for w in weights]
    average = [np.zeros_like(w) for w in theta]
    for grads, eta in zip(gradients, rates, strict=True):
        for i, g in enumerate(grads):
            average[i] = momentum * average[i] + (1.0 - momentum) * g
            corner = radius * oracle(norm, average[i], ns_steps, coefficients)
            theta[i] = (1.0 - eta * weight_decay) * theta[i] - eta * corner
    return theta, None
