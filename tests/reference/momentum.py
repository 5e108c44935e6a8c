"""SGD with momentum in float64 numpy, not from our code.

Written from Sutskever et al. 2013, section 2, and torch's documentation of torch.optim.SGD.
"""

import numpy as np

HYPER = {"momentum": 0.8, "dampening": 0.3}
QUADRATIC = 2e-3  # the steepest direction has curvature 200, and the momentum makes ten steps of one


def run(weights, gradients, rates, *, momentum, dampening, nesterov, weight_decay):
    """Final weights and the argument of every step's sign (none for this rule).

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`.
    """
    theta = [np.array(w, dtype=np.float64) for w in weights]
    velocity = [None] * len(theta)
    for grads, eta in zip(gradients, rates, strict=True):
        for i, g in enumerate(grads):
            velocity[i] = g if velocity[i] is None else momentum * velocity[i] + (1.0 - dampening) * g
            direction = g + momentum * velocity[i] if nesterov else velocity[i]
            theta[i] = theta[i] - eta * (direction + weight_decay * theta[i])
    return theta, None
