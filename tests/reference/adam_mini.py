"""Adam-mini in float64 numpy, written from Zhang et al. 2024, Algorithm 1: one second moment per block.

Blocks of the contract's shapes: vectors whole, matrices by row, stacks of matrices by the rows of each.
"""

import numpy as np

QUADRATIC = 0.1  # one second moment for a vector whose curvatures span two decades


def blocks_of(array):
    """The array with one row per block."""
    if array.ndim < 2:
        return array.reshape(1, -1)
    return array.reshape(-1, array.shape[-1])


def run(weights, gradients, rates, *, betas, eps, weight_decay, blocks=None):
    """Final weights; no signs.

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`; `blocks[i]`: number of equal blocks of tensor i.
    """
    theta = [np.array(w, dtype=np.float64) for w in weights]
    rows = [blocks_of] * len(theta) if blocks is None else [(lambda a, n=n: a.reshape(n, -1)) for n in blocks]
    first = [np.zeros_like(w) for w in theta]
    second = [np.zeros(len(rows[i](w))) for i, w in enumerate(theta)]
    b1, b2 = betas
    for t, (grads, eta) in enumerate(zip(gradients, rates, strict=True), start=1):
        for i, g in enumerate(grads):
            first[i] = b1 * first[i] + (1.0 - b1) * g
            second[i] = b2 * second[i] + (1.0 - b2) * np.square(rows[i](g)).mean(axis=1)
            root = np.sqrt(second[i] / (1.0 - np.power(b2, t))) + eps
            u = (rows[i](first[i]) / (1.0 - np.power(b1, t)) / root[:, None]).reshape(g.shape)
            theta[i] = theta[i] - eta * (u + weight_decay * theta[i])
    return theta, None
