"""Learning-rate schedules: plain functions of the step that return a multiplier of the peak rate.

Step ``k`` counts from 0: it is the number of optimizer steps already taken, so ``multiplier(k)`` is the rate of
update ``k + 1``. With ``W`` warm-up steps and ``T`` steps in all:

    warm-up    k < W          (k + 1) / W           so update 1 has rate 1/W and update W the whole peak
    progress   k >= W         x = (k + 1 - W) / (T + 1 - W)     in (0, 1) for the run's updates
    linear     1 - x          cosine   (1 + cos(pi x)) / 2          constant   1
    wsd        1 until the last D updates, then (1 - y) with y = (k + 1 - (T - D)) / (D + 1)
    multiplier = r + (1 - r) * shape                r = min_ratio

``min_ratio`` is where the rate arrives when the run is over (``k = T`` and beyond): with 0 every update still moves the
weights, the last by 1/(T + 1 - W) of the peak. transformers' schedulers over ``T + 1`` steps start one step earlier,
at a rate of 0: theirs at ``k + 1`` is ours at ``k``.

Sources: cosine, Loshchilov and Hutter 2017 (arXiv 1608.03983) section 3; warmup-stable-decay, Hu et al. 2024
(arXiv 2404.06395) section 4; linear to zero, Bergsma et al. 2025 (arXiv 2502.15938).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning_opt.plan import ConfigError, check_value, one_of

Schedule = Callable[[int], float]


def constant(x: float) -> float:
    """The peak rate, always."""
    return 1.0


def linear(x: float) -> float:
    """Straight from 1 (x = 0) to 0 (x = 1)."""
    return 1.0 - x


def cosine(x: float) -> float:
    """Half a cosine from 1 (x = 0) to 0 (x = 1)."""
    return 0.5 * (1.0 + math.cos(math.pi * x))


SHAPES: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "wsd": linear,  # of the decaying end only: `_decay_steps` says how long that is
}


def steps_of(amount: float, max_steps: int) -> int:
    """Number of steps that a fraction of the run (< 1) or a count of steps (>= 1) stands for, rounded to nearest."""
    return round(amount * max_steps) if amount < 1 else int(amount)


def build(config: Mapping[str, Any], max_steps: int) -> Schedule:
    """The multiplier of the peak rate as a function of the step.

    Args:
        config: ``name`` (linear, cosine, wsd, constant), ``warmup`` (fraction of the run below 1, or steps),
            ``min_ratio`` (where the multiplier ends, 0 to 1), ``decay`` (wsd only: the decaying end, fraction or
            steps).
        max_steps: optimizer steps of the whole run, at least 1.

    Returns:
        ``multiplier(step)``, step from 0, made for ``torch.optim.lr_scheduler.LambdaLR``.

    Raises:
        ConfigError: for an unknown schedule or field, a value out of range, or a warm-up longer than the run.
    """
    known = ("name", "warmup", "min_ratio", "decay")
    for key in config:
        if key not in known:
            raise ConfigError(f"schedule.{key}", config[key], one_of(key, known))
    name = str(config.get("name", "linear"))
    if name not in SHAPES:
        raise ConfigError("schedule.name", name, one_of(name, SHAPES))
    amounts = {
        key: check_value(key, config[key], field=f"schedule.{key}") if config.get(key) is not None else default
        for key, default in (("warmup", 0.0), ("min_ratio", 0.0), ("decay", 0.2))
    }
    warmup = steps_of(amounts["warmup"], max_steps)
    if warmup > max_steps:
        raise ConfigError("schedule.warmup", config["warmup"], f"at most the {max_steps} steps of the run")
    rest = max_steps - warmup
    decaying = min(rest, steps_of(amounts["decay"], max_steps)) if name == "wsd" else rest
    return _multiplier(SHAPES[name], warmup, max_steps, decaying, float(amounts["min_ratio"]))


def _multiplier(shape: Callable[[float], float], warmup: int, total: int, decaying: int, floor: float) -> Schedule:
    """A plain function and no object: LambdaLR would write an object's attributes into checkpoints and restore them."""

    def multiplier(step: int) -> float:
        done = min(step + 1, total + 1)
        if done <= warmup:
            return done / warmup
        into_decay = done - (total - decaying)
        x = max(0.0, into_decay / (decaying + 1)) if decaying else 0.0
        return floor + (1.0 - floor) * shape(x)

    return multiplier
