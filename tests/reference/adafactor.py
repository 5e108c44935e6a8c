"""Adafactor in float64 numpy, written from Shazeer and Stern 2018, Algorithms 4 and 5 (decoupled decay added)."""

import numpy as np

HYPER = {"beta1": 0.8, "scale_floor": 0.5, "relative_step": False}
FLOAT32 = 1e-5
QUADRATIC = 0.2


def _rms(a):
    """Over the whole weight; three dimensions are a stack, of which each matrix is a weight."""
    return np.sqrt(np.mean(np.square(a), axis=(1, 2) if a.ndim == 3 else None, keepdims=True))


def run(
    weights,
    gradients,
    rates,
    *,
    beta1,
    decay_exponent,
    eps,
    scale_floor,
    clip_threshold,
    scale_parameter,
    relative_step,
    weight_decay,
):
    """Final weights; no signs.

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`.
    """
    x = [np.array(w, dtype=np.float64) for w in weights]
    rows, columns, full = {}, {}, {}
    momentum = [np.zeros_like(w) for w in x]
    for t, (grads, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        b2 = 1.0 - float(t) ** -decay_exponent
        rho = min(rate, 1.0 / np.sqrt(t)) if relative_step else rate
        for i, g in enumerate(grads):
            square = np.square(g) + eps
            if g.ndim >= 2:
                # Sums, as in the paper.
                rows[i] = b2 * rows.get(i, 0.0) + (1.0 - b2) * square.sum(-1)
                columns[i] = b2 * columns.get(i, 0.0) + (1.0 - b2) * square.sum(-2)
                v = rows[i][..., :, None] * columns[i][..., None, :] / rows[i].sum(-1)[..., None, None]
            else:
                full[i] = v = b2 * full.get(i, 0.0) + (1.0 - b2) * square
            u = g / np.sqrt(v)
            u = u / np.maximum(1.0, _rms(u) / clip_threshold)
            alpha = rho * np.maximum(scale_floor, _rms(x[i])) if scale_parameter else rho
            step = alpha * u
            if beta1:
                step = momentum[i] = beta1 * momentum[i] + (1.0 - beta1) * step
            x[i] = x[i] * (1.0 - rate * weight_decay) - step
    return x, None
