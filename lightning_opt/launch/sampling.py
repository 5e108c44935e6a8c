"""``hydra/sweeper=optuna``: Optuna's samplers say what to try next; its SQLite file in the sweep folder remembers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from lightning_opt.launch.preflight import Checker
from lightning_opt.launch.searching import Point
from lightning_opt.launch.swept import Swept, texts_of, value_of_text
from lightning_opt.plan import ConfigError
from lightning_opt.plan.values import rule_for
from lightning_opt.plan.words import one_of

if TYPE_CHECKING:
    import optuna

INSTALL = "pip install -c constraints.txt -e '.[run,search]'"
STORAGE = "optuna.db"
STUDY = "sweep"
SHOWN_DIGITS = 6  # of a sampled number; the run gets what is shown
_LEFT_OUT = "left out "  # and the trial's number: a configuration that makes no sense
SAMPLERS = {"tpe": "TPESampler", "cmaes": "CmaEsSampler", "random": "RandomSampler", "gp": "GPSampler"}
_NEEDS = {"cmaes": "cmaes", "gp": "scipy"}


@dataclass(frozen=True)
class Dimension:
    """One swept field.

    Attributes:
        key: of the override.
        choices: values as texts; empty where it is a number between two limits.
        low: smallest number.
        high: largest number, which is included.
        step: between numbers; None: any.
        log: whether ratios count, rather than differences.
        whole: whether only whole numbers.
    """

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    whole: bool = False

    @classmethod
    def of(cls, key: str, override: Override, values: Sequence[Any]) -> Dimension:
        """Reads Hydra's ``interval()``, ``range()``, ``choice()`` or a list.

        Args:
            key: of the override.
            override: swept.
            values: what it lists; none for an interval.

        Raises:
            ConfigError: the limits make no sense.
        """
        sweep = override.value()
        log = "log" in getattr(sweep, "tags", ())
        if isinstance(sweep, IntervalSweep):
            low, high = sweep.start, sweep.end
            whole = _is_whole(key, low, high)
            if not (isinstance(low, int | float) and isinstance(high, int | float) and low < high):
                raise ConfigError(key, _written(override), "must be interval(low, high) with low < high")
            if log and low <= 0:
                raise ConfigError(key, _written(override), "must be above 0 where ratios count: tag(log, ...)")
            if whole:
                return cls(key, (), int(low), int(high), 1, log, True)
            return cls(key, (), low, high, None, log, False)
        if log:
            raise ConfigError(key, _written(override), "log goes with an interval: tag(log, interval(1e-4, 1e-2))")
        if isinstance(sweep, RangeSweep) and len(values) > 1:
            low, high = min(values[0], values[-1]), max(values[0], values[-1])
            whole = all(isinstance(value, int) for value in values)
            return cls(key, (), low, high, abs(sweep.step), False, whole)
        return cls(key, tuple(texts_of(override)))

    def text(self, value: Any) -> str:
        """A sampled value as an override writes it."""
        if self.choices:
            return str(value)
        if self.whole:
            return str(int(value))
        return repr(min(self.high, max(self.low, float(f"{value:.{SHOWN_DIGITS}g}"))))

    @property
    def corners(self) -> tuple[str, ...]:
        """All choices, or the two limits."""
        return self.choices or (self.text(self.low), self.text(self.high))

    def distribution(self) -> optuna.distributions.BaseDistribution:
        """As Optuna has it."""
        from optuna import distributions

        if self.choices:
            return distributions.CategoricalDistribution(self.choices)
        if self.whole:
            step = 1 if self.log else int(self.step or 1)
            return distributions.IntDistribution(int(self.low), int(self.high), log=self.log, step=step)
        return distributions.FloatDistribution(self.low, self.high, log=self.log, step=self.step)


def decider(checker: Checker, overrides: Sequence[Override], options: Mapping[str, Any]) -> tuple[Trials, list[str]]:
    """Reads the command of a search by Optuna.

    Args:
        checker: of the command.
        overrides: of the command.
        options: the sweeper's: ``sampler``, ``n_trials``, ``n_jobs``, ``sampler_seed``.

    Returns:
        What decides, and the seeds' overrides.

    Raises:
        ConfigError: a package is missing, nothing is swept, or an option is wrong.
    """
    sampler = options.get("sampler")
    if sampler not in SAMPLERS:
        raise ConfigError("hydra.sweeper.sampler", sampler, one_of(str(sampler), list(SAMPLERS)))
    for package in ("optuna", *filter(None, [_NEEDS.get(sampler)])):
        if find_spec(package) is None:
            raise ConfigError("hydra/sweeper", "optuna", f"needs the package {package}: {INSTALL}")
    for name, low in {"n_trials": 1, "n_jobs": 1, "sampler_seed": 0}.items():
        value = options.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"hydra.sweeper.{name}", value, f"must be a whole number >= {low}")
    composer = checker.composer
    swept = Swept.of(composer, overrides)
    listed = {
        key: [value_of_text(composer, key, text) for text in texts_of(override)] if override.is_discrete_sweep() else []
        for key, override in {**swept.groups, **swept.fields}.items()
    }
    space = [Dimension.of(key, {**swept.groups, **swept.fields}[key], values) for key, values in listed.items()]
    if not space:
        why = "needs something to sample: optimizer.lr_scale='tag(log, interval(0.1, 10))' say"
        raise ConfigError("hydra/sweeper", "optuna", why)
    if sampler == "cmaes" and (words := [one.key for one in space if one.choices]):
        why = f"takes numbers only, and {words[0]} is a choice: give it by interval(...) or range(...), or take tpe"
        raise ConfigError("hydra.sweeper.sampler", "cmaes", why)
    return Trials(space, swept.fixed, options), swept.seeds


class Trials:
    """Decides by one of Optuna's samplers; what it knows stands in the sweep folder.

    Args:
        space: what is sampled.
        fixed: the other overrides.
        options: see `decider`.
    """

    def __init__(self, space: Sequence[Dimension], fixed: Sequence[str], options: Mapping[str, Any]) -> None:
        self._space, self._fixed, self._options = list(space), tuple(fixed), options
        self._say: Callable[[str], None] = lambda line: None
        names = ", ".join(one.key for one in space)
        self.words = f"{options['n_trials']} trials of Optuna's {SAMPLERS[options['sampler']]} over {names}"
        self.first = self._corners()

    def _corners(self) -> list[Point]:
        """The first corner, each other one beside it, and the one across."""
        first = {one.key: one.corners[0] for one in self._space}
        beside = [(one.key, text) for one in self._space for text in one.corners[1:]]
        across = {one.key: one.corners[-1] for one in self._space}
        points = [self._point(None, first)]
        points += [self._point(None, {**first, key: text}, f"{key}={text}") for key, text in beside]
        if len(self._space) > 1:
            key, text = list(across.items())[-1]
            points.append(self._point(None, across, f"{key}={text}"))
        return points

    def open(self, folder: Path, say: Callable[[str], None]) -> None:
        """Makes or reads the storage; trials that were cut short come first, those that failed once more.

        Raises:
            ConfigError: the folder holds a search over other values.
        """
        import optuna

        self._say, self._optuna = say, optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            study_name=STUDY, storage=f"sqlite:///{folder.resolve() / STORAGE}", load_if_exists=True
        )
        self._distributions = {one.key: one.distribution() for one in self._space}
        self._check_same(folder)
        states = optuna.trial.TrialState
        known = self._study.get_trials(deepcopy=False)
        self._study.sampler = self._sampler(len(known))
        self._cut_short = [trial for trial in known if trial.state == states.RUNNING]
        settled = [trial.params for trial in known if trial.state != states.FAIL]
        left_out = {name.removeprefix(_LEFT_OUT) for name in self._study.user_attrs if name.startswith(_LEFT_OUT)}
        self._counted = sum(trial.state == states.COMPLETE or str(trial.number) in left_out for trial in known)
        for trial in known:
            failed = trial.state == states.FAIL and str(trial.number) not in left_out
            if failed and trial.params not in settled:
                self._study.enqueue_trial(trial.params)
                settled.append(trial.params)
        if known:
            say(f"{self._counted} trials are told already")

    def _check_same(self, folder: Path) -> None:
        for trial in self._study.get_trials(deepcopy=False):
            for key, known in trial.distributions.items():
                mine = self._distributions.get(key)
                if type(known) is not type(mine) or getattr(known, "choices", ()) != getattr(mine, "choices", ()):
                    why = f"holds a search over other values of {key}: name another folder"
                    raise ConfigError("hydra.sweep.dir", str(folder), why)

    def _sampler(self, known: int) -> optuna.samplers.BaseSampler:
        """A sampler whose random numbers go on, rather than come again, where the search does."""
        more: dict[str, Any] = {"seed": self._options["sampler_seed"] + known}
        if self._options["sampler"] == "tpe":
            more["constant_liar"] = self._options["n_jobs"] > 1  # side by side they should not try the same
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self._optuna.exceptions.ExperimentalWarning)
            return getattr(self._optuna.samplers, SAMPLERS[self._options["sampler"]])(**more)

    def ask(self) -> list[Point]:
        """The next trials: as many as may run at once."""
        points = []
        left = self._options["n_trials"] - self._counted
        while left > 0 and len(points) < min(left, self._options["n_jobs"]):
            if self._cut_short:
                trial = self._cut_short.pop(0)
                if trial.params.keys() != self._distributions.keys():
                    self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)
                    continue
                number, params = trial.number, trial.params
            else:
                asked = self._study.ask(self._distributions)
                number, params = asked.number, asked.params
            points.append(self._point(number, {one.key: one.text(params[one.key]) for one in self._space}))
        return points

    def tell(self, point: Point, loss: float | None, refused: str = "") -> None:
        """Tells Optuna; a run that diverged is infinitely bad, one that failed says nothing."""
        if loss is None:
            if refused:
                self._study.set_user_attr(f"{_LEFT_OUT}{point.name}", refused)
            self._study.tell(point.name, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(point.name, loss)
        self._counted += 1

    def closing(self) -> list[str]:
        """The best trial."""
        trials = self._study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState.COMPLETE,))
        finite = [trial for trial in trials if trial.value is not None and math.isfinite(trial.value)]
        if not finite:
            return [f"no trial has a loss ({self._counted} tried)"]
        best = min(finite, key=lambda trial: trial.value)
        shown = " ".join(f"{one.key}={one.text(best.params[one.key])}" for one in self._space)
        return [f"best {shown}: loss {best.value:.4f} (trial {best.number}, {len(trials)} with a result)"]

    def _point(self, number: int | None, texts: Mapping[str, str], changed: str | None = None) -> Point:
        lines = [f"{key}={text}" for key, text in texts.items()]
        return Point(number, (*self._fixed, *lines), " ".join(lines), changed)


def _is_whole(key: str, low: Any, high: Any) -> bool:
    """Whether only whole numbers lie between: Hydra makes interval(1,8) decimal, int(interval(1,8)) does not."""
    limits, rule = (low, high), rule_for(key)
    if not all(isinstance(limit, int | float) and float(limit).is_integer() for limit in limits):
        return False
    if rule is None:
        return all(isinstance(limit, int) for limit in limits)
    return rule.kind == "int" or (rule.kind == "warmup" and low >= 1)


def _written(override: Override) -> str:
    return str(override.input_line).partition("=")[2]
