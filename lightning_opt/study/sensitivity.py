"""Which hyperparameters must be tuned again for every setting, and which keep one value.

A configuration is near-best where its loss is within a threshold of its setting's lowest. A hyperparameter is
insensitive if one of its values is in a near-best configuration of every setting; else it is sensitive, and the
fewest values that serve every setting are its reduced grid (arXiv 2509.02046, phase II).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_opt.study.results import Cell, Config, Results, recorded_change
from lightning_opt.study.space import canonical

NEAR = 6.4e-3
"""The study's threshold, nats per token; its code was seen with 7e-3."""

Trials = Sequence[tuple[Config, float]]
"""Configurations that were run in a setting, each with its final loss; one that diverged has an infinite loss."""


@dataclass(frozen=True)
class NearBest:
    """What is as good as the best in one setting.

    Attributes:
        lowest: lowest loss of the setting, nats per token.
        configs: the near-best configurations with their losses, best first.
    """

    lowest: float
    configs: tuple[tuple[Config, float], ...]

    def values(self, name: str) -> tuple[Any, ...]:
        """The values of a hyperparameter in near-best configurations, that of the best first."""
        found: dict[str, Any] = {}
        for config, _ in self.configs:
            if name in config:
                found.setdefault(canonical(config[name]), config[name])
        return tuple(found.values())


@dataclass(frozen=True)
class Sensitivity:
    """What the near-best sets of several settings say of one optimizer.

    Attributes:
        insensitive: hyperparameter to the values that are near-best in every setting, of which one is enough.
        sensitive: hyperparameter to the fewest values that serve every setting: its reduced grid.
        near: setting to its near-best configurations.
        threshold: of the near-best sets, nats per token.
    """

    insensitive: dict[str, tuple[Any, ...]]
    sensitive: dict[str, tuple[Any, ...]]
    near: dict[Hashable, NearBest]
    threshold: float

    def reduced(self, best: Config) -> dict[str, tuple[Any, ...]]:
        """The grid for the next phase: sensitive hyperparameters with their values, the others with one.

        Args:
            best: a configuration whose values are taken where they serve everywhere.
        """
        kept = {
            name: (best[name] if _in(best.get(name), values) else values[0],)
            for name, values in self.insensitive.items()
        }
        return {**kept, **self.sensitive}


def near_best(trials: Trials, threshold: float = NEAR, lowest: float | None = None) -> NearBest:
    """The configurations within a threshold of the lowest loss.

    Args:
        trials: what was run.
        threshold: nats per token.
        lowest: lowest loss of the setting, where a run that is not among the trials has it.
    """
    finite = [(config, loss) for config, loss in trials if math.isfinite(loss)]
    best = min((loss for _, loss in finite), default=math.inf) if lowest is None else lowest
    found = sorted((trial for trial in finite if trial[1] <= best + threshold), key=lambda trial: trial[1])
    return NearBest(best, tuple(found))


def sensitivity(
    settings: Mapping[Hashable, Trials],
    threshold: float = NEAR,
    lowest: Mapping[Hashable, float] | None = None,
) -> Sensitivity:
    """Sorts an optimizer's hyperparameters into insensitive and sensitive ones.

    Args:
        settings: what was run in each setting of the first phase: a model and a ratio of data.
        threshold: of the near-best sets, nats per token.
        lowest: lowest loss of a setting, where a run that is not among its trials has it.
    """
    near = {setting: near_best(trials, threshold, (lowest or {}).get(setting)) for setting, trials in settings.items()}
    near = {setting: found for setting, found in near.items() if found.configs}
    names = dict.fromkeys(name for found in near.values() for config, _ in found.configs for name in config)
    insensitive: dict[str, tuple[Any, ...]] = {}
    sensitive: dict[str, tuple[Any, ...]] = {}
    for name in names:
        sets = [values for found in near.values() if (values := found.values(name))]
        shared = tuple(value for value in sets[0] if all(_in(value, values) for values in sets[1:]))
        if shared:
            insensitive[name] = shared
        else:
            sensitive[name] = covering(sets)
    return Sensitivity(insensitive, sensitive, near, threshold)


def covering(sets: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    """The fewest values of which every set holds one; of equally few, those that most sets hold. In order of size."""
    every = {canonical(value): value for values in sets for value in values}
    held = [{canonical(value) for value in values} for values in sets]
    for count in range(1, len(every) + 1):
        able = [chosen for chosen in itertools.combinations(every, count) if all(inner & {*chosen} for inner in held)]
        if able:
            best = max(able, key=lambda chosen: sum(value in inner for inner in held for value in chosen))
            return tuple(sorted((every[value] for value in best), key=_order))
    return ()


def recorded_trials(results: Results, cell: Cell, best: Config) -> list[tuple[Config, float]]:
    """The recorded runs of a cell as configurations with their losses: the best one and its one-value changes.

    Args:
        results: with `tuning`.
        cell: of which.
        best: the configuration that was changed, which the table does not hold.
    """
    found: list[tuple[Config, float]] = []
    for change, loss in results.tuning.get(cell, {}).items():
        if change == "best_config":
            found.append((dict(best), loss))
        else:
            name, value = recorded_change(change)
            found.append(({**best, name: value}, loss))
    return found


def _in(value: Any, values: Iterable[Any]) -> bool:
    return any(canonical(value) == canonical(other) for other in values)


def _order(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, str(value)
