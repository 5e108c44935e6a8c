"""SGD in float64 numpy, not from our code.

Written from torch's documentation of torch.optim.SGD with decoupled decay.
"""

import numpy as np

QUADRATIC = 4e-3  # the steepest direction has curvature 200: above 0.01 plain descent diverges


def run(weights, gradients, rates, *, weight_decay):
    """Final weights and the argument of every step's sign (none for this rule).

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`.
    """
    theta = [np.array(w, dtype=np.float64) for w in weights]
    for grads, eta in zip(gradients, rates, strict=True):
        theta = [w - eta * (g + weight_decay * w) for w, g in zip(theta, grads, strict=True)]
    return theta, None
