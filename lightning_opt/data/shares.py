"""The shares that a configuration gives each corpus: over the whole run, and in each of its phases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_opt.data.text_files import check_weights
from lightning_opt.plan import data_phases


class CorpusShares(NamedTuple):
    """Corpus -> share, each map adding up to 1.

    Attributes:
        base: of ``data.weights``: what a corpus counts in ``val/loss``, and how much of it a tokenizer is trained on.
        phases: of the training windows in each phase of the run; ``[base]`` where it has but one.
    """

    base: dict[str, float]
    phases: list[dict[str, float]]


def corpus_shares(config: Mapping[str, Any], names: list[str]) -> CorpusShares:
    """Reads ``data.weights`` and the weights of ``data.phases``.

    Args:
        config: ``config["data"]``.
        names: the corpora there are training tokens of.

    Raises:
        ConfigError: as `check_weights` and `data_phases`.
    """
    base = check_weights(config.get("weights"), names)
    phases = [
        base if phase.weights is None else check_weights(phase.weights, names, field_name=phase.field)
        for phase in data_phases(config)
    ]
    return CorpusShares(base, phases or [base])
