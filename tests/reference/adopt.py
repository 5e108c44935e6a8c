"""ADOPT in float64 numpy, written from Taniguchi et al. 2024, Algorithm 2; decay in every step, the first too."""

import numpy as np

QUADRATIC = 0.05  # it divides by gradients of long ago


def run(weights, gradients, rates, *, betas, eps, clip_exponent, weight_decay):
    """Final weights; no signs.

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`.
    """
    theta = [np.array(w, dtype=np.float64) for w in weights]
    momentum = [np.zeros_like(w) for w in theta]
    b1, b2 = betas
    second = []
    for t, (grads, alpha) in enumerate(zip(gradients, rates, strict=True)):
        theta = [w * (1.0 - alpha * weight_decay) for w in theta]
        if t == 0:
            second = [np.square(g) for g in grads]
            continue
        bound = np.inf if clip_exponent is None else np.power(float(t), clip_exponent)
        for i, g in enumerate(grads):
            normed = np.minimum(np.maximum(g / np.maximum(np.sqrt(second[i]), eps), -bound), bound)
            momentum[i] = b1 * momentum[i] + (1.0 - b1) * normed
            theta[i] = theta[i] - alpha * momentum[i]
            second[i] = b2 * second[i] + (1.0 - b2) * np.square(g)
    return theta, None
