"""Kron (PSGD): a preconditioner Q^T Q, one triangular factor per dimension, fitted so that it whitens the momentum.

For a matrix with gradient g, m zero at first, Q1 and Q2 the identity, step t from 1, rate lr, decay wd:

    p <- p (1 - lr wd)                               decoupled decay
    m <- beta1 m + (1 - beta1) g,   h = m / (1 - beta1^t)
    in some of the steps, with V standard normal and h' = h + sqrt(2^-23) mean|h| V:
        A = Q1 h' Q2^T,   B = Q1^-T V Q2^-1
        Q1 <- Q1 - mu triu(A A^T - B B^T) / |A A^T + B B^T| Q1     |.|: a cheap lower bound of the spectral norm
        Q2 <- Q2 - mu triu(A^T A - B^T B) / |A^T A + B^T B| Q2
    u = Q1^T Q1 h Q2^T Q2
    p <- p - lr u min(1, 1.1 / rms(u))

Xi-Lin Li 2015, "Preconditioned Stochastic Gradient Descent" (arXiv 1512.04202), and Li 2024 (arXiv 2402.11858): at the
fixed point E[A A^T] = E[B B^T], so Q^T Q is the inverse root of the momentum's second moment. The form is that of
evanatyourservice/kron_torch (884427c), the one in use; lixilinx/psgd_torch (a8616f1) calls it `EQ`. A dimension of
length 1 or above `max_size_triangular` (a vocabulary), and that of a vector, has a diagonal factor: a row q with
q <- q - mu (a - b) / max(a + b) q, where a and b are the diagonals of the products above.
Weights of more than two dimensions are seen as the squarest matrix that their neighbouring dimensions make; stacks of
expert matrices are treated matrix by matrix.

When Q is fitted: with probability 1 in the first `update_prob_flat_start` steps, then exp(-`update_prob_decay` n),
never below `preconditioner_update_probability`. No coin is thrown: Q is fitted in the steps where the sum of these
probabilities reaches the next whole number (kron_torch: 1 / probability steps after the last), which the step count
alone says. Every hundredth time the factors' sizes are balanced first. V comes from a generator made for the step,
seeded with a hash of (seed, step, region), so neither a resume nor the number of ranks nor others' random numbers
change a bit; weights of one shape are given the same V, and as their factors never meet none is fitted the worse for
it.

What differs from kron_torch: its schedule, counter and generator live outside of state_dict, so its resumed runs begin
with a new flat start; its noise in h' leaks into the momentum that is applied; it balances at random once in a hundred
times; it leaves vectors without decay (here the YAML does).

The study's version (levanter, arXiv 2509.02046): `block_size` 256, `normalize_grads` (each weight's gradient divided by
its norm, in place of clipping), `preconditioner_lr` 0.2, `update_prob_flat_start` 2000, probability 0.05 to 0.1.

Tuning: rate about a third of AdamW's (the study: 5e-4 to 2e-3 for 130M to 520M), decay 3 to 10 times AdamW's (0.5 to
0.7), beta1 0.9 to 0.95, warm-up 1000 steps.

Traps: 4 bytes per weight for m and 4 (m^2 + n^2) / (m n) for the factors: 12 for a square matrix, 21 for 768 x 3072. A
step that fits Q costs many times an ordinary one: report means over whole periods, not medians.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_opt.kernels import Bucket, Rule, Step, wide, wide_dtype
from lightning_opt.optim.base import Optimizer
from lightning_opt.optim.blocks import (
    Grid,
    Stack,
    along,
    factor_name,
    fresh_factors,
    grid_of,
    is_stack,
    own_dims,
    stacks,
    unfolded,
)
from lightning_opt.optim.triangular import gram, times_lower, times_upper, upper_times_upper

# The noise that keeps a momentum without rank from driving Q to infinity, as a share of its mean size.
_DAMPING = 2.0**-11.5
_BALANCE_EVERY = 100


class Kron(Optimizer):
    """Kron as a torch optimizer; see the module's text for the rule and how to tune it.

    Args:
        params: parameters, named parameters or parameter groups, as for any torch optimizer.
        lr: step size, typical 3e-4 to 2e-3.
        beta1: decay of the momentum.
        weight_decay: typical 0.3 to 1 for language models.
        preconditioner_lr: step size of the factors.
        preconditioner_init_scale: of Q at the start.
        preconditioner_update_probability: share of the steps that fit Q, in the end.
        update_prob_flat_start: so many steps all fit Q.
        update_prob_decay: then the probability falls as exp(-update_prob_decay n).
        max_size_triangular: longest dimension that gets a triangular factor.
        memory_save_mode: None, or ``one_diag`` (the longest dimension has a diagonal factor), ``smart_one_diag`` (where
            it is longer than the next) or ``all_diag``.
        block_size: longest side of a block; None: matrices stay whole.
        merge_dims: weights of more than two dimensions are seen as matrices.
        normalize_grads: each weight's gradient is divided by its norm.
        momentum_into_precond_update: Q is fitted to the momentum, else to the gradient.
        max_update_rms: largest root mean square of a step before the rate; None: any.
        seed: of the noise that Q is fitted with.
        max_grad_norm, weight_decay_mode, state_dtype, implementation: see `Optimizer`; `state_dtype` is the momentum's,
            the factors are float32.
        **common: `state_rounding`, `weight_rounding` and what experts have of their own: see `Optimizer`.

    Raises:
        ConfigError: for a value out of range or an unknown hyperparameter.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 3e-4,
        beta1: float = 0.9,
        weight_decay: float = 0.0,
        *,
        preconditioner_lr: float = 0.1,
        preconditioner_init_scale: float = 1.0,
        preconditioner_update_probability: float = 0.03,
        update_prob_flat_start: int = 500,
        update_prob_decay: float = 0.001,
        max_size_triangular: int = 8192,
        memory_save_mode: str | None = None,
        block_size: int | None = None,
        merge_dims: bool = True,
        normalize_grads: bool = False,
        momentum_into_precond_update: bool = True,
        max_update_rms: float | None = 1.1,
        seed: int = 0,
        max_grad_norm: float | None = None,
        weight_decay_mode: str = "decoupled",
        cautious: bool = False,
        cautious_weight_decay: bool = False,
        state_dtype: str = "float32",
        implementation: str = "auto",
        **common: Any,
    ) -> None:
        super().__init__(
            params,
            rule="kron",
            lr=lr,
            beta1=beta1,
            weight_decay=weight_decay,
            preconditioner_lr=preconditioner_lr,
            preconditioner_init_scale=preconditioner_init_scale,
            preconditioner_update_probability=preconditioner_update_probability,
            update_prob_flat_start=update_prob_flat_start,
            update_prob_decay=update_prob_decay,
            max_size_triangular=max_size_triangular,
            memory_save_mode=memory_save_mode,
            block_size=block_size,
            merge_dims=merge_dims,
            normalize_grads=normalize_grads,
            momentum_into_precond_update=momentum_into_precond_update,
            max_update_rms=max_update_rms,
            seed=seed,
            max_grad_norm=max_grad_norm,
            weight_decay_mode=weight_decay_mode,
            cautious=cautious,
            cautious_weight_decay=cautious_weight_decay,
            state_dtype=state_dtype,
            implementation=implementation,
            **common,
        )


def scalars(step: Step, group: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one step; `fit` and `balance` say what happens to Q."""
    age = step.of(factor_name("q", 0, 0))
    before, now = fits(age - 1, group), fits(age, group)
    return {
        "rate": group["lr"],
        "new1": 1 - group["beta1"],
        "correction": 1 / (1 - group["beta1"] ** step.of("exp_avg")),
        "fit": now > before,
        "balance": now > before and now % _BALANCE_EVERY == 0,
    }


def fits(steps: int, group: Mapping[str, Any]) -> int:
    """How often Q is fitted in that many steps: the sum of the probabilities, rounded down."""
    flat, fall, least = (
        group[key] for key in ("update_prob_flat_start", "update_prob_decay", "preconditioner_update_probability")
    )
    sure = min(steps, flat + 1)
    falling = min(steps - sure, math.floor(-math.log(least) / fall)) if least > 0 and fall > 0 else steps - sure
    total = sure + (math.exp(-fall) * math.expm1(-fall * falling) / math.expm1(-fall) if fall > 0 else falling)
    return math.floor(total + least * (steps - sure - falling) + 1e-9)  # 1/3 three times is a whole


def grid(p: Tensor, group: Mapping[str, Any]) -> Grid:
    """How a weight is seen and cut, and which dimensions have triangular factors."""
    view, stacked = list(p.shape) or [1], is_stack(p, group.get("role"))
    if len(view) > 2 and group["merge_dims"] and not stacked:
        splits = [(math.prod(view[:dim]), math.prod(view[dim:])) for dim in (len(view) - 1, 1)]
        view = list(min(splits, key=lambda pair: abs(pair[0] - pair[1])))
    block = view[1:] if stacked else view
    longest, mode = group["max_size_triangular"], group["memory_save_mode"]
    factored = [1 < length <= longest and len(block) > 1 and mode != "all_diag" for length in block]
    ranked = sorted(block)
    if mode == "one_diag" or (mode == "smart_one_diag" and ranked[-1:] != ranked[-2:-1]):
        for dim in [max(range(len(block)), key=lambda dim: (block[dim], dim))] if block else []:
            factored[dim] = False
    return grid_of(view, factored, group["block_size"], stacked=stacked)


def initial(p: Tensor, group: Mapping[str, Any], layout: Mapping[str, Any]) -> dict[str, Tensor]:
    """Factors `q`, one per dimension and block."""
    cut = grid(p, group)
    scale = group["preconditioner_init_scale"] ** (1 / max(1, len(cut.factored)))

    def factor(count: int, dim: int, length: int) -> Tensor:
        ones = torch.full((count, length), scale, dtype=wide_dtype(p), device=p.device)
        return torch.diag_embed(ones) if cut.factored[dim] else ones

    return fresh_factors(cut, "q", factor)


def noise(shape: Sequence[int], seed: int, step: int, region: int, device: torch.device) -> Tensor:
    """Standard normal blocks for a region of equal blocks; float32 in every case, so that all dtypes get the same."""
    digest = hashlib.blake2b(f"{seed} {step} {region}".encode(), digest_size=7).digest()
    holder = "cpu" if device.type == "meta" else device  # meta, where only shapes are counted, has none
    generator = torch.Generator(holder).manual_seed(int.from_bytes(digest, "big"))
    return torch.randn(tuple(shape), generator=generator, device=device)


def whole(bucket: Bucket) -> list[Tensor]:
    """The steps of all weights; states are written."""
    assert bucket.extra is not None
    (averages,), options, numbers = bucket.states, bucket.options, bucket.scalars
    steps = [torch.zeros_like(wide(g), memory_format=torch.contiguous_format) for g in bucket.grads]
    grads = [_normalised(g, options) for g in bucket.grads] if options["normalize_grads"] else bucket.grads
    for stack in stacks([grid(p, options) for p in bucket.params]):
        g, m = stack.read(grads), stack.read(averages)
        m.lerp_(g, numbers["new1"])
        h = m * numbers["correction"]
        factors = stack.factors(bucket.extra, "q")
        if numbers["fit"]:
            if numbers["balance"]:
                balance(factors)
            target = h if options["momentum_into_precond_update"] else g
            fit(factors, target, _drawn(stack, bucket, target), options["preconditioner_lr"])
            stack.write_factors(bucket.extra, "q", factors)
        stack.write(averages, m)
        stack.write(steps, preconditioned(factors, h))
    return [_limited(step, options).mul_(numbers["rate"]) for step in steps]


def preconditioned(factors: Sequence[Tensor], h: Tensor) -> Tensor:
    """``Q1^T Q1 h Q2^T Q2`` of blocks ``[number, *shape]``; factors ``[number, n, n]`` or diagonals ``[number, n]``."""

    def turn(dim: int, rows: Tensor) -> Tensor:
        q = factors[dim]
        return times_upper(times_lower(rows, q), q) if q.ndim == 3 else rows * q.square().unsqueeze(1)

    return along(h, turn)


def fit(factors: Sequence[Tensor], target: Tensor, v: Tensor, rate: float) -> None:
    """One update of the factors, in place, towards whitening `target` (blocks), with the standard normal `v`."""
    dims = tuple(range(1, target.ndim))
    size = target.abs().mean(dim=dims, keepdim=True) if dims else target.abs()
    a = along(
        target + _DAMPING * size * v,
        lambda dim, rows: times_lower(rows, q) if (q := factors[dim]).ndim == 3 else rows * q.unsqueeze(1),
    )
    b = along(v, lambda dim, rows: _without(factors[dim], rows))
    for dim, q in enumerate(factors):
        rows_a, rows_b = unfolded(a, dim), unfolded(b, dim)
        if q.ndim == 2:
            up, down = rows_a.square().sum(-1), rows_b.square().sum(-1)
            norm = (up + down).amax(dim=-1, keepdim=True)
            q.sub_(rate * (up - down) / _above_zero(norm) * q)
        else:
            up, down = gram(rows_a), gram(rows_b)
            norm = _above_zero(_size_of(up + down))
            q.sub_(upper_times_upper((up - down).triu_().mul_(rate / norm[:, None, None]), q))


def balance(factors: Sequence[Tensor]) -> None:
    """Makes the largest elements of a block's factors equally large, in place; their product stays."""
    if len(factors) > 1:
        sizes = torch.stack([q.flatten(1).abs().amax(dim=1) for q in factors])
        for q, change in zip(factors, sizes.log().mean(dim=0).exp() / sizes, strict=True):
            q.mul_(change.reshape(-1, *[1] * (q.ndim - 1)))


def _without(q: Tensor, rows: Tensor) -> Tensor:
    """The rows times the inverse of a factor."""
    return torch.linalg.solve_triangular(q, rows, upper=True, left=False) if q.ndim == 3 else rows / q.unsqueeze(1)


def _size_of(a: Tensor) -> Tensor:
    """A lower bound of the spectral norms of symmetric matrices: two power steps from the largest column."""
    largest = _above_zero(a.flatten(1).abs().amax(dim=1))
    a = a / largest[:, None, None]
    start = a.square().sum(dim=1).argmax(dim=1)
    x = torch.take_along_dim(a, start[:, None, None], 2)
    x = a @ x
    x = x / _above_zero(torch.linalg.vector_norm(x, dim=1, keepdim=True))
    return torch.linalg.vector_norm(a @ x, dim=(1, 2)) * largest


def _above_zero(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny)


def _drawn(stack: Stack, bucket: Bucket, like: Tensor) -> Tensor:
    """The stack's noise; equal regions of different weights get the same."""
    drawn: dict[int, Tensor] = {}
    for _, number, region in stack.members:
        if number not in drawn:
            shape = (region.number, *region.shape)
            drawn[number] = noise(shape, bucket.options["seed"], bucket.step, number, like.device).to(like.dtype)
    return torch.cat([drawn[number] for _, number, _ in stack.members])


def _normalised(g: Tensor, options: Mapping[str, Any]) -> Tensor:
    """A gradient divided by its norm, each matrix of a stack by its own."""
    g = wide(g)
    return g / (torch.linalg.vector_norm(g, dim=own_dims(g, options.get("role")), keepdim=True) + 1e-16)


def _limited(step: Tensor, options: Mapping[str, Any]) -> Tensor:
    """A step with at most the largest root mean square, each matrix of a stack by itself."""
    most = options["max_update_rms"]
    if most is None or step.numel() == 0:
        return step
    rms = step.square().mean(dim=own_dims(step, options.get("role")), keepdim=True).sqrt()
    return step * (most / (rms + 1e-12)).clamp(max=1.0)


RULE = Rule(
    "kron",
    None,
    scalars,
    state=("exp_avg",),
    defaults={
        "beta1": 0.9,
        "preconditioner_lr": 0.1,
        "preconditioner_init_scale": 1.0,
        "preconditioner_update_probability": 0.03,
        "update_prob_flat_start": 500,
        "update_prob_decay": 0.001,
        "max_size_triangular": 8192,
        "memory_save_mode": None,
        "block_size": None,
        "merge_dims": True,
        "normalize_grads": False,
        "momentum_into_precond_update": True,
        "max_update_rms": 1.1,
        "seed": 0,
    },
    traffic=20,
    whole=whole,
    initial=initial,
)
