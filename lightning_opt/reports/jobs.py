"""The jobs of a comparison: run folders, those that never started too, with only what sets them apart."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from lightning_opt.plan import ConfigError, normalised
from lightning_opt.reports import quantities as q
from lightning_opt.reports.findings import optimizer_name, spelled
from lightning_opt.reports.reading import Run, override_key, read
from lightning_opt.reports.secrets import clean, clean_text
from lightning_opt.run_folder import RunFolder, SweepFolder, config_hash, owner_seems_gone, short_names

log = logging.getLogger("lightning_opt.reports")

_COLUMNS = ("step", "tokens", "time_s", "train/loss", "val/loss")
CHANGES_NOTHING = r"hydra([./].*)?|name|resume|logger([./].*)?|on_failure|jobs_per_device|data\.cache_dir"
"""Keys of overrides that make no other run: where it and its data lie, who is told, how a sweep goes about its jobs."""


@dataclass(frozen=True)
class Job:
    """One job.

    Attributes:
        folder: its run folder, which need not exist yet.
        run: what the folder says.
        overrides: what was asked of it, secrets redacted.
        alive: whether the process that owns the folder still works in it.
        optimizer: the optimizer as it is usually spelled.
        differs: overrides that are not the same in all jobs, by their dotted name, as plain values.
        command: the command line of the sweep that asked for it last; empty where none did.
        shared: those of them that are the same in all jobs it is ranked with.
    """

    folder: Path
    run: Run
    overrides: tuple[str, ...] = ()
    alive: bool = False
    optimizer: str = ""
    differs: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    shared: frozenset[str] = frozenset()

    @property
    def state(self) -> str:
        """The run's state; NOT STARTED without a record, STOPPED where it says RUNNING but its process is gone."""
        if not self.run.status and not self.run.metrics and not self.run.plan:
            return "NOT STARTED"
        return "STOPPED" if self.run.state == "RUNNING" and not self.alive else self.run.state

    @property
    def loss(self) -> float | None:
        """Validation loss at the end, nats per token; None for a run that did not come to its end."""
        return q.finite(self.run.summary.get("val_loss")) if self.state == "FINISHED" else None

    @property
    def known(self) -> Mapping[str, Any]:
        """What differs, without what nobody asked of a job that wrote no configuration."""
        return self.differs if self.run.config else {k: v for k, v in self.differs.items() if v is not None}

    @property
    def setting(self) -> str:
        """What sets it apart beside the optimizer and the seed: ``lr_scale=2, weight_decay=0.1``.

        A null that nobody asked of it is left out: most are fields that its optimizer has not.
        """
        names, asked = short_names(self.differs), {override_key(text) for text in self.overrides}
        passed = {"optimizer", "seed", *self.shared}
        rest = [key for key, value in self.known.items() if key not in passed and (value is not None or key in asked)]
        return ", ".join(f"{names[key]}={shown(self.known[key])}" for key in rest)

    @property
    def label(self) -> str:
        """The setting with the seed, where seeds differ."""
        return ", ".join(filter(None, (self.setting, f"seed={self.known['seed']}" if "seed" in self.known else "")))

    @cached_property
    def identity(self) -> str:
        """Equal for jobs that differ by nothing but their seed."""
        config = self.run.config
        if config:
            with contextlib.suppress(ConfigError):  # a file that somebody broke is compared as it stands
                config = normalised(config)  # config.yaml says what was asked: 1 and 1.0
            return config_hash({**config, "seed": None})
        return "\n".join(sorted(text for text in self.overrides if override_key(text) != "seed"))


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        folder: where the report lies; links are relative to it.
        jobs: in the order they were asked for.
        keys: overrides that are not the same in all jobs.
        command: the sweep's own command line; empty where runs were put together by hand.
        trouble: what could not be read, in words.
        mixed: whether runs that may not be ranked together were put together on purpose.
        sources: the folders that were put together by hand, as they were given; empty for a sweep.
    """

    folder: Path
    jobs: tuple[Job, ...]
    keys: tuple[str, ...] = ()
    command: str = ""
    trouble: str = ""
    sources: tuple[Path, ...] = ()
    mixed: bool = False


def of_sweep(folder: Path) -> Comparison:
    """Reads a sweep folder, finished or not.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no sweep folder at {folder}")
    sweep, trouble, command = SweepFolder(folder), "", ""
    try:
        command = clean_text(sweep.command)
        asked = [(job.folder.path, job.overrides, clean_text(job.command) or command) for job in sweep.jobs()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("sweep.json of %s cannot be read: %s", folder, error)
        asked = []
    if not asked:
        trouble = "sweep.json cannot be read: the runs found in the folder are shown; jobs that never started are not."
        asked = [(path, None, "") for path in sorted(folder.iterdir()) if is_run(path)]
    jobs = [replace(_job(path, overrides), command=line) for path, overrides, line in asked]
    return _told_apart(folder, jobs, command, trouble)


def of_runs(runs: Sequence[Path], out: Path) -> Comparison:
    """Reads any run folders; a sweep folder among them stands for all its jobs.

    Raises:
        FileNotFoundError: one of them is no folder.
    """
    jobs: list[Job] = []
    for path in runs:
        jobs.extend(of_sweep(path).jobs if is_sweep(path) else [_job(Path(path), None, must=True)])
    unique = {job.folder.resolve(): job for job in jobs}
    given = tuple(dict.fromkeys(path for path in map(Path, runs) if is_sweep(path) or is_run(path)))
    return replace(_told_apart(out, list(unique.values())), sources=given)


def is_sweep(path: Path) -> bool:
    """Whether this is a sweep's folder."""
    return SweepFolder(Path(path)).sweep.is_file()


def is_run(path: Path) -> bool:
    """Whether this is a run's folder."""
    folder = RunFolder(Path(path))
    return any(file.is_file() for file in (folder.metrics, folder.plan, folder.status, folder.summary))


def shown(value: Any) -> str:
    """A value as one would type it: 0.0005, true, adamw."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return q.trimmed(value) if q.finite(value) is not None else str(value)
    if isinstance(value, list):
        return f"[{','.join(shown(item) for item in value)}]"
    return "null" if value is None else str(value)


def link(job: Job, page: Path) -> str:
    """The job's own report as the page names it; empty where there is none."""
    report = RunFolder(job.folder).report_html
    if not report.is_file():
        return ""
    relative = quote(os.path.relpath(report.resolve(), page.resolve()).replace(os.sep, "/"), safe="/")
    return relative if relative.startswith("..") else f"./{relative}"


def _job(path: Path, overrides: Sequence[str] | None, must: bool = False) -> Job:
    try:
        run = read(path)
    except FileNotFoundError:
        if must:
            raise
        run = Run(path)
    # one run's other columns are in its own report; a sweep's would fill the memory
    run = replace(run, metrics={name: run.metrics[name] for name in _COLUMNS if name in run.metrics})
    asked = run.overrides if overrides is None else clean([str(text) for text in overrides])
    return Job(path, run, tuple(asked), _alive(run))


def _alive(run: Run) -> bool:
    try:
        return not owner_seems_gone(run.status)
    except (ValueError, TypeError, KeyError, AttributeError):
        log.warning("who owns %s cannot be told", run.folder)
        return False


def _told_apart(folder: Path, jobs: list[Job], command: str = "", trouble: str = "") -> Comparison:
    asked = [_asked(job.overrides) for job in jobs]
    names = list(dict.fromkeys(key for one in asked for key in one))
    values = [
        {key: one[key] if key in one else _configured(job.run, key) for key in names}
        for job, one in zip(jobs, asked, strict=True)
    ]
    keys = [key for key in names if len({shown(one[key]) for one in values}) > 1]
    keys.sort(key=lambda key: (key != "optimizer", key == "seed"))  # stable: the order of the command otherwise
    ready = [
        replace(job, optimizer=_optimizer(job.run, one), differs={key: one[key] for key in keys})
        for job, one in zip(jobs, values, strict=True)
    ]
    named = {job.optimizer for job in ready if job.optimizer}
    only = named.pop() if len(named) == 1 and "optimizer" not in keys else "an unnamed optimizer"
    ready = [job if job.optimizer else replace(job, optimizer=only) for job in ready]
    return Comparison(folder, tuple(ready), tuple(keys), command, trouble)


def _asked(overrides: Iterable[str]) -> dict[str, Any]:
    found = {}
    for text in overrides:
        if not re.fullmatch(CHANGES_NOTHING, key := override_key(text)):
            _, sign, value = text.partition("=")
            found[key] = _value(value) if sign else "left out"
    return found


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, bool | str | list) else text


def _configured(run: Run, key: str) -> Any:
    """What the configuration ended up with where nobody asked; a group's value is its choice's name."""
    value = run.asked(key.replace("/", "."))
    return value.get("name") if isinstance(value, dict) else value


def _optimizer(run: Run, values: Mapping[str, Any]) -> str:
    if run.summary.get("optimizer") or run.asked("optimizer.name"):
        return optimizer_name(run)
    return spelled(str(values["optimizer"])) if values.get("optimizer") else ""
