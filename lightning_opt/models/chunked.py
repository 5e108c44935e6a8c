"""Cross-entropy of a linear head, a few rows of logits at a time, so that a large vocabulary costs little memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_opt.kernels import can_compile

log = logging.getLogger("lightning_opt.models")

IGNORE = -100
"""Label of a position that does not count."""

# Logits held at once, by what was measured: see benchmarks/results. A GPU's matrix product needs more rows to be fast.
CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**30}
WORTH_COMPILING = 2**26  # logits of one chunk on a GPU, where compiling takes some seconds once
_can_compile = True  # until it fails


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, z_loss: float = 0.0, rows: int | None = None
) -> Tensor:
    """Mean cross-entropy of ``softmax(hidden @ weight.T + bias)``, whose logits never exist as a whole.

    The gradient is computed beside the loss, chunk by chunk (as Liger does, arXiv:2410.10989, section 3.2): one matrix
    product fewer than computing the logits again in the backward pass, for memory that the gradient needs anyhow.
    It cannot be differentiated again. Rounds as `F.linear` does under autocast, with sums in float32 (float64 for
    float64). On a CPU a chunk's share of a bfloat16 weight gradient is rounded to bfloat16 before it joins its sum, and
    float32 logits that fit into one chunk are computed as ever: there is nothing to save.

    Args:
        hidden: (N, h), the head's input.
        weight: (V, h).
        bias: (V,) or None.
        targets: int64 (N,); -100 does not count.
        z_loss: weight of the mean squared log-partition (PaLM, arXiv:2204.02311, section 5: 1e-4).
        rows: rows of logits at a time; None = as many as fit into ``CHUNK_BYTES``.

    Returns:
        Two values: objective (cross-entropy plus z-loss), and cross-entropy in nats, through which no gradient flows.
        Both are 0 where nothing counts.
    """
    kind, lower = hidden.device.type, _product_dtype(hidden)
    if rows is None:
        fitting = max(1, CHUNK_BYTES.get(kind, 2**30) // (4 * weight.shape[0]))
        rows = fitting - fitting % 256 or fitting  # tensor cores want round numbers, and batches are made of them
    if kind == "cpu" and len(targets) <= rows and lower in (torch.float32, torch.float64):
        total, nll = logits_cross_entropy(F.linear(hidden, weight, bias), targets, z_loss)
        return torch.stack([total, nll.detach()])
    wanted = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, z_loss, lower, rows, wanted)


def can_be_chunked(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `linear_cross_entropy` serves: not for float16, whose gradients need the loss scale, nor for DTensors."""
    return _product_dtype(hidden) != torch.float16 and not hasattr(weight, "device_mesh")


def logits_cross_entropy(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Objective and cross-entropy, as `linear_cross_entropy` gives them, from all logits (N, V) at once."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = (targets != IGNORE).to(logits.dtype)
    share = counted / counted.sum().clamp(min=1)
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none").mul(share).sum()
    if not z_loss:
        return nll, nll
    return nll + z_loss * torch.logsumexp(logits, dim=-1).square().mul(share).sum(), nll


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """What `F.linear` would compute in."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        z_loss: float,
        lower: torch.dtype,
        rows: int,
        wanted: bool,
    ) -> Tensor:
        given = (hidden, weight, bias)
        ctx.dtypes = [None if part is None else part.dtype for part in given]
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, weight, bias = (None if part is None else part.to(lower) for part in given)
            full = torch.float64 if lower == torch.float64 else torch.float32
            grads = [
                torch.zeros_like(part, dtype=full if place else lower) if wanted and needed else None
                for place, (part, needed) in enumerate(zip((hidden, weight, bias), ctx.needs_input_grad, strict=False))
            ]
            share = (targets != IGNORE).to(full)
            share /= share.sum().clamp(min=1)
            sums = torch.zeros(2, dtype=full, device=hidden.device)
            for chunk in torch.arange(len(targets)).split(rows):
                part = slice(int(chunk[0]), int(chunk[-1]) + 1)
                sums += _chunk(hidden, weight, bias, targets, share, z_loss, grads, part)
        ctx.save_for_backward(*grads)
        return torch.stack([sums[0] + z_loss * sums[1], sums[0]])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        keep = torch._C._autograd._get_current_graph_task_keep_graph()  # retain_graph: then they are needed again
        scaled = [
            None if part is None else (part * grad[0] if keep else part.mul_(grad[0])).to(dtype)
            for part, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, *[None] * 5)


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    share: Tensor,
    z_loss: float,
    grads: list[Tensor | None],
    part: slice,
) -> Tensor:
    """Sums of cross-entropy and squared log-partition over the rows ``part``; adds their gradients to ``grads``."""
    rows = hidden[part]
    logits = F.linear(rows, weight, bias)
    wanted = any(grad is not None for grad in grads)
    slopes = _slopes_compiled if wanted and logits.is_cuda and logits.numel() >= WORTH_COMPILING else _slopes
    sums = slopes(logits, targets[part, None].clamp(min=0), share[part, None], z_loss, wanted)
    if wanted:
        of_hidden, of_weight, of_bias = grads
        if of_hidden is not None:
            torch.mm(logits, weight, out=of_hidden[part])
        if of_weight is not None:
            _add_product(of_weight, logits.T, rows)
        if of_bias is not None:
            of_bias += logits.sum(0, dtype=of_bias.dtype)
    return sums


def _slopes(logits: Tensor, target: Tensor, share: Tensor, z_loss: float, wanted: bool) -> Tensor:
    """The sums of `_chunk` for logits (n, V), targets and shares (n, 1); where wanted, logits become their gradient."""
    log_p = torch.log_softmax(logits, -1, dtype=share.dtype)
    right = log_p.gather(1, target)
    log_partition = logits.gather(1, target) - right
    sums = torch.stack([-(share * right).sum(), (share * log_partition.square()).sum()])
    if wanted:
        slope = share * (1 + 2 * z_loss * log_partition)  # of the log-partition; the right logit's own is -share
        at_target = right.exp() * slope - share
        torch.mul(log_p.exp_(), slope, out=logits)
        logits.scatter_(1, target, at_target.to(logits.dtype))
    return sums


def _slopes_compiled(*arguments: Any) -> Tensor:
    """`_slopes` with a third of its memory traffic; as it is where that cannot be compiled here."""
    global _can_compile
    if _can_compile and can_compile("cuda")[0]:
        try:
            return _graph()(*arguments)
        except torch._dynamo.exc.BackendCompilerFailed as error:  # before anything was written
            _can_compile = False
            log.warning("compiling the loss failed, it runs eager instead: %s", str(error).splitlines()[0])
    return _slopes(*arguments)


@cache
def _graph() -> Callable[..., Tensor]:
    return torch.compile(_slopes, dynamic=False)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, summed in the precision of ``total``; on a CPU the product is rounded to its own."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    elif not total.is_cuda:
        total += left @ right
    elif _adds_in_place(total.dtype, right.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(left, right, out_dtype=total.dtype)


@cache
def _adds_in_place(total: torch.dtype, factors: torch.dtype) -> bool:
    """Whether this torch adds a low-precision product to a float32 matrix on CUDA; older ones want one type for all."""
    matrix = torch.zeros(16, 16, device="cuda", dtype=factors)
    held = matrix.to(total)
    try:
        torch.addmm(held, matrix, matrix, out_dtype=total, out=held)
    except RuntimeError:
        return False
    return True
