"""Adam in float64 numpy, written from Kingma and Ba 2015, Algorithm 1, with decoupled decay (not from our code)."""

import numpy as np


def run(weights, gradients, rates, *, betas, eps, weight_decay):
    """Final weights and the argument of every step's sign (none for this rule).

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
            m_hat = first[i] / (1.0 - np.power(b1, t))
            v_hat = second[i] / (1.0 - np.power(b2, t))
            theta[i] = theta[i] - eta * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * theta[i])
    return theta, None
