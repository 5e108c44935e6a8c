"""The training loss of a causal language model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORE = -100
"""Label of a position that does not count."""


class Loss(NamedTuple):
    """What is minimised, and what is reported.

    Attributes:
        total: the objective: cross-entropy plus the z-loss; a float32 scalar with a gradient.
        nll: mean negative log-likelihood in nats per counted token, without a gradient.
    """

    total: Tensor
    nll: Tensor


def causal_lm_loss(model: nn.Module, input_ids: Tensor, labels: Tensor, z_loss: float = 0.0) -> Loss:
    """Mean cross-entropy of next tokens.

    Args:
        model: a causal language model whose forward returns ``logits`` (B, T, V).
        input_ids: int64 (B, T).
        labels: int64 (B, T), already shifted: ``labels[:, t]`` is the token after ``input_ids[:, t]``; -100 does not
            count.
        z_loss: weight of the mean squared log-partition, which keeps logits from drifting (PaLM, arXiv 2204.02311,
            section 5: 1e-4).

    Returns:
        The loss, computed in float32 whatever the model's precision.
    """
    logits = model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1).float()
    targets = labels.flatten()
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORE)
    if not z_loss:
        return Loss(nll, nll.detach())
    counted = (targets != IGNORE).float()
    log_partition = torch.logsumexp(logits, dim=-1)
    penalty = (log_partition.square() * counted).sum() / counted.sum().clamp(min=1)
    return Loss(nll + z_loss * penalty, nll.detach())
