"""RMSProp in float64 numpy, not from our code.

Written from Tieleman and Hinton 2012, Graves 2013 (eq. 38 to 41) and torch's documentation of torch.optim.RMSprop.
"""

import numpy as np

HYPER = {"alpha": 0.9}


def run(weights, gradients, rates, *, alpha, eps, centered, momentum, weight_decay):
    """Final weights and the argument of every step's sign (none for this rule).

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`.
    """
    theta = [np.array(w, dtype=np.float64) for w in weights]
    zeros = lambda: [np.zeros_like(w) for w in theta]  # noqa: E731
    square, mean, velocity = zeros(), zeros(), zeros()
    for grads, eta in zip(gradients, rates, strict=True):
        for i, g in enumerate(grads):
            square[i] = alpha * square[i] + (1.0 - alpha) * g**2
            mean[i] = alpha * mean[i] + (1.0 - alpha) * g
            spread = square[i] - mean[i] ** 2 if centered else square[i]
            velocity[i] = momentum * velocity[i] + g / (np.sqrt(np.maximum(spread, 0.0)) + eps)
            theta[i] = theta[i] * (1.0 - eta * weight_decay) - eta * velocity[i]
    return theta, None
