"""MARS-AdamW in float64 numpy, written from Yuan et al. 2024, Algorithm 2, with the repository's clip per tensor."""

import numpy as np

HYPER = {"betas": (0.9, 0.97), "gamma": 0.1}


def run(weights, gradients, rates, *, betas, eps, gamma, clip, clip_norm, weight_decay):
    """Final weights; no signs.

    `weights`: list of arrays; `gradients[t][i]`; `rates[t]`.
    """
    x = [np.array(w, dtype=np.float64) for w in weights]
    first = [np.zeros_like(w) for w in x]
    second = [np.zeros_like(w) for w in x]
    before = [np.zeros_like(w) for w in x]
    b1, b2 = betas
    for t, (grads, eta) in enumerate(zip(gradients, rates, strict=True), start=1):
        c = [g + gamma * b1 / (1.0 - b1) * (g - old) for g, old in zip(grads, before, strict=True)]
        norms = [np.sqrt(np.sum(np.square(v))) for v in c]
        if clip == "global":
            norms = [np.sqrt(np.sum(np.square(norms)))] * len(norms)
        if clip != "none":
            c = [v / n * clip_norm if n > clip_norm else v for v, n in zip(c, norms, strict=True)]
        for i in range(len(x)):
            first[i] = b1 * first[i] + (1.0 - b1) * c[i]
            second[i] = b2 * second[i] + (1.0 - b2) * np.square(c[i])
            m_hat = first[i] / (1.0 - np.power(b1, t))
            v_hat = second[i] / (1.0 - np.power(b2, t))
            x[i] = x[i] - eta * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * x[i])
        before = grads
    return x, None
