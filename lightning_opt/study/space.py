"""Where a search may go: hyperparameters and their values, what lies beside a configuration, which two are the same.

The neighbours of a configuration differ from it in one value ("Fantastic Pretraining Optimizers", arXiv 2509.02046,
phase I).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from lightning_opt.plan import ConfigError

if TYPE_CHECKING:
    from lightning_opt.study.results import Config

SAME_DIGITS = 12  # of a number, for two to be the same value
_SHOWN_DIGITS = 14  # so that 0.008 / 2 * 2 is written 0.008


@dataclass(frozen=True)
class Axis:
    """A hyperparameter with a list of values.

    Attributes:
        name: of the hyperparameter.
        values: what it may be, in order; without repeats.
        reach: how far along the list a neighbour may lie; None: every other value is a neighbour, as in the study.

    Raises:
        ConfigError: no values, one value twice, or a reach below 1.
    """

    name: str
    values: tuple[Any, ...]
    reach: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        if not self.values:
            raise ConfigError(self.name, list(self.values), "must have a value at least")
        if len({canonical(value) for value in self.values}) < len(self.values):
            raise ConfigError(self.name, list(self.values), "must list each value once")
        if self.reach is not None and self.reach < 1:
            raise ConfigError(f"{self.name}.reach", self.reach, "must be a whole number >= 1, or null for every value")

    def around(self, value: Any) -> list[Any]:
        """The values beside this one, which need not be in the list itself."""
        others = [other for other in self.values if canonical(other) != canonical(value)]
        if self.reach is None:
            return others
        places = [place for place, other in enumerate(self.values) if canonical(other) == canonical(value)]
        if places:
            first = max(0, places[0] - self.reach)
            near = self.values[first : places[0] + self.reach + 1]
            return [other for other in near if canonical(other) != canonical(value)]
        if not all(_is_number(other) for other in (*others, value)):
            return others
        below = sorted(other for other in others if other < value)[-self.reach :]
        return below + sorted(other for other in others if other > value)[: self.reach]


@dataclass(frozen=True)
class Ladder:
    """A positive hyperparameter in steps of one factor; its neighbours are one step up and one step down.

    Attributes:
        name: of the hyperparameter.
        factor: of one step, > 1.
        low: smallest value.
        high: largest value.

    Raises:
        ConfigError: the factor or the limits are not such.
    """

    name: str
    factor: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 1):
            raise ConfigError(f"{self.name}.factor", self.factor, "must be a number > 1")
        if not (0 < self.low <= self.high < math.inf):
            raise ConfigError(f"{self.name}.low", self.low, f"must be > 0 and at most high, {self.high}")

    def around(self, value: Any) -> list[Any]:
        """The steps down and up that stay within the limits; a whole number's are whole."""
        found = [self._step(value, value / self.factor), self._step(value, value * self.factor)]
        return [other for other in found if self._inside(other) and canonical(other) != canonical(value)]

    @staticmethod
    def _step(value: Any, other: float) -> float:
        return round(other) if isinstance(value, Integral) else float(f"{other:.{_SHOWN_DIGITS}g}")

    def _inside(self, value: float) -> bool:
        slack = 10.0**-SAME_DIGITS
        return self.low * (1 - slack) <= value <= self.high * (1 + slack)


def nothing_refused(config: Config) -> str | None:
    """Every configuration is allowed."""
    return None


@dataclass(frozen=True)
class Space:
    """All configurations a search may try.

    Attributes:
        axes: the hyperparameters, in the order in which a descent tries them.
        refused: why a configuration makes no sense (a warm-up longer than the run, say); None where it does.

    Raises:
        ConfigError: one hyperparameter twice.
    """

    axes: tuple[Axis | Ladder, ...]
    refused: Callable[[Config], str | None] = nothing_refused

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", tuple(self.axes))
        names = [axis.name for axis in self.axes]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(name, names.count(name), "must be an axis once")

    def neighbours(self, config: Config, axis_name: str) -> list[dict[str, Any]]:
        """The configurations that differ from this one along one axis alone, those that make no sense left out.

        Args:
            config: hyperparameter to value.
            axis_name: which to change; the configuration must have it.

        Returns:
            New dictionaries, in the order of the axis.
        """
        (axis,) = [axis for axis in self.axes if axis.name == axis_name]
        changed = [dict(config) | {axis_name: value} for value in axis.around(config[axis_name])]
        return [other for other in changed if self.refused(other) is None]

    def around(self, config: Config) -> list[dict[str, Any]]:
        """The neighbours along every axis, in the order of the axes."""
        return [other for axis in self.axes for other in self.neighbours(config, axis.name)]

    def identity(self, config: Config) -> str:
        """The same text for the same configuration: 1 and 1.0 are equal, numbers to 12 digits, keys in any order."""
        return identity(config)


def identity(config: Config) -> str:
    """The same text for the same configuration: 1 and 1.0 are equal, numbers to 12 digits, keys in any order."""
    return ", ".join(f"{key}={canonical(config[key])}" for key in sorted(config))


def canonical(value: Any) -> str:
    """The same text for the same value, whatever type it came in."""
    if _is_number(value):
        return repr(float(f"{float(value):.{SAME_DIGITS}g}") + 0.0)  # + 0.0: minus nought is nought
    if isinstance(value, Mapping):
        return "{" + identity(value) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(canonical(item) for item in value) + "]"
    return repr(value)


def changed_axes(before: Config, after: Config) -> Iterator[str]:
    """The hyperparameters in which two configurations differ."""
    for key in after:
        if key not in before or canonical(before[key]) != canonical(after[key]):
            yield key


def steps_of(tokens: float, batch: float, sequence_length: int) -> int:
    """Optimizer steps of a run: a change of batch keeps the tokens, so the steps follow it (arXiv 2509.02046).

    Args:
        tokens: of the whole run.
        batch: sequences per step.
        sequence_length: tokens per sequence.
    """
    return int(tokens // (batch * sequence_length))


def warmup_too_long(
    tokens: float, sequence_length: int, *, warmup: str = "warmup", batch: str = "train_batch_size"
) -> Callable[[Config], str | None]:
    """A `Space.refused`: the warm-up must fit into the steps that the batch size leaves of the tokens.

    Args:
        tokens: of the whole run.
        sequence_length: tokens per sequence.
        warmup: the hyperparameter's name; in steps, or as a fraction of the run below 1, which always fits.
        batch: the name of the batch size, in sequences.
    """

    def refused(config: Config) -> str | None:
        steps = steps_of(tokens, config[batch], sequence_length)
        if config[warmup] < 1 or config[warmup] <= steps:
            return None
        return f"a warm-up of {config[warmup]} steps is longer than the run of {steps}"

    return refused


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
