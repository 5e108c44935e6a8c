"""NorMuon in float64 numpy, written from Li et al. 2025 (arXiv 2510.05491), Algorithm 1 (not from our code)."""

import importlib.util
from pathlib import Path

import numpy as np

_spec = importlib.util.spec_from_file_location("reference_muon", Path(__file__).with_name("muon.py"))
_muon = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_muon)

QUADRATIC = 0.1
HYPER = {"ns_dtype": "float32"}
FLOAT32 = _muon.FLOAT32


def run(weights, gradients, rates, *, momentum, beta2, nesterov, weight_decay, scale, ns_steps, coefficients,
        split_fused, per_head, ns_dtype):  # fmt: skip
    """Final weights; a tensor of three dimensions is a list of matrices."""
    theta = [np.array(w, dtype=np.float64) for w in weights]
    average = [np.zeros_like(w) for w in theta]
    second = [np.zeros(w.shape[:-1]) for w in theta]
    for grads, eta in zip(gradients, rates, strict=True):
        for i, g in enumerate(grads):
            average[i] = momentum * average[i] + (1.0 - momentum) * g
            direction = momentum * average[i] + (1.0 - momentum) * g if nesterov else average[i]
            step = np.empty_like(direction)
            for index in np.ndindex(direction.shape[:-2]):
                o = _muon.orthogonal(direction[index], ns_steps, coefficients)
                second[i][index] = beta2 * second[i][index] + (1.0 - beta2) * (o**2).mean(axis=1)
                n = o / (np.sqrt(second[i][index])[:, None] + 1e-10)
                if scale == "match_rms_adamw":
                    target = 0.2 * np.sqrt(o.size)
                else:
                    target = np.linalg.norm(o) * _muon.size(scale, *o.shape)
                step[index] = target * n / (np.linalg.norm(n) + 1e-10)
            theta[i] = theta[i] - eta * weight_decay * theta[i] - eta * step
    return theta, None
