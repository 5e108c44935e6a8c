"""AdEMAMix in float64 numpy, written from Pagliardini et al. 2024, Algorithm 1 and the schedulers of section 3.1."""

import numpy as np

HYPER = {"betas": (0.9, 0.97), "beta3": 0.995, "alpha": 4.0, "alpha_warmup": 10, "beta3_warmup": 15}


def run(weights, gradients, rates, *, betas, beta3, alpha, alpha_warmup, beta3_warmup, eps, weight_decay):
    """Final weights; no signs.

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`.
    """
    theta = [np.array(w, dtype=np.float64) for w in weights]
    m1 = [np.zeros_like(w) for w in theta]
    m2 = [np.zeros_like(w) for w in theta]
    nu = [np.zeros_like(w) for w in theta]
    b1, b2 = betas
    for t, (grads, eta) in enumerate(zip(gradients, rates, strict=True), start=1):
        a = alpha if alpha_warmup is None else min(t * alpha / alpha_warmup, alpha)
        b3 = beta3
        if beta3_warmup is not None and t < beta3_warmup:
            # The paper's closed form, with the repository's 1e-8 beside both decays.
            log1, log3 = np.log(b1 + 1e-8), np.log(beta3 + 1e-8)
            b3 = np.exp(log1 * log3 / ((1.0 - t / beta3_warmup) * log3 + t / beta3_warmup * log1))
        for i, g in enumerate(grads):
            m1[i] = b1 * m1[i] + (1.0 - b1) * g
            m2[i] = b3 * m2[i] + (1.0 - b3) * g
            nu[i] = b2 * nu[i] + (1.0 - b2) * np.square(g)
            m1_hat = m1[i] / (1.0 - np.power(b1, t))
            nu_hat = nu[i] / (1.0 - np.power(b2, t))
            theta[i] = theta[i] - eta * ((m1_hat + a * m2[i]) / (np.sqrt(nu_hat) + eps) + weight_decay * theta[i])
    return theta, None
