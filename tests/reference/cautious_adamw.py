"""Cautious AdamW in float64 numpy, written from Liang et al. 2024, Algorithm 2, with the mask divided by its mean."""

import numpy as np

HYPER = {"betas": (0.9, 0.97), "cautious": True}


def run(weights, gradients, rates, *, betas, eps, cautious, weight_decay):
    """Final weights; no signs (where the product of momentum and gradient is near zero, so is the momentum).

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`.
    """
    theta = [np.array(w, dtype=np.float64) for w in weights]
    first = [np.zeros_like(w) for w in theta]
    second = [np.zeros_like(w) for w in theta]
    b1, b2 = betas
    for t, (grads, eta) in enumerate(zip(gradients, rates, strict=True), start=1):
        for i, g in enumerate(grads):
            first[i] = b1 * first[i] + (1.0 - b1) * g
            second[i] = b2 * second[i] + (1.0 - b2) * np.square(g)
            u = first[i] / (1.0 - np.power(b1, t)) / (np.sqrt(second[i] / (1.0 - np.power(b2, t))) + eps)
            if cautious:
                phi = (u * g > 0).astype(np.float64)
                u = u * phi / max(phi.mean(), 1e-3)
            theta[i] = theta[i] * (1.0 - eta * weight_decay) - eta * u
    return theta, None
