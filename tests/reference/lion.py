"""Lion in float64 numpy, written from Chen et al. 2023, Algorithm 2 (not from our code)."""

import numpy as np


def run(weights, gradients, rates, *, betas, weight_decay):
    """Final weights and, per step and tensor, (argument of the sign, size of its terms).

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`.
    """
    theta = [np.array(w, dtype=np.float64) for w in weights]
    momentum = [np.zeros_like(w) for w in theta]
    b1, b2 = betas
    arguments = []
    for grads, eta in zip(gradients, rates, strict=True):
        arguments.append([])
        for i, g in enumerate(grads):
            c = b1 * momentum[i] + (1.0 - b1) * g
            arguments[-1].append((c, np.abs(b1 * momentum[i]) + np.abs((1.0 - b1) * g)))
            theta[i] = theta[i] - eta * (np.sign(c) + weight_decay * theta[i])
            momentum[i] = b2 * momentum[i] + (1.0 - b2) * g
    return theta, arguments
