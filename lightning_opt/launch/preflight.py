"""Checks a whole command before anything starts: every name, every value, every job of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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

_OF_THE_COMMAND = ("hydra.", "hydra/", "on_failure", "jobs_per_device")


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
        jobs: in order; one where it is no sweep.
        swept: the keys that take several values; None where it is no sweep, or another sweeper than ours decides.
        folder: the run folder the user named by `hydra.run.dir`, or the sweep folder by `hydra.sweep.dir`.
    """

    overrides: list[str]
    jobs: list[Job]
    swept: list[str] | None
    folder: Path | None


def check_command(composer: Composer, lines: Sequence[str], *, multirun: bool = False, values: bool = True) -> Command:
    """Checks every job of a command.

    Args:
        composer: an entered `Composer`.
        lines: the `key=value` arguments.
        multirun: whether `-m` was given.
        values: False checks names only (for `--cfg`).

    Raises:
        ConfigError: the first problem found.
    """
    checker = _Checker(composer)
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
    grid = _expand(composer, overrides) if multirun else _Grid([overrides], None)
    found, seen = [], {}
    for number, job in enumerate(grid.jobs):
        cfg = checker.compose(job, multirun)
        if not values:
            continue
        config = check_job(cfg)
        if multirun and not number:
            check_launcher(cfg.hydra, config)
        if multirun and starts_elsewhere(config["resume"]) and Path(config["resume"]).exists():
            check_start(cfg, config)  # a single run asks later: one that goes on needs it no more
        _check_scale_counts(job, config)
        same = seen.setdefault(config_hash(config), number)
        if same != number:
            changed = " ".join(o.input_line or "" for o in job)
            raise ConfigError("sweep", changed, f"job {number} is the same configuration as job {same}: leave one out")
        found.append((config, job))
    jobs = [Job(config, [checker.marked(o) for o in job if not _of_the_command(o)]) for config, job in found]
    field = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    _check_folder_keys(overrides, multirun)
    marked = [checker.marked(override) for override in overrides]
    folder = None
    if any(o.key_or_group == field for o in overrides) and (grid.swept is not None or not multirun):
        folder = _named(composer, [checker.marked(o) for o in grid.jobs[0]], field)
        marked = [line for line in marked if not line.lstrip("+").startswith(f"{field}=")]
    return Command(marked, jobs, grid.swept, folder)


def compose_checked(composer: Composer, lines: Sequence[str]) -> DictConfig:
    """Composes a command that is no run, with every name checked.

    Args:
        composer: an entered `Composer`.
        lines: the `key=value` arguments.

    Raises:
        ConfigError: there is no such group, option or field.
    """
    return _Checker(composer).compose(composer.parse(lines), sweep=False)


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


class _Checker:
    """Composes and checks jobs; those with the same group choices share one composition."""

    def __init__(self, composer: Composer) -> None:
        self.composer = composer
        self._bases: dict[tuple[str, ...], tuple[DictConfig, dict[str, Any]]] = {}
        self._new: set[str] = set()

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


class _Grid(NamedTuple):
    jobs: list[list[Override]]
    swept: list[str] | None


def _expand(composer: Composer, overrides: list[Override]) -> _Grid:
    """The jobs of a sweep; one representative job where a sweeper other than a grid decides later."""
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
    if kind != "GridSweeper":
        return _Grid([composer.parse([_first_choice(override) for override in every])], None)
    for override in every:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            value = str(override.input_line).partition("=")[2]
            raise ConfigError(
                override.key_or_group, value, "cannot be listed by a grid: write choice(...) or range(...)"
            )
    batches = BasicSweeper.split_arguments(every, None)
    swept = list(dict.fromkeys(override.key_or_group for override in every if override.is_sweep_override()))
    return _Grid([composer.parse(job) for batch in batches for job in batch], swept)


def _first_choice(override: Override) -> str:
    if not override.is_sweep_override():
        return str(override.input_line)
    if override.is_discrete_sweep():
        return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"
    return f"{override.get_key_element()}={override.value().start}"  # type: ignore[union-attr]
