"""Runs timm's NAdamW and optax's on a small problem and writes down where they arrive: ``data/nadamw_<which>.json``.

    python tests/reference/record_classics.py timm FILE        FILE: timm/optim/nadamw.py at the commit in `SOURCES`
    python tests/reference/record_classics.py optax            where jax and optax are installed

Neither is in the test environment; what they computed, once and in float64, is.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np

STEPS = 30
SHAPES = [(4, 3), (5,)]
RATE, DECAY, BETAS, EPS = 0.01, 0.1, (0.9, 0.97), 1e-8
SOURCES = {
    "timm": ("huggingface/pytorch-image-models", "aa4b5850c1543fa488abf260f18390eda46cf85d", "timm/optim/nadamw.py"),
    "optax": ("google-deepmind/optax", "", "optax.nadamw"),
}


def problem():
    """Weights, gradients and rates per step, in float64 and by seed."""
    rng = np.random.default_rng(7)
    weights = [rng.normal(size=shape) for shape in SHAPES]
    gradients = [[rng.normal(size=s) * 10.0 ** rng.integers(-2, 2) for s in SHAPES] for _ in range(STEPS)]
    return weights, gradients, [RATE * (1 - t / STEPS) for t in range(STEPS)]


def run_timm(file):
    """The last weights of timm's optimizer."""
    import torch

    folder = Path(file).resolve().parent
    sys.path.insert(0, str(folder.parent))
    module = importlib.import_module(f"{folder.name}.{Path(file).stem}")
    weights, gradients, rates = problem()
    params = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
    optimizer = module.NAdamW(params, lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for grads, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
    return [p.detach().numpy() for p in params]


def run_optax():
    """The last weights of optax's optimizer; it adds decay x weight to the step, which is the decay before the step."""
    import jax
    import optax

    jax.config.update("jax_enable_x64", True)
    SOURCES["optax"] = ("google-deepmind/optax", f"release {optax.__version__}", "optax.nadamw")
    weights, gradients, rates = problem()
    schedule = jax.numpy.asarray(rates)
    b1, b2 = BETAS
    optimizer = optax.nadamw(lambda count: schedule[count], b1=b1, b2=b2, eps=EPS, weight_decay=DECAY)
    params = [jax.numpy.asarray(w) for w in weights]
    state = optimizer.init(params)
    for grads in gradients:
        updates, state = optimizer.update([jax.numpy.asarray(g) for g in grads], state, params)
        params = optax.apply_updates(params, updates)
    return [np.asarray(p) for p in params]


if __name__ == "__main__":
    which, *rest = sys.argv[1:]
    final = {"timm": run_timm, "optax": run_optax}[which](*rest)
    repository, commit, path = SOURCES[which]
    command = f"python tests/reference/record_classics.py {which}" + (" FILE" if rest else "")
    record = {"repository": repository, "commit": commit, "path": path, "command": command}
    record["weights"] = [w.tolist() for w in final]
    (Path(__file__).parent / "data" / f"nadamw_{which}.json").write_text(json.dumps(record) + "\n")
