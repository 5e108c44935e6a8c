"""AdaGrad in float64 numpy, not from our code.

Written from Duchi, Hazan and Singer 2011, section 1 (diagonal), and torch's documentation of torch.optim.Adagrad.
"""

import numpy as np

HYPER = {"lr_decay": 0.1, "initial_accumulator_value": 0.2}
QUADRATIC = 0.3


def run(weights, gradients, rates, *, lr_decay, initial_accumulator_value, eps, weight_decay):
    """Final weights and the argument of every step's sign (none for this rule).

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`.
    """
    theta = [np.array(w, dtype=np.float64) for w in weights]
    squares = [np.full_like(w, initial_accumulator_value) for w in theta]
    for t, (grads, eta) in enumerate(zip(gradients, rates, strict=True)):
        for i, g in enumerate(grads):
            squares[i] = squares[i] + np.square(g)
            step = eta / (1.0 + t * lr_decay) * g / (np.sqrt(squares[i]) + eps)
            theta[i] = theta[i] * (1.0 - eta * weight_decay) - step
    return theta, None
