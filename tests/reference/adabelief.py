"""AdaBelief in float64 numpy, written from Zhuang et al. 2020, Algorithm 2 (not from our code)."""

import numpy as np


def run(weights, gradients, rates, *, betas, eps, weight_decay):
    """Final weights and the argument of every step's sign (none for this rule).

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`.
    """
    theta = [np.array(w, dtype=np.float64) for w in weights]
    first = [np.zeros_like(w) for w in theta]
    belief = [np.zeros_like(w) for w in theta]
    b1, b2 = betas
    for t, (grads, eta) in enumerate(zip(gradients, rates, strict=True), start=1):
        for i, g in enumerate(grads):
            first[i] = b1 * first[i] + (1.0 - b1) * g
            belief[i] = b2 * belief[i] + (1.0 - b2) * (g - first[i]) ** 2 + eps
            m_hat = first[i] / (1.0 - b1**t)
            s_hat = belief[i] / (1.0 - b2**t)
            theta[i] = theta[i] * (1.0 - eta * weight_decay) - eta * m_hat / (np.sqrt(s_hat) + eps)
    return theta, None
