"""Checks a whole command before anything starts: every name, every value, every job of a sweep."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from lightning_opt import plan
from lightning_opt.job.resuming import check_named
from lightning_opt.launch.compose import Composer
from lightning_opt.launch.launchers import check_launcher
from lightning_opt.launch.names import check_field, check_group, is_group_choice
from lightning_opt.launch.resolve import plain_config, saved_config
from lightning_opt.launch.targets import check_loggers, check_targets
from lightning_opt.launch.tuning import chosen_record
from lightning_opt.plan import ConfigError
from lightning_opt.run_folder import config_hash, starts_elsewhere

if TYPE_CHECKING:
    from lightning_opt.launch.searching import Search

_OF_THE_COMMAND = ("hydra.", "hydra/", "on_failure", "jobs_per_device")
_SEARCHES = {"CoordinateDescentSweeper": "descending", "OptunaSweeper": "sampling"}  # sweeper to its module here


@dataclass(frozen=True)
class Job:
    """One job of a command.

    Attributes:
        config: its resolved configuration.
        overrides: its own, as Hydra wants them; what concerns the whole command (`hydra`, a sweep's policy) left out.
    """

    config: dict[str, Any]
    overrides: list[str]


@dataclass(frozen=True)
class Command:
    """A command that was found right.

    Attributes:
        overrides: what to hand to Hydra; new keys of open maps carry the `++` that Hydra wants.
        jobs: in order; one where it is no sweep; of a search those that were checked before it starts.
        swept: the keys that take several values; None where it is no sweep, or another sweeper than ours decides.
        folder: the run folder the user named by `hydra.run.dir`, or the sweep folder by `hydra.sweep.dir`.
        search: what finds the jobs as it goes, if anything does.
    """

    overrides: list[str]
    jobs: list[Job]
    swept: list[str] | None
    folder: Path | None
    search: Search | None = None


def check_command(composer: Composer, lines: Sequence[str], *, multirun: bool = False, values: bool = True) -> Command:
    """Checks every job of a command; of a search, every job that can be known before it starts.

    Args:
        composer: an entered `Composer`.
        lines: the `key=value` arguments.
        multirun: whether `-m` was given.
        values: False checks names only (for `--cfg`).

    Raises:
        ConfigError: the first problem found.
    """
    checker = Checker(composer)
    overrides = composer.parse(lines)
    if not multirun:
        for override in overrides:
            if override.is_sweep_override():
                value = override.input_line.partition("=")[2] if override.input_line else ""
                example = f"train.py -m {override.input_line}"
                raise ConfigError(
                    override.key_or_group, value, f"several values make a sweep, which needs -m: {example}"
                )
    for override in overrides:
        if override.key_or_group == "hydra.mode":
            raise ConfigError("hydra.mode", override.value(), "is not for you to set: use -m for a sweep")
    todo = _expand(checker, overrides) if multirun else _Todo([overrides])
    jobs = todo.search.first_jobs() if todo.search else checker.jobs(todo.jobs, sweep=multirun, values=values)
    field = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    _check_folder_keys(overrides, multirun)
    marked = [checker.marked(override) for override in overrides]
    folder = None
    if any(o.key_or_group == field for o in overrides) and (todo.swept is not None or not multirun):
        folder = _named(composer, [checker.marked(o) for o in todo.jobs[0]], field)
        marked = [line for line in marked if not line.lstrip("+").startswith(f"{field}=")]
    return Command(marked, jobs, todo.swept, folder, todo.search)


def check_lists(
    checker: Checker, lists: Sequence[Sequence[str]], folder: Path, *, shared: Sequence[str] = ()
) -> Command:
    """Checks the jobs of an explicit list; a configuration that is there twice is one job.

    Args:
        checker: of an entered `Composer`; used again, it composes only what is new.
        lists: each job's own overrides, one value each.
        folder: the sweep's.
        shared: overrides of all jobs, and of the sweep itself (`jobs_per_device`, `hydra/launcher`).

    Raises:
        ConfigError: the first problem found.
    """
    common, own = checker.composer.parse(shared), [checker.composer.parse(lines) for lines in lists]
    for override in [*common, *(override for job in own for override in job)]:
        if override.is_sweep_override():
            raise ConfigError(override.key_or_group, override.input_line, "must be one value: the jobs are listed")
        if override.key_or_group in ("hydra.mode", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.run.dir"):
            raise ConfigError(override.key_or_group, override.value(), "is chosen by whoever lists the jobs")
    jobs = checker.jobs([[*common, *job] for job in own], sweep=True, repeats=True)
    return Command([checker.marked(override) for override in common], jobs, [], folder)


def compose_checked(composer: Composer, lines: Sequence[str]) -> DictConfig:
    """Composes a command that is no run, with every name checked.

    Args:
        composer: an entered `Composer`.
        lines: the `key=value` arguments.

    Raises:
        ConfigError: there is no such group, option or field.
    """
    return Checker(composer).compose(composer.parse(lines), sweep=False)


def _of_the_command(override: Override) -> bool:
    """Whether an override concerns the whole sweep; a checkpoint to start from concerns each job."""
    anew_or_not = override.key_or_group == "resume" and not starts_elsewhere(str(override.value()))
    return anew_or_not or override.key_or_group.startswith(_OF_THE_COMMAND)


def _check_folder_keys(overrides: Sequence[Override], multirun: bool) -> None:
    for override in overrides:
        key = override.key_or_group
        if key == "hydra.sweep.subdir":
            raise ConfigError(
                key, override.value(), "is chosen by the sweep: name its folder by hydra.sweep.dir=FOLDER"
            )
        if multirun and key == "hydra.run.dir":
            raise ConfigError(key, override.value(), "names one run's folder; a sweep takes hydra.sweep.dir=FOLDER")


def _named(composer: Composer, lines: list[str], field: str) -> Path | None:
    """The folder that a field of Hydra's names; the whole is composed, because it may use Hydra's own words."""
    cfg = composer.compose(lines, sweep=field == "hydra.sweep.dir")
    HydraConfig.instance().set_config(cfg)
    name = str(OmegaConf.select(cfg, field))
    return None if name == "." else Path(name)


def check_job(cfg: DictConfig) -> dict[str, Any]:
    """Resolves and checks one composed job; nothing heavy is imported.

    Returns:
        The resolved configuration.

    Raises:
        ConfigError: the first problem found.
    """
    from lightning_opt import data, evaluation  # their checks need no torch

    config = plan.normalised(plain_config(cfg))
    if "hydra" in cfg and (record := chosen_record(cfg.hydra.runtime.choices)):
        record.check_size(config["model"].get("non_embedding_params"))
    run = plan.check(config)
    check_targets({key: config[key] for key in ("model", "callbacks") if key in config})
    check_loggers(config.get("logger") or {})
    data.check(plan.data_config(config), tokens=run.tokens)
    evaluation.check(config["evaluation"])
    evaluation.check_samples(config["evaluation"], config.get("callbacks") or {})
    return config


def check_start(cfg: DictConfig, config: dict[str, Any]) -> None:
    """Checks that there is a checkpoint at ``resume=PATH`` that this job may start from; nothing heavy is imported.

    Raises:
        ConfigError: there is none.
    """
    check_named(config, plan.identity(saved_config(cfg), plan.check(config).max_steps))


def _check_scale_counts(job: Sequence[Override], config: dict[str, Any]) -> None:
    """A length that the user gives by `scale` must not be beaten in silence by one of `trainer`."""
    asked = [o for o in job if o.key_or_group == "scale.tokens" and config["scale"]["tokens"] is not None]
    beaten = [key for key in ("max_steps", "max_tokens", "max_epochs") if config["trainer"].get(key) is not None]
    if asked and beaten:
        field = f"trainer.{beaten[0]}"
        why = f"contradicts {field} = {config['trainer'][beaten[0]]}: give one length; {field}=null leaves it to scale"
        raise ConfigError("scale.tokens", config["scale"]["tokens"], why)


class Checker:
    """Composes and checks jobs; those with the same group choices share one composition.

    Args:
        composer: entered once; it may have been left since.
    """

    def __init__(self, composer: Composer) -> None:
        self.composer = composer
        self._bases: dict[tuple[str, ...], tuple[DictConfig, dict[str, Any]]] = {}
        self._new: set[str] = set()

    def jobs(
        self, lists: Sequence[list[Override]], *, sweep: bool, values: bool = True, repeats: bool = False
    ) -> list[Job]:
        """Checks all jobs of a command.

        Args:
            lists: each job's overrides.
            sweep: whether they are a sweep's.
            values: False checks names only, and answers no jobs.
            repeats: whether a job that is there twice is left out the second time, rather than refused.

        Raises:
            ConfigError: the first problem found.
        """
        found: list[Job] = []
        seen: dict[str, int] = {}
        for number, job in enumerate(lists):
            cfg = self.compose(job, sweep)
            if not values:
                continue
            config = self._config(cfg, job, sweep, first=not number)
            same = seen.setdefault(config_hash(config), number)
            if same == number:
                found.append(Job(config, [self.marked(o) for o in job if not _of_the_command(o)]))
            elif not repeats:
                changed = " ".join(o.input_line or "" for o in job)
                why = f"job {number} is the same configuration as job {same}: leave one out"
                raise ConfigError("sweep", changed, why)
        return found

    def job(self, lines: Sequence[str]) -> Job:
        """Checks one job of a sweep.

        Args:
            lines: its overrides, one value each.

        Raises:
            ConfigError: the first problem found.
        """
        return self.jobs([self.composer.parse(lines)], sweep=True)[0]

    def _config(self, cfg: DictConfig, job: list[Override], sweep: bool, *, first: bool) -> dict[str, Any]:
        config = check_job(cfg)
        if sweep and first:
            check_launcher(cfg.hydra, config)
        if sweep and starts_elsewhere(config["resume"]) and Path(config["resume"]).exists():
            check_start(cfg, config)  # a single run asks later: one that goes on needs it no more
        _check_scale_counts(job, config)
        return config

    def compose(self, job: list[Override], sweep: bool) -> DictConfig:
        """The configuration of a job whose every name was found right."""
        choices = [override for override in job if is_group_choice(override, self.composer)]
        for override in choices:
            check_group(override, self.composer)
        key = tuple(str(override.input_line) for override in choices)
        if key not in self._bases:
            base = self.composer.compose(key, sweep=sweep)
            self._bases[key] = base, OmegaConf.to_container(base, resolve=False)  # type: ignore[assignment]
        base, tree = self._bases[key]
        fields = [override for override in job if override not in choices]
        for override in fields:
            if check_field(override, tree, self.composer):
                self._new.add(override.key_or_group)
        return self.composer.with_fields(base, self.composer.parse([self.marked(override) for override in fields]))

    def marked(self, override: Override) -> str:
        """The override as Hydra wants it: new keys of open maps need `++`."""
        line = str(override.input_line)
        return f"++{line}" if override.key_or_group in self._new and not line.startswith(("+", "~")) else line


class _Todo(NamedTuple):
    jobs: list[list[Override]]
    swept: list[str] | None = None
    search: Search | None = None


def _expand(checker: Checker, overrides: list[Override]) -> _Todo:
    """The jobs of a sweep; a search where one decides later, one representative job where a sweeper not ours does."""
    composer = checker.composer
    plain = [o for o in overrides if not o.is_sweep_override()]
    hydra = [str(o.input_line) for o in plain if o.key_or_group.startswith(("hydra/", "hydra.", "experiment"))]
    for override in plain:
        if is_group_choice(override, composer):
            check_group(override, composer)
    sweeper = composer.compose(hydra, sweep=True).hydra.sweeper
    params = OmegaConf.to_container(sweeper.get("params")) if sweeper.get("params") else {}
    lines = [f"{key}={value}" for key, value in dict(params or {}).items()]
    every = composer.parse(lines) + list(overrides)
    kind = str(sweeper.get("_target_")).rpartition(".")[2]
    if kind == "BasicSweeper":
        why = "knows no sweep folder and no comparison; grid, the default, makes the same jobs: leave it out"
        raise ConfigError("hydra/sweeper", "basic", why)
    swept = list(dict.fromkeys(override.key_or_group for override in every if override.is_sweep_override()))
    if kind in _SEARCHES:
        from lightning_opt.launch import searching

        module = importlib.import_module(f"lightning_opt.launch.{_SEARCHES[kind]}")
        decider, seeds = module.decider(checker, every, OmegaConf.to_container(sweeper, resolve=True))
        first = composer.parse([*decider.first[0].lines, *filter(None, seeds[:1])])
        return _Todo([first], swept, searching.Search(decider, seeds, checker.job))
    if kind != "GridSweeper":
        return _Todo([composer.parse([_first_choice(override) for override in every])])
    check_listed(every, "a grid")
    batches = BasicSweeper.split_arguments(every, None)
    return _Todo([composer.parse(job) for batch in batches for job in batch], swept)


def check_listed(overrides: Sequence[Override], by: str) -> None:
    """Checks that every swept field lists its values.

    Args:
        overrides: of the command.
        by: who wants them so, in words.

    Raises:
        ConfigError: one gives an interval.
    """
    for override in overrides:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            value = str(override.input_line).partition("=")[2]
            raise ConfigError(
                override.key_or_group, value, f"cannot be listed by {by}: write choice(...) or range(...)"
            )


def _first_choice(override: Override) -> str:
    if not override.is_sweep_override():
        return str(override.input_line)
    if override.is_discrete_sweep():
        return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"
    return f"{override.get_key_element()}={override.value().start}"  # type: ignore[union-attr]
