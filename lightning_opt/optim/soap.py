"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner.

For a matrix with gradient g, m and v zero at first, step t from 0, rate lr, decay wd:

    t = 0 only looks, the weight stays:  L = (1 - beta_s) g g^T,  R = (1 - beta_s) g^T g,  A, B = their eigenvectors
    t > 0:
    p <- p (1 - lr wd)                               decoupled decay
    h = A^T g B                                      the gradient in the eigenbases
    m <- beta1 m + (1 - beta1) h
    v <- beta2 v + (1 - beta2) h^2
    p <- p - lr sqrt(1 - beta2^t) / (1 - beta1^t) * A (m / (sqrt(v) + eps)) B^T
    L <- beta_s L + (1 - beta_s) g g^T,  R likewise with g^T g
    every f steps: A <- Q of QR(L A), the columns of A sorted by diag(A^T L A) first; v's rows go with them, m is
    turned into the new basis; B likewise

Vyas et al. 2024, "SOAP: Improving and Stabilizing Shampoo using Adam" (arXiv 2409.11321), Algorithms 3 and 4; details
from its repository (nikhilvyas/SOAP, a1e5535). Weights of more than two dimensions have one matrix per dimension; a
dimension longer than `max_precond_dim` (a vocabulary) has none. Vectors take Adam, with SOAP's eps and first look.
Stacks of expert matrices are treated matrix by matrix. Between two QRs a step costs
three pairs of matrix products (the repository's five).

What differs from the repository, and changes a trajectory by rounding only unless said: the decay comes before the
step (there after it: lr^2 wd apart); L, R, A and B are float32 whatever the gradient's dtype (there the gradient's;
float64 for float64 weights); the first eigenvectors of the longer side come from those of the shorter (g's own
singular vectors), the rest of that basis, on which the first gradient says nothing and LAPACK's choice is arbitrary,
is completed by a QR: cheaper than eigenvectors of the longer side, and that part is another arbitrary basis.

Options: `block_size` cuts dimensions that have a matrix into blocks, each with bases of its own (the optimizer study,
arXiv 2509.02046, took 256 and 512); `one_sided` gives only the shorter side of a matrix a
basis (the paper's section 7); `merge_dims` merges neighbouring dimensions while their product stays within
`max_precond_dim`; `normalize_grads` divides each step by its root mean square (for f near 100).

Tuning: a rate of 3e-3 is the paper's start, 4e-3 to 1.6e-2 the study's for 130M to 1.2B, warm-up 500 to 1000 steps;
betas (0.95, 0.95), or (0.95, 0.99) with `shampoo_beta` 0.9 to 0.98 as in the study. Decay 0.1. Away from its best, in
the study, twice the lr cost 0.007 nats on average and four times the batch 0.34.

Traps: 8 bytes per weight for m and v and 8 (m^2 + n^2) / (m n) for the matrices: 24 for a square one, 42 for 768 x
3072. Median step times hide the QR: report means over whole periods. m and v are kept in the eigenbases and mean
nothing without them. eps is added before v's bias correction, so it is 1 / sqrt(1 - beta2^t) of Adam's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_opt.kernels import Bucket, Rule, Step, wide, wide_dtype
from lightning_opt.optim.base import Optimizer
from lightning_opt.optim.blocks import Grid, Stack, along, fresh_factors, grid_of, is_stack, own_dims, stacks, unfolded
from lightning_opt.optim.triangular import average_gram_


class SOAP(Optimizer):
    """SOAP as a torch optimizer; see the module's text for the rule and how to tune it.

    Args:
        params: parameters, named parameters or parameter groups, as for any torch optimizer.
        lr: step size, typical 3e-3 to 1.6e-2.
        betas: decay of the first and second moment.
        shampoo_beta: decay of the matrices L and R; None: that of the second moment.
        eps: added to the root of the second moment.
        weight_decay: typical 0.1 for language models.
        precondition_frequency: steps between two QRs.
        max_precond_dim: longest dimension that gets a matrix.
        block_size: longest side of a block; None: matrices stay whole.
        merge_dims: neighbouring dimensions are merged while their product is at most `max_precond_dim`.
        one_sided: only the shortest dimension gets a matrix.
        precondition_1d: vectors get a matrix too.
        normalize_grads: each step is divided by its root mean square.
        correct_bias: the moments' bias is corrected.
        max_grad_norm, weight_decay_mode, state_dtype, implementation: see `Optimizer`; `state_dtype` is the first
            moment's, everything else is float32.
        **common: `state_rounding`, `weight_rounding` and what experts have of their own: see `Optimizer`.

    Raises:
        ConfigError: for a value out of range or an unknown hyperparameter.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        *,
        block_size: int | None = None,
        merge_dims: bool = False,
        one_sided: bool = False,
        precondition_1d: bool = False,
        normalize_grads: bool = False,
        correct_bias: bool = True,
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
            rule="soap",
            lr=lr,
            betas=betas,
            shampoo_beta=shampoo_beta,
            eps=eps,
            weight_decay=weight_decay,
            precondition_frequency=precondition_frequency,
            max_precond_dim=max_precond_dim,
            block_size=block_size,
            merge_dims=merge_dims,
            one_sided=one_sided,
            precondition_1d=precondition_1d,
            normalize_grads=normalize_grads,
            correct_bias=correct_bias,
            max_grad_norm=max_grad_norm,
            weight_decay_mode=weight_decay_mode,
            cautious=cautious,
            cautious_weight_decay=cautious_weight_decay,
            state_dtype=state_dtype,
            implementation=implementation,
            **common,
        )


def scalars(step: Step, group: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one step; `age` 0 is the look."""
    age = step.of("rotated_avg") - 1
    beta1, beta2 = group["betas"]
    shampoo = group["shampoo_beta"]
    correction = (1 - beta2**age) ** 0.5 / (1 - beta1**age) if age and group["correct_bias"] else 1.0
    return {
        "age": age,
        "rate": group["lr"] * correction,
        "new1": 1 - beta1,
        "new2": 1 - beta2,
        "new_gram": 1 - (beta2 if shampoo is None else shampoo),
        "eps": group["eps"],
    }


def grid(p: Tensor, group: Mapping[str, Any]) -> Grid:
    """How a weight is seen and cut, and which dimensions have a basis."""
    view, stacked, longest = list(p.shape) or [1], is_stack(p, group.get("role")), group["max_precond_dim"]
    if group["merge_dims"] and not stacked:
        view = _merged(view, longest)
    block = view[1:] if stacked else view
    factored = [length <= longest and (len(view) > 1 or group["precondition_1d"]) for length in block]
    if group["one_sided"] and len(block) > 1:
        shortest = block.index(min(block))
        factored = [marked and dim == shortest for dim, marked in enumerate(factored)]
    return grid_of(view, factored, group["block_size"], stacked=stacked)


def _merged(shape: list[int], most: int) -> list[int]:
    """Neighbouring dimensions multiplied, from the left, while the product is at most `most`."""
    view, length = [], 1
    for size in shape:
        if length * size <= most:
            length *= size
            continue
        if length > 1:
            view.append(length)
            length = size
        else:
            view.append(size)
    return [*view, length] if length > 1 or not view else view


def initial(p: Tensor, group: Mapping[str, Any], layout: Mapping[str, Any]) -> dict[str, Tensor]:
    """L, R, ... (`gram`) and their bases, zero at first, one matrix per block."""
    cut = grid(p, group)

    def matrices(count: int, dim: int, length: int) -> Tensor | None:
        return torch.zeros(count, length, length, dtype=wide_dtype(p), device=p.device) if cut.factored[dim] else None

    return fresh_factors(cut, "gram", matrices) | fresh_factors(cut, "basis", matrices)


def whole(bucket: Bucket) -> list[Tensor | None]:
    """The steps of all weights, None where this was only a look; states are written."""
    assert bucket.extra is not None
    steps = [torch.zeros_like(wide(g), memory_format=torch.contiguous_format) for g in bucket.grads]
    for stack in stacks([grid(p, bucket.options) for p in bucket.params]):
        g = stack.read(bucket.grads)
        grams, bases = (stack.factors(bucket.extra, name) for name in ("gram", "basis"))
        if bucket.scalars["age"]:
            stack.write(steps, _advance(stack, bucket, g, grams, bases))
        else:
            _average(grams, g, bucket.scalars["new_gram"])
            bases = _first_bases(g, grams)
        stack.write_factors(bucket.extra, "gram", grams)
        stack.write_factors(bucket.extra, "basis", bases)
    if bucket.scalars["age"] == 0:
        return [None] * len(steps)
    for step in steps:
        rms = 1.0
        if bucket.options["normalize_grads"]:
            rms = step.square().mean(own_dims(step, bucket.options.get("role")), keepdim=True).sqrt().add_(1e-30)
        step.mul_(bucket.scalars["rate"] / rms)
    return steps


def _advance(stack: Stack, bucket: Bucket, g: Tensor, grams: list[Tensor | None], bases: list[Tensor | None]) -> Tensor:
    """Adam in the bases, then the matrices and, every so often, the bases; returns the step for a rate of 1."""
    averages, squares = bucket.states
    numbers = bucket.scalars
    m, v = stack.read(averages), stack.read(squares)
    turned = _turned(g, bases)
    m.lerp_(turned, numbers["new1"])
    v.lerp_(turned.square(), numbers["new2"])
    step = _turned_back(m / v.sqrt().add_(numbers["eps"]), bases)
    _average(grams, g, numbers["new_gram"])
    if numbers["age"] % bucket.options["precondition_frequency"] == 0 and any(stack.factored):
        m = _turned_back(m, bases)
        for dim, (gram, basis) in enumerate(zip(grams, bases, strict=True)):
            if gram is not None and basis is not None:
                bases[dim], order = _next_basis(gram, basis)
                along_dim = [-1 if other == dim else 1 for other in range(v.ndim - 1)]
                v = torch.take_along_dim(v, order.reshape(len(v), *along_dim), 1 + dim)
        m = _turned(m, bases)
    stack.write(averages, m)
    stack.write(squares, v)
    return step


def _turned(x: Tensor, bases: list[Tensor | None]) -> Tensor:
    return along(x, lambda dim, rows: rows if bases[dim] is None else rows @ bases[dim])


def _turned_back(x: Tensor, bases: list[Tensor | None]) -> Tensor:
    return along(x, lambda dim, rows: rows if bases[dim] is None else rows @ bases[dim].mT)


def _average(grams: list[Tensor | None], g: Tensor, new: float) -> None:
    """L, R, ... move towards the gradient's products with itself."""
    for dim, gram in enumerate(grams):
        if gram is not None:
            average_gram_(gram, unfolded(g, dim), new)


def _first_bases(g: Tensor, grams: list[Tensor | None]) -> list[Tensor | None]:
    """Eigenvectors, largest first."""
    shapes = {gram.shape for gram in grams if gram is not None}
    if g.ndim != 3 or len(shapes) < 2:
        return [None if gram is None else _eigenvectors(gram) for gram in grams]
    short = int(g.shape[1] > g.shape[2])
    left = _eigenvectors(grams[short])
    # The singular vectors on the other side, of any length, and what is missing in their space.
    right = torch.linalg.qr(unfolded(g, 1 - short) @ left, mode="complete").Q
    return [right, left] if short else [left, right]


def _eigenvectors(gram: Tensor) -> Tensor:
    return torch.linalg.eigh(torch.nan_to_num(gram)).eigenvectors.flip(-1)


def _next_basis(gram: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the power iteration from a basis, and the order its columns were sorted into."""
    product = gram @ basis
    order = (basis * product).sum(dim=1).argsort(dim=-1, descending=True)
    return torch.linalg.qr(torch.take_along_dim(product, order.unsqueeze(1), 2)).Q, order


RULE = Rule(
    "soap",
    None,
    scalars,
    state=("rotated_avg", "rotated_avg_sq"),
    defaults={
        "betas": (0.95, 0.95),
        "shampoo_beta": None,
        "eps": 1e-8,
        "precondition_frequency": 10,
        "max_precond_dim": 10000,
        "block_size": None,
        "merge_dims": False,
        "one_sided": False,
        "precondition_1d": False,
        "normalize_grads": False,
        "correct_bias": True,
    },
    traffic=28,
    wide_state=("rotated_avg_sq",),
    whole=whole,
    initial=initial,
)
