"""AMSGrad in float64 numpy, not from our code.

Written from Reddi, Kale and Kumar 2018, Algorithm 2, with the bias corrections of torch's documentation.
"""

import numpy as np


def run(weights, gradients, rates, *, betas, eps, weight_decay):
    """Final weights and the argument of every step's sign (none for this rule).

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`.
    """
    theta = [np.array(w, dtype=np.float64) for w in weights]
    first = [np.zeros_like(w) for w in theta]
    second = [np.zeros_like(w) for w in theta]
    largest = [np.zeros_like(w) for w in theta]
    b1, b2 = betas
    for t, (grads, eta) in enumerate(zip(gradients, rates, strict=True), start=1):
        for i, g in enumerate(grads):
            first[i] = b1 * first[i] + (1.0 - b1) * g
            second[i] = b2 * second[i] + (1.0 - b2) * g**2
            largest[i] = np.where(second[i] > largest[i], second[i], largest[i])
            m_hat = first[i] / (1.0 - b1**t)
            v_hat = largest[i] / (1.0 - b2**t)
            theta[i] = theta[i] - eta * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * theta[i])
    return theta, None
