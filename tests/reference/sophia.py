"""Sophia in float64 numpy, written from Liu et al. 2023, Algorithm 3."""

import numpy as np


def run(weights, gradients, rates, *, betas, gamma, eps, weight_decay, estimator=None, interval=10, estimates=None):
    """Final weights and, per step and tensor, (argument of the sign, size of its terms) where there is no estimate yet.

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`; `estimates[t][i]`: of the diagonal, before step t.
    """
    theta = [np.array(w, dtype=np.float64) for w in weights]
    m = [np.zeros_like(w) for w in theta]
    h = [np.zeros_like(w) for w in theta]
    b1, b2 = betas
    arguments = []
    for t, (grads, eta) in enumerate(zip(gradients, rates, strict=True)):
        arguments.append([])
        if estimates and t in estimates:
            h = [b2 * old + (1.0 - b2) * new for old, new in zip(h, estimates[t], strict=True)]
        for i, g in enumerate(grads):
            size = np.abs(b1 * m[i]) + np.abs((1.0 - b1) * g)
            m[i] = b1 * m[i] + (1.0 - b1) * g
            arguments[-1].append((m[i], size))
            ratio = m[i] / np.maximum(gamma * h[i], eps)
            theta[i] = theta[i] - eta * weight_decay * theta[i] - eta * np.clip(ratio, -1.0, 1.0)
    return theta, arguments
