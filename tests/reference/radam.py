"""RAdam in float64 numpy, not from our code.

Written from Liu et al. 2020, Algorithm 2, with the threshold and eps of torch's documentation.
"""

import numpy as np

QUADRATIC = {"lr": 0.02, "betas": (0.9, 0.9)}  # with a longer memory it is not rectified yet after 200 steps


def run(weights, gradients, rates, *, betas, eps, weight_decay):
    """Final weights and the argument of every step's sign (none for this rule).

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`.
    """
    theta = [np.array(w, dtype=np.float64) for w in weights]
    first = [np.zeros_like(w) for w in theta]
    second = [np.zeros_like(w) for w in theta]
    b1, b2 = betas
    rho_inf = 2.0 / (1.0 - b2) - 1.0
    for t, (grads, eta) in enumerate(zip(gradients, rates, strict=True), start=1):
        rho = rho_inf - 2.0 * t * b2**t / (1.0 - b2**t)
        for i, g in enumerate(grads):
            first[i] = b1 * first[i] + (1.0 - b1) * g
            second[i] = b2 * second[i] + (1.0 - b2) * g**2
            step = first[i] / (1.0 - b1**t)
            if rho > 5.0:
                r = ((rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)) ** 0.5
                step = r * step * np.sqrt(1.0 - b2**t) / (np.sqrt(second[i]) + eps)
            theta[i] = theta[i] * (1.0 - eta * weight_decay) - eta * step
    return theta, None
