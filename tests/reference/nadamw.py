"""NAdamW in float64 numpy, not from our code.

Written from Choi et al. 2019 (arXiv 1910.05446), Table 1, and optax's documentation.
"""

import numpy as np


def run(weights, gradients, rates, *, betas, eps, bias_correction="one", weight_decay):
    """Final weights and the argument of every step's sign (none for this rule).

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`.
    """
    theta = [np.array(w, dtype=np.float64) for w in weights]
    first = [np.zeros_like(w) for w in theta]
    second = [np.zeros_like(w) for w in theta]
    b1, b2 = betas
    for t, (grads, eta) in enumerate(zip(gradients, rates, strict=True), start=1):
        ahead = t + 1 if bias_correction == "two" else t
        for i, g in enumerate(grads):
            first[i] = b1 * first[i] + (1.0 - b1) * g
            second[i] = b2 * second[i] + (1.0 - b2) * g**2
            look = b1 * first[i] / (1.0 - b1**ahead) + (1.0 - b1) * g / (1.0 - b1**t)
            v_hat = second[i] / (1.0 - b2**t)
            theta[i] = theta[i] * (1.0 - eta * weight_decay) - eta * look / (np.sqrt(v_hat) + eps)
    return theta, None
