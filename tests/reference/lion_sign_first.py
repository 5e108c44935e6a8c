"""Sign-first Lion in float64 numpy, not from our code.

Written from the update table of blog.csdn.net/gitblog_00403, article 151599122.
"""

import numpy as np

HYPER = {"beta1": 0.9}


def run(weights, gradients, rates, *, beta1, weight_decay):
    """Final weights and per step and tensor (argument of the sign, size of its terms).

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`.
    """
    theta = [np.array(w, dtype=np.float64) for w in weights]
    momentum = [np.zeros_like(w) for w in theta]
    arguments = []
    for grads, eta in zip(gradients, rates, strict=True):
        arguments.append([])
        for i, g in enumerate(grads):
            size = np.abs(beta1 * momentum[i]) + np.abs((1.0 - beta1) * np.sign(g))
            momentum[i] = np.clip(beta1 * momentum[i] + (1.0 - beta1) * np.sign(g), -1.0, 1.0)
            arguments[-1].append((momentum[i], size))
            theta[i] = theta[i] - eta * (np.sign(momentum[i]) + weight_decay * theta[i])
    return theta, arguments
