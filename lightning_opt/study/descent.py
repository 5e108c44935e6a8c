"""Coordinate descent by ask and tell: what to run next follows from what was told, in whatever order it was told.

Method: phase I of "Fantastic Pretraining Optimizers" (arXiv 2509.02046): sweep one hyperparameter at a time around the
incumbent, accept a value that gains more than a threshold, until every neighbour of some near-best configuration is
known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_opt.plan import ConfigError
from lightning_opt.study.space import Space, changed_axes, identity

if TYPE_CHECKING:
    from lightning_opt.study.results import Config

THRESHOLD = 3e-3  # nats per token: the study's; smaller gains may be noise


class Step(NamedTuple):
    """An accepted change.

    Attributes:
        axis: the hyperparameter that changed; several joined by a comma where a better configuration was told that
            lies further off.
        before: the configuration it left.
        after: the configuration it took.
        gain: by how much the loss fell; infinite where the one before had diverged.
    """

    axis: str
    before: dict[str, Any]
    after: dict[str, Any]
    gain: float


@dataclass
class _View:
    """What follows from the results so far; configurations by their `space.identity`."""

    incumbent: str
    asked: list[str] = field(default_factory=list)
    accepted: list[Step] = field(default_factory=list)
    stood_at: set[str] = field(default_factory=set)


class Descent:
    """A coordinate descent; a pure function of what it was told, so resuming is telling again.

    Args:
        space: the hyperparameters, in the order in which they are tried, and their neighbours.
        start: the first configuration; what it holds beside the axes stays as it is.
        threshold: a value is accepted where it lowers the loss by more than this.
        near: configurations at most so far above the lowest loss are near-best; None: the threshold.
        switch_saves: goes on from another near-best configuration where that saves at least so many runs.

    Raises:
        ConfigError: the start lacks an axis or is refused by the space, or a number is not >= 0.
    """

    def __init__(
        self,
        space: Space,
        start: Config,
        *,
        threshold: float = THRESHOLD,
        near: float | None = None,
        switch_saves: int = 10,
    ) -> None:
        near = threshold if near is None else near
        for name, value in {"threshold": threshold, "near": near}.items():
            if not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise ConfigError(name, value, "must be a number >= 0")
        if switch_saves < 1:
            raise ConfigError("switch_saves", switch_saves, "must be a whole number >= 1")
        for axis in space.axes:
            if axis.name not in start:
                raise ConfigError(axis.name, None, f"must have a value to start from; there are {', '.join(start)}")
        if why := space.refused(start):
            raise ConfigError("start", identity(start), why)
        self.space, self.start = space, dict(start)
        self.threshold, self.near, self.switch_saves = threshold, near, switch_saves
        self._configs: dict[str, dict[str, Any]] = {}
        self._losses: dict[str, float | None] = {}
        self._neighbours: dict[str, list[list[str]]] = {}
        self._seen: _View | None = None

    def ask(self) -> list[dict[str, Any]]:
        """What to run now: the configurations along the current axis that nobody told of; none where it is done.

        They can run side by side. Asked again before anything is told, the answer is the same.
        """
        return [dict(self._configs[key]) for key in self._view.asked]

    def tell(self, config: Config, loss: float | None) -> None:
        """Adds a result; the descent need not have asked for it.

        Args:
            config: with the same keys as the start.
            loss: infinite or not a number where the run diverged, which is a result; None where it cannot be had
                (it failed for good, or a record lacks it). A number replaces a None.

        Raises:
            ValueError: other keys than the start's, or another number than it was told before.
        """
        if config.keys() != self.start.keys():
            raise ValueError(f"{dict(config)} must have the keys of the start: {', '.join(self.start)}")
        key = identity(config)
        number = None if loss is None else float(loss) if math.isfinite(loss) else math.inf
        known = self._losses.get(key)
        if known is not None and number is not None and known != number:
            raise ValueError(f"{key}: told {known} before, now {number}")
        self._configs.setdefault(key, dict(config))
        self._losses[key] = known if number is None else number
        self._seen = None

    @property
    def incumbent(self) -> dict[str, Any]:
        """Where it stands: once done, the near-best configuration whose neighbours are all known."""
        return dict(self._configs[self._view.incumbent])

    @property
    def best(self) -> dict[str, Any] | None:
        """The configuration with the lowest loss so far, the incumbent among equals; None while none has a loss."""
        if not (near := self._near_best()):
            return None
        here = self._view.incumbent
        first = here if self._losses.get(here) == self._losses[near[0]] else near[0]
        return dict(self._configs[first])

    @property
    def near_best(self) -> list[dict[str, Any]]:
        """The configurations within `near` of the lowest loss, best first."""
        return [dict(self._configs[key]) for key in self._near_best()]

    @property
    def accepted(self) -> list[Step]:
        """What was accepted, in order."""
        return list(self._view.accepted)

    @property
    def done(self) -> bool:
        """Whether there is nothing left to run."""
        return not self._view.asked

    @property
    def told(self) -> int:
        """How many configurations it knows of, those that cannot be had among them."""
        return len(self._losses)

    def loss(self, config: Config) -> float | None:
        """What was told of a configuration (infinite: diverged); None where it was not, or cannot be had."""
        return self._losses.get(identity(config))

    @property
    def _view(self) -> _View:
        if self._seen is None:
            self._seen = self._look()
        return self._seen

    def _look(self) -> _View:
        """Walks the whole path anew: from the start, one axis after the other, as far as the results lead."""
        start = self._place(self.start)
        view = _View(start)
        if start not in self._losses:
            first = self._beside(start)[0] if self.space.axes else []
            view.asked = [start, *self._untold(first)]
            return view
        near = self._near_best()
        known = [key for key in near if self._is_known_all_round(key)]
        here: str | None = start
        while here is not None:
            view.incumbent = here
            view.asked = self._descend(view)
            here = self._elsewhere(view, near, known)
        if known:
            view.asked = []
        if not view.asked and (end := known or near) and view.incumbent not in known:
            view.incumbent = end[0]
        return view

    def _descend(self, view: _View) -> list[str]:
        """Plain coordinate descent from the incumbent; answers what is missing along the axis where it had to stop."""
        unmoved, axes = 0, len(self.space.axes)  # axes since the incumbent last moved
        while unmoved < axes:
            for axis in range(axes):
                view.stood_at.add(view.incumbent)
                while True:
                    neighbours = self._beside(view.incumbent)[axis]
                    if missing := self._untold(neighbours):
                        return missing
                    if not self._accepts(view, min(neighbours, key=self._height, default=view.incumbent)):
                        break
                    unmoved = 0
                unmoved += 1
                if unmoved == axes:
                    break
        return []

    def _accepts(self, view: _View, found: str) -> bool:
        """Moves the incumbent where that gains more than the threshold; what has diverged never does."""
        new, before = self._height(found), view.incumbent
        gain = self._height(before) - new
        if not (math.isfinite(new) and gain > self.threshold):
            return False
        left, taken = dict(self._configs[before]), dict(self._configs[found])
        view.accepted.append(Step(", ".join(changed_axes(left, taken)), left, taken, gain))
        view.incumbent = found
        view.stood_at.add(found)
        return True

    def _elsewhere(self, view: _View, near: list[str], known: list[str]) -> str | None:
        """Another near-best configuration to go on from, if there is a reason to."""
        here = view.incumbent
        rest = [key for key in near if key not in view.stood_at]
        if here in known or not rest:
            return None
        if here not in near:  # something better was told that does not lie on the way
            self._accepts(view, rest[0])
            return rest[0]
        if not view.asked:  # an optimum around which most cannot be had
            return rest[0]
        missing = {key: len(self._untold(self._around(key))) for key in [here, *rest]}
        most = min(rest, key=lambda key: missing[key])
        switches = not known and missing[here] - missing[most] >= self.switch_saves
        return most if switches else None

    def _is_known_all_round(self, key: str) -> bool:
        """Whether all neighbours are told, most of them with a result.

        Where most cannot be had nothing is known of the neighbourhood: other near-best configurations come first.
        """
        around = self._around(key)
        had = sum(self._losses.get(other) is not None for other in around)
        return not self._untold(around) and 2 * had >= len(around)

    def _near_best(self) -> list[str]:
        finite = {key: loss for key, loss in self._losses.items() if loss is not None and math.isfinite(loss)}
        lowest = min(finite.values(), default=math.inf)
        return sorted((key for key in finite if finite[key] <= lowest + self.near), key=lambda key: (finite[key], key))

    def _untold(self, keys: list[str]) -> list[str]:
        return [key for key in keys if key not in self._losses]

    def _height(self, key: str) -> float:
        loss = self._losses.get(key)
        return math.inf if loss is None else loss

    def _place(self, config: Config) -> str:
        key = identity(config)
        self._configs.setdefault(key, dict(config))
        return key

    def _beside(self, key: str) -> list[list[str]]:
        """The neighbours along each axis."""
        if key not in self._neighbours:
            config = self._configs[key]
            self._neighbours[key] = [
                [self._place(other) for other in self.space.neighbours(config, axis.name)] for axis in self.space.axes
            ]
        return self._neighbours[key]

    def _around(self, key: str) -> list[str]:
        return [other for along in self._beside(key) for other in along]
