"""Muon in float64 numpy, written from Jordan's post and its repository's description (not from our code).

The same polynomial iteration, on one matrix at a time and without shortcuts.
"""

import numpy as np

# Jordan's post; Amsel et al. 2025 by the authors' program, safety 1 %; You Jiacheng's five; Bjorck and Bowie's.
SETS = {
    "jordan": [(3.4445, -4.775, 2.0315)],
    "polar_express": [
        (8.2373124905, -23.1577474146, 16.6805684114),
        (4.0824419991, -2.8930477353, 0.5252849257),
        (3.9263479923, -2.8547468035, 0.5318022423),
        (3.2982187133, -2.424541981, 0.4863200836),
        (2.2970369435, -1.6366256256, 0.4002628456),
        (1.8763805351, -1.2347896578, 0.358918875),
        (1.8564423486, -1.2132449881, 0.3568003488),
        (1.875, -1.25, 0.375),
    ],
    "quintic": [
        (4.0848, -6.8946, 2.927),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    "cubic": [(1.5, -0.5, 0.0)],
}
QUADRATIC = 0.1
HYPER = {"ns_dtype": "float32"}
FLOAT32 = 1e-3  # five polynomials with slope 3.4 enlarge the rounding of small singular values up to 500 times


def orthogonal(matrix, steps, coefficients):
    """About U V^T of U S V^T."""
    x = np.array(matrix, dtype=np.float64)
    x = x / (np.sqrt(np.sum(x * x)) * (1.01 if coefficients == "polar_express" else 1.0) + 1e-7)
    for k in range(steps):
        a, b, c = SETS[coefficients][min(k, len(SETS[coefficients]) - 1)]
        if x.shape[0] <= x.shape[1]:
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        else:
            square = x.T @ x
            x = a * x + x @ (b * square + c * square @ square)
    return x


def size(kind, rows, columns):
    return {
        "original": max(1.0, rows / columns) ** 0.5,
        "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
        "spectral": (rows / columns) ** 0.5,
        "weight_rms": max(rows, columns) ** 0.5,
    }[kind]


def step_of(direction, weight, *, ns_steps, coefficients, scale):
    """Of a matrix, or of a stack of them one by one; the rate is left out."""
    if direction.ndim > 2:
        parts = [step_of(d, w, ns_steps=ns_steps, coefficients=coefficients, scale=scale)
                 for d, w in zip(direction, weight, strict=True)]  # fmt: skip
        return np.stack(parts)
    return size(scale, *direction.shape) * orthogonal(direction, ns_steps, coefficients)


def run(weights, gradients, rates, *, momentum, nesterov, weight_decay, scale, split_fused, per_head, ns_dtype, **how):
    """Final weights; `weights`: list of arrays, `gradients[t][i]`, `rates[t]`."""
    theta = [np.array(w, dtype=np.float64) for w in weights]
    average = [np.zeros_like(w) for w in theta]
    for grads, eta in zip(gradients, rates, strict=True):
        for i, g in enumerate(grads):
            average[i] = momentum * average[i] + (1.0 - momentum) * g
            direction = momentum * average[i] + (1.0 - momentum) * g if nesterov else average[i]
            step = step_of(direction, theta[i], scale=scale, **how)
            if scale == "weight_rms":
                step = step * max(1e-3, np.sqrt(np.mean(theta[i] ** 2)))
            theta[i] = theta[i] - eta * weight_decay * theta[i] - eta * step
    return theta, None
