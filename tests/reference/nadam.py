"""NAdam in float64 numpy, not from our code.

Written from Dozat 2016, Algorithm 2, and torch's documentation of torch.optim.NAdam.
"""

import numpy as np

HYPER = {"betas": (0.9, 0.97), "momentum_decay": 0.3}


def run(weights, gradients, rates, *, betas, eps, momentum_decay, weight_decay):
    """Final weights and the argument of every step's sign (none for this rule).

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`.
    """
    theta = [np.array(w, dtype=np.float64) for w in weights]
    first = [np.zeros_like(w) for w in theta]
    second = [np.zeros_like(w) for w in theta]
    b1, b2 = betas
    t = np.arange(1, len(rates) + 2)
    mu = b1 * (1.0 - 0.5 * 0.96 ** (t * momentum_decay))
    product = np.cumprod(mu)
    for k, (grads, eta) in enumerate(zip(gradients, rates, strict=True)):
        for i, g in enumerate(grads):
            first[i] = b1 * first[i] + (1.0 - b1) * g
            second[i] = b2 * second[i] + (1.0 - b2) * g**2
            m_hat = mu[k + 1] * first[i] / (1.0 - product[k + 1]) + (1.0 - mu[k]) * g / (1.0 - product[k])
            v_hat = second[i] / (1.0 - b2 ** (k + 1))
            theta[i] = theta[i] * (1.0 - eta * weight_decay) - eta * m_hat / (np.sqrt(v_hat) + eps)
    return theta, None
