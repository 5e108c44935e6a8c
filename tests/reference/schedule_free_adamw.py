"""Schedule-free AdamW in float64 numpy, written from Defazio et al. 2024, Algorithm 1: x, y and z all kept."""

import numpy as np

HYPER = {"betas": (0.9, 0.97), "warmup_steps": 6}


def run(weights, gradients, rates, *, betas, eps, warmup_steps, weight_lr_power, weight_decay, average=False):
    """Final y, where gradients are taken (`average`: x, the weights to use); no signs.

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`.
    """
    x = [np.array(w, dtype=np.float64) for w in weights]
    y, z = [w.copy() for w in x], [w.copy() for w in x]
    second = [np.zeros_like(w) for w in x]
    b1, b2 = betas
    total = 0.0
    for t, (grads, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        warm = min(1.0, t / warmup_steps) if warmup_steps else 1.0
        weight = np.power(warm, weight_lr_power)
        total += weight
        c = weight / total
        for i, g in enumerate(grads):
            second[i] = b2 * second[i] + (1.0 - b2) * np.square(g)
            v_hat = second[i] / (1.0 - np.power(b2, t))
            z[i] = z[i] - rate * warm * (g / (np.sqrt(v_hat) + eps) + weight_decay * y[i])
            x[i] = (1.0 - c) * x[i] + c * z[i]
            y[i] = (1.0 - b1) * z[i] + b1 * x[i]
    return (x if average else y), None
