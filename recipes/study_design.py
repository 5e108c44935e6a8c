"""What a live study is to find out: every cell composed, every grid found right (see `recipes.study`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_opt.plan import ConfigError, check_value, flops_per_token, one_of, rule_for, tuned
from lightning_opt.plan.lengths import token_budget
from lightning_opt.study.budget import Spent, read_budget
from lightning_opt.study.cells import (
    BATCH,
    REPORTING,
    TUNING,
    WARMUP,
    CellPlan,
    Trial,
    elements,
    shown,
    value_at,
)
from lightning_opt.study.phases import Design
from lightning_opt.study.results import Cell
from lightning_opt.study.space import Axis, Ladder, canonical

if TYPE_CHECKING:
    from lightning_opt.launch.preflight import Checker

SHORT = {
    "rate": "optimizer.lr",
    "decay": "optimizer.weight_decay",
    "warmup": WARMUP,
    "beta1": "optimizer.betas[0]",
    "beta2": "optimizer.betas[1]",
    "epsilon": "optimizer.eps",
    "clip": "optimizer.max_grad_norm",
    "batch": BATCH,
}
"""Short words for the study's eight hyperparameters."""

OF_THE_SWEEP = re.compile(r"hydra[./].*|on_failure|jobs_per_device")
_NOT_YOURS = {
    "seed": "follows from seeds= and tuning_seed=",
    "trainer.val_part": "is chosen by the study: settings are chosen on one part and reported on the other",
    "trainer.max_steps": "follows from scales=",
    "trainer.max_tokens": "follows from scales=",
    "trainer.max_epochs": "follows from scales=",
    "scale.tokens": "follows from scales=",
    "scale.chinchilla": "follows from scales=: scales=[1.5x]",
    "hydra.sweep.dir": "is chosen by the study: out=FOLDER names its folder",
    "hydra.run.dir": "is chosen by the study: out=FOLDER names its folder",
}
_MULTIPLE = re.compile(r"(\d+(?:\.\d+)?)x")


def design_of(settings: Mapping[str, Any], words: Sequence[str], checker: Checker) -> Design:
    """What a study is to find out, every cell composed and every grid found right.

    Args:
        settings: the fields of conf/study.yaml.
        words: overrides for every run.
        checker: of `train.py`'s configurations.

    Raises:
        ConfigError: the first problem found.
    """
    _check_words(words)
    cells = _Cells(settings, [word for word in words if not OF_THE_SWEEP.fullmatch(_key(word))], checker)
    plans = cells.plans()
    threshold = settings["threshold"]
    if threshold != "auto":
        threshold = _number("threshold", threshold, "nats, or auto")
    noise = count("noise_seeds", settings["noise_seeds"], least=2) if threshold == "auto" else 1
    tuning_seed = check_value("seed", settings["tuning_seed"], field="tuning_seed")
    noise_seeds = tuple(tuning_seed + number for number in range(1, noise))
    budget = read_budget(settings["budget"])
    reduced = settings["reduced_budget"]
    design = Design(
        {plan.cell: plan for plan, _ in plans},
        {plan.cell: axes for plan, axes in plans},
        frozenset(_first(settings, plans)),
        budget,
        budget if reduced is None else read_budget(reduced, field="reduced_budget"),
        _seeds(settings["seeds"], (tuning_seed, *noise_seeds)),
        tuning_seed,
        None if threshold == "auto" else threshold,
        noise_seeds,
        None if settings["near"] is None else _number("near", settings["near"], "nats, or null"),
        tuple(SHORT.get(name, name) for name in settings["always"] or ()),
        cells.extra(plans[0][0]),
        {} if _said(words, "trainer.val_every_n_steps") else {TUNING: 1, REPORTING: _points(settings)},
    )
    for plan, _ in plans:
        if not (design.budget.allows(Spent(), plan.tokens) and design.reduced_budget.allows(Spent(), plan.tokens)):
            raise ConfigError("budget", settings["budget"], f"must allow one run: {plan.tokens:,.0f} tokens")
    checker.job(design.words(Trial(plans[0][0], plans[0][0].start, design.seeds[0], REPORTING)))
    return design


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _said(words: Sequence[str], key: str) -> bool:
    return any(_key(word) == key for word in words)


def _points(settings: Mapping[str, Any]) -> int:
    return count("curve_points", settings["curve_points"])


def _check_words(words: Sequence[str]) -> None:
    from lightning_opt.launch import redact

    for word in words:
        key, value = _key(word), word.partition("=")[2]
        if key in _NOT_YOURS:
            raise ConfigError(key, value, _NOT_YOURS[key])
        if redact([word]) != [word]:
            raise ConfigError(key, value, "must not look like a secret: runs are known by their words, without any")


def count(field: str, value: Any, *, least: int = 1) -> int:
    """A whole number.

    Raises:
        ConfigError: it is none, or less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(field, value, f"must be a whole number >= {least}")
    return value


def _number(field: str, value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 100:
        raise ConfigError(field, value, f"must be a number >= 0: {what}")
    return float(value)


def _seeds(value: Any, taken: Sequence[int]) -> tuple[int, ...]:
    seeds = range(1, 1 + count("seeds", value)) if not isinstance(value, list) else value
    found = tuple(check_value("seed", seed, field="seeds") for seed in seeds)
    if not found or len(set(found)) < len(found):
        raise ConfigError("seeds", value, "must be a number of seeds, or a list of different ones")
    if both := set(found) & set(taken):
        raise ConfigError("seeds", value, f"must be fresh: {both.pop()} has chosen settings already")
    return found


def names(settings: Mapping[str, Any], field: str) -> list[str]:
    """A list of names, which may be written as one name.

    Raises:
        ConfigError: it is empty, or names something twice.
    """
    value = settings[field]
    found = [str(name) for name in (value if isinstance(value, list) else [value])] if value is not None else []
    if not found or len(set(found)) < len(found):
        raise ConfigError(field, value, f"must be a list of different names, for example {field}=[{_EXAMPLES[field]}]")
    return found


_EXAMPLES = {
    "optimizers": "adamw,lion,muon",
    "models": "femto,pico",
    "scales": "1x,2x",
    "tune_at": "1x",
    "only": "lion",
}


def _by_optimizer(settings: Mapping[str, Any], field: str, optimizer: str) -> Any:
    """A setting that may be given for each optimizer."""
    value = settings[field]
    if not isinstance(value, Mapping):
        return value
    if optimizer in value:
        return value[optimizer]
    if "default" not in value:
        raise ConfigError(f"{field}.{optimizer}", None, f"must be given, or {field}.default for all others")
    return value["default"]


def _first(settings: Mapping[str, Any], plans: Sequence[tuple[CellPlan, Any]]) -> list[Cell]:
    """The cells of phase I: of each optimizer on each model those at `tune_at`, else the smallest."""
    wanted = None if settings["tune_at"] is None else {_multiple(name) for name in names(settings, "tune_at")}
    by_model: dict[tuple[str, str], list[Cell]] = {}
    for plan, _ in plans:
        by_model.setdefault((plan.cell.optimizer, plan.cell.params), []).append(plan.cell)
    found = []
    for (optimizer, _), cells in by_model.items():
        first = [cell for cell in cells if wanted is None or cell.chinchilla in wanted]
        if not first:
            have = ", ".join(f"{cell.chinchilla:g}x" for cell in cells)
            why = f"must name a scale of each optimizer: {optimizer} has {have}"
            raise ConfigError("tune_at", settings["tune_at"], why)
        found += first if wanted else [min(first, key=lambda cell: cell.chinchilla)]
    return found


def _multiple(name: str) -> float | None:
    found = _MULTIPLE.fullmatch(str(name))
    return float(found[1]) if found else None


class _Cells:
    """Composes the cells of a study."""

    def __init__(self, settings: Mapping[str, Any], words: Sequence[str], checker: Checker) -> None:
        self.settings, self.words, self.checker = settings, words, checker
        self.optimizers = names(settings, "optimizers")
        known = checker.composer.options("optimizer")
        for name in self.optimizers:
            if name not in known:
                raise ConfigError("optimizers", name, one_of(name, known))
        baseline = settings["baseline"]
        if baseline not in self.optimizers:
            why = f"must be one of the optimizers, {', '.join(self.optimizers)}: add it, or say baseline="
            raise ConfigError("baseline", baseline, why)

    def plans(self) -> list[tuple[CellPlan, tuple[Axis | Ladder, ...]]]:
        """Every cell with its grid."""
        found: dict[Cell, tuple[CellPlan, tuple[Axis | Ladder, ...]]] = {}
        for optimizer in self.optimizers:
            scales = names({"scales": _by_optimizer(self.settings, "scales", optimizer) or ["1x"]}, "scales")
            for model in names(self.settings, "models"):
                for scale in scales:
                    plan, axes = self._plan(optimizer, model, scale)
                    if plan.cell in found:
                        raise ConfigError("scales", scales, f"must not name {plan.cell.chinchilla:g}x twice")
                    found[plan.cell] = plan, axes
        return list(found.values())

    def _plan(self, optimizer: str, model: str, scale: str) -> tuple[CellPlan, tuple[Axis | Ladder, ...]]:
        start = self._start(optimizer, model)
        cell = [f"optimizer={optimizer}", f"model={model}", *self._scale(scale), *self.words]
        config = self.checker.job([*cell, *(f"{key}={shown(value)}" for key, value in start.items())]).config
        if not config["trainer"]["val_sequences"]:
            raise ConfigError("trainer.val_sequences", 0, "must be above 0: a study is judged by the validation loss")
        if config["scale"]["chinchilla"] is None:
            raise ConfigError("scales", scale, "must be a multiple of 20 tokens per non-embedding parameter, as 1x")
        axes = tuple(self._axes(optimizer, config))
        for axis in axes:
            if _said(self.words, path := (elements(axis.name) or (axis.name,))[0]):
                raise ConfigError(path, axis.name, "is searched: leave it out, or give it as a start (conf/study.yaml)")
        searched = {(elements(axis.name) or (axis.name,))[0] for axis in axes}
        kept = [f"{key}={shown(value)}" for key, value in start.items() if key not in searched]
        lists = {path: tuple(value_at(config, path)) for path in searched if isinstance(value_at(config, path), list)}
        values = {axis.name: value_at(config, axis.name) for axis in axes}
        name = Cell(optimizer, model, float(config["scale"]["chinchilla"]))
        about = {"lists": lists, "config": config, "origin": self._origin(optimizer, model, scale), **_facts(config)}
        plan = CellPlan(name, (*cell, *kept), values, **about)
        return plan, axes

    def _start(self, optimizer: str, model: str) -> dict[str, Any]:
        """The user's own starting values for an optimizer, and for it on this model."""
        given = self.settings["start"] or {}
        found: dict[str, Any] = {}
        for key in (optimizer, f"{optimizer}/{model}"):
            values = given.get(key) or {}
            if not isinstance(values, Mapping):
                raise ConfigError(f"start.{key}", values, "must be a map of overrides: {optimizer.lr: 1.0e-3}")
            found |= {str(name): value for name, value in values.items()}
        return found

    def _scale(self, scale: str) -> list[str]:
        known = self.checker.composer.options("scale")
        if scale in known:
            return [f"scale={scale}"]
        if (multiple := _multiple(scale)) and multiple > 0:
            return ["scale=1x", f"scale.chinchilla={multiple!r}"]
        raise ConfigError("scales", scale, f"{one_of(scale, known)}, or another multiple such as 1.5x")

    def _origin(self, optimizer: str, model: str, scale: str) -> str:
        record = None if any(word.startswith("~tuned") for word in self.words) else tuned(optimizer, model, scale)
        own = "start of the study's settings, " if self._start(optimizer, model) else ""
        return own + (record.source if record else f"conf/optimizer/{optimizer}.yaml")

    def extra(self, plan: CellPlan) -> dict[str, tuple[str, ...]]:
        """Overrides of the runs that choose and of those that are reported."""
        final = str(self.settings["final_evaluation"])
        if final not in (known := self.checker.composer.options("evaluation")):
            raise ConfigError("evaluation", final, one_of(final, known))
        callbacks = (plan.config or {}).get("callbacks") or {}
        keep: tuple[str, ...] = ()
        ours = str((callbacks.get("checkpoint") or {}).get("_target_")) == "lightning_opt.callbacks.Checkpoint"
        if ours and not any(_key(word).startswith("callbacks.checkpoint") for word in self.words):
            keep = ("callbacks.checkpoint.keep_last=1", "callbacks.checkpoint.keep_best=0")
        lean = ("~callbacks.export",) if callbacks.get("export") else ()
        return {TUNING: ("evaluation=none", *lean, *keep), REPORTING: (f"evaluation={final}", *keep)}

    def _axes(self, optimizer: str, config: Mapping[str, Any]) -> list[Axis | Ladder]:
        """The grids that are searched, in order."""
        space = self.settings["space"]
        grids = {**(space.get("default") or {}), **(space.get(optimizer) or {})}
        search = _by_optimizer(self.settings, "search", optimizer)
        if search == "full":
            wanted = [name for name in grids if _has(config, name)]
        else:
            wanted = [SHORT.get(str(name), str(name)) for name in (search if isinstance(search, list) else [search])]
        if not wanted or len(set(wanted)) < len(wanted):
            why = f"must be full, rate, or a list of different ones of {', '.join(SHORT)}"
            raise ConfigError("search", search, why)
        for name in wanted:
            if name not in grids:
                why = f"must be one of {', '.join(SHORT)}, or have a grid in space.{optimizer}"
                raise ConfigError("search", name, why)
            if not _has(config, name):
                why = f"is no setting of {optimizer}: search by optimizer, as conf/study.yaml shows"
                raise ConfigError("search", name, why)
        return [axis_of(name, grids[name], value_at(config, name), config, optimizer) for name in wanted]


def _has(config: Mapping[str, Any], name: str) -> bool:
    try:
        value_at(config, name)
    except KeyError:
        return False
    return True


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell's configuration says of the length and the cost of its runs."""
    model, length = config["model"], int(config["data"]["sequence_length"])
    params = model["non_embedding_params"]
    shape = [model.get(name) for name in ("num_layers", "hidden_size", "vocab_size")]
    layers, hidden, vocabulary = shape
    flops = flops_per_token(params, layers, hidden, length, vocabulary) if all(shape) else 6 * params
    return {
        "tokens": float(token_budget(dict(config)) or 0),
        "sequence_length": length,
        "batch": config["trainer"]["global_batch_size"],
        "warmup": config["schedule"].get("warmup", 0),
        "params": float(params),
        "flops_per_token": float(flops),
    }


def axis_of(name: str, grid: Any, start: Any, config: Mapping[str, Any], optimizer: str = "default") -> Axis | Ladder:
    """The grid of one hyperparameter, its starting value among the others.

    Args:
        name: of the hyperparameter.
        grid: a list, or a map as conf/study.yaml describes it.
        start: the value that the cell starts from.
        config: of the cell's start.
        optimizer: whose, for the error.

    Raises:
        ConfigError: it is no grid, or a value is none that the hyperparameter may have.
    """
    field = f"space.{optimizer}.{name}"
    reach = None
    if isinstance(grid, Mapping) and "factor" in grid:
        if set(grid) != {"factor", "low", "high"} or isinstance(start, bool) or not isinstance(start, int | float):
            raise ConfigError(field, grid, f"must be {{factor: , low: , high: }}, from a number; it starts at {start}")
        return Ladder(name, float(grid["factor"]), float(grid["low"]), float(grid["high"]))
    if isinstance(grid, Mapping):
        reach, kind = grid.get("reach"), "values"
        if set(grid) <= {"fractions", "steps", "reach"}:
            kind = "fractions" if start < 1 else "steps"
        grid = grid.get(kind)
    if not isinstance(grid, list):
        raise ConfigError(field, grid, "must be a list of values, or a map as conf/study.yaml describes it")
    values = [_right(name, value, config, field) for value in grid]
    if canonical(start) not in map(canonical, values):
        values.append(start)
    if all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values):
        values.sort(key=lambda value: (value is not None, value or 0))
    return Axis(name, tuple(values), reach)


def _right(name: str, value: Any, config: Mapping[str, Any], field: str) -> Any:
    """A value as the rule of its field has it."""
    path, place = elements(name) or (name, None)
    if rule_for(path) is None:
        return value
    if place is None:
        return check_value(path, value, field=field)
    whole = list(value_at(config, path))
    whole[place] = value
    return check_value(path, whole, field=field)[place]
