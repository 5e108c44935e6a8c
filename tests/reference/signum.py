"""Signum in float64 numpy, written from Bernstein et al. 2018, Algorithm 2 (not from our code)."""

import numpy as np

HYPER = {"momentum": 0.97}


def run(weights, gradients, rates, *, momentum, weight_decay):
    """Final weights and per step and tensor (argument of the sign, size of its terms).

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`.
    """
    theta = [np.array(w, dtype=np.float64) for w in weights]
    average = [np.zeros_like(w) for w in theta]
    arguments = []
    for grads, eta in zip(gradients, rates, strict=True):
        arguments.append([])
        for i, g in enumerate(grads):
            size = np.abs(momentum * average[i]) + np.abs((1.0 - momentum) * g)
            average[i] = momentum * average[i] + (1.0 - momentum) * g
            arguments[-1].append((average[i], size))
            theta[i] = theta[i] - eta * (np.sign(average[i]) + weight_decay * theta[i])
    return theta, arguments
