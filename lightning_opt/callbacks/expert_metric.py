"""How evenly tokens are spread over experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_opt.anatomy import find_expert_layers

OVER_LAYERS = {
    "cv": "mean",
    "max_violation": "mean",
    "share_max": "max",
    "coldest": "min",
    "dead": "sum",
    "entropy": "mean",
    "jain": "mean",
    "noise_floor": "mean",
}
"""The measures of `load_measures`, and what says most about all layers together."""


def load_measures(counts: Tensor, top_k: int | None = None) -> dict[str, Tensor]:
    """Measures of one layer's load.

    A layer that no token came to has none: all are not a number, ``dead`` too.

    Args:
        counts: (..., E) tokens per expert.
        top_k: experts per token; None counts as 1.

    Returns:
        By name, float64 (...):

        - ``cv``: standard deviation (of the population) over mean: 0 = even, at most sqrt(E / k - 1)
        - ``max_violation``: (largest - mean) / mean (arXiv 2408.15664, equation 4)
        - ``share_max``: the largest expert's share of all
        - ``coldest``: smallest over mean
        - ``dead``: experts without a token
        - ``entropy``: exp(H) / E with H in nats: as many experts' worth of use, of E
        - ``jain``: Jain's index, 1 / (1 + cv^2)
        - ``noise_floor``: the cv that chance alone gives to perfectly even routing, sqrt((E - k) / sum)
    """
    loads = counts.double()
    experts, total = loads.shape[-1], loads.sum(-1)
    mean = total / experts
    shares = loads / total[..., None]
    cv = loads.std(-1, correction=0) / mean
    entropy = torch.special.entr(shares).sum(-1)
    dead = (loads == 0).sum(-1)
    return {
        "cv": cv,
        "max_violation": loads.amax(-1) / mean - 1,
        "share_max": shares.amax(-1),
        "coldest": loads.amin(-1) / mean,
        "dead": torch.where(total > 0, dead, torch.nan),
        "entropy": entropy.exp() / experts,
        "jain": 1 / (1 + cv.square()),
        "noise_floor": torch.where(total > 0, ((experts - (top_k or 1)) / total).sqrt(), torch.nan),
    }


def over_layers(measures: dict[str, Tensor]) -> dict[str, Tensor]:
    """One figure for all layers that had tokens, by `OVER_LAYERS`, and ``cv_worst``, the largest of a layer.

    Args:
        measures: name to (layers,).
    """
    had = ~measures["cv"].isnan()
    if not had.any():
        return {name: torch.tensor(torch.nan) for name in (*OVER_LAYERS, "cv_worst")}
    found = {name: getattr(measures[name][had], how)() for name, how in OVER_LAYERS.items()}
    return found | {"cv_worst": measures["cv"][had].max()}


class ExpertLoad(Metric):
    """Expert load as a metric: sums counts over updates and processes, measures when asked.

    Args:
        experts: number of experts of each layer.
        top_k: experts per token of each layer.
        **kwargs: of `torchmetrics.Metric`.

    Attributes:
        counts: int64 (layers, E), E the largest; places beyond a layer's experts stay 0.
    """

    higher_is_better = False
    full_state_update = False
    counts: Tensor

    def __init__(self, experts: Sequence[int], top_k: Sequence[int | None] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.experts = list(experts)
        self.top_k = list(top_k) if top_k is not None else [None] * len(self.experts)
        empty = torch.zeros(len(self.experts), max(self.experts, default=0), dtype=torch.int64)
        self.add_state("counts", empty, dist_reduce_fx="sum")

    @classmethod
    def of(cls, model: nn.Module, **kwargs: Any) -> ExpertLoad:
        """For the layers of a model, as `ExpertTraffic` counts them."""
        layers = find_expert_layers(model)
        return cls([layer.count for layer in layers], [layer.top_k for layer in layers], **kwargs)

    def update(self, counts: Tensor | Sequence[Tensor]) -> None:
        """Adds tokens per expert: (layers, E), or one (E,) for each layer."""
        for own, new in zip(self.counts, counts, strict=True):
            own[: len(new)] += new.to(own.device)

    def compute(self) -> dict[str, Tensor]:
        """`measures` of all updates and processes; of one layer alone torchmetrics makes scalars."""
        return self.measures()

    def measures(self) -> dict[str, Tensor]:
        """What `load_measures` says of each layer's counts in this process: name to (layers,)."""
        rows = zip(self.counts, self.experts, self.top_k, strict=True)
        each = [load_measures(counts[:size], top_k) for counts, size, top_k in rows]
        return {name: torch.stack([measures[name] for measures in each]) for name in OVER_LAYERS} if each else {}
