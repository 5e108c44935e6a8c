"""Reads a run folder into one plain object: whatever is missing or unreadable is empty and noted, secrets are gone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_opt.reports.quantities import finite
from lightning_opt.reports.secrets import clean
from lightning_opt.run_folder import RunFolder, read_events, read_json, read_metrics, summarize

log = logging.getLogger("lightning_opt.reports")

Series = tuple[list[float], list[float]]
"""Two equally long lists, x and y, without gaps."""


@dataclass(frozen=True)
class Run:
    """What a run folder says, ready to be shown.

    Attributes:
        folder: the run folder.
        config: the configuration (``config.yaml``), secrets redacted, as all text here.
        overrides: the command line's overrides.
        plan: ``plan.json``.
        env: ``env.json``.
        status: ``status.json``.
        summary: ``summary.json``, or derived from the other files where it is missing.
        metrics: columns of ``metrics.csv``; None where a cell is empty.
        events: lines of ``events.jsonl``.
        results: ``evaluation/results.json``, lm-eval's own format.
        missing: names of the files that are not there or, then marked ``(unreadable)``, cannot be read.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[float | None]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    def lacks(self, name: str) -> bool:
        """Whether the file is among the missing."""
        return name in {*self.missing, *(missing.removesuffix(" (unreadable)") for missing in self.missing)}

    @property
    def name(self) -> str:
        """The run's name, else its folder's."""
        return str(self.summary.get("name") or self.plan.get("name") or self.config.get("name") or self.folder.name)

    @property
    def state(self) -> str:
        """RUNNING, FINISHED, DIVERGED, PREEMPTED or FAILED; UNKNOWN where no file says."""
        return str(self.status.get("state") or self.summary.get("state") or "UNKNOWN")

    def asked(self, dotted: str) -> Any:
        """A value of the configuration by its dotted name, or None."""
        value: Any = self.config
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def part(self, source: str, key: str) -> dict[str, Any]:
        """A table inside one of the files, empty where it is absent or something else."""
        value = getattr(self, source).get(key)
        return value if isinstance(value, dict) else {}

    def rows(self, source: str, key: str) -> list[dict[str, Any]]:
        """A list of tables inside one of the files, empty where it is absent or something else."""
        value = getattr(self, source).get(key)
        return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []

    def series(self, column: str, x: str = "step") -> Series:
        """The points of a column of ``metrics.csv`` where both it and the x column hold a finite number."""
        pairs = zip(self.metrics.get(x, []), self.metrics.get(column, []), strict=False)
        kept = [(a, b) for a, b in ((finite(a), finite(b)) for a, b in pairs) if a is not None and b is not None]
        return [a for a, _ in kept], [b for _, b in kept]

    def family(self, prefix: str) -> dict[str, Series]:
        """The series of every column ``<prefix>/<name>`` that holds a point, by name, in the file's order."""
        names = [column for column in self.metrics if column.startswith(f"{prefix}/")]
        found = {column.removeprefix(f"{prefix}/"): self.series(column) for column in names}
        return {name: series for name, series in found.items() if series[0]}

    def corpora(self) -> list[str]:
        """Names of the corpora: those planned, then any that only the metrics or the summary know."""
        names = [str(row.get("name")) for row in self.rows("plan", "corpora")]
        return list(dict.fromkeys([*names, *self.part("summary", "val_loss_by_corpus"), *self.family("val/loss")]))


def override_key(override: str) -> str:
    """The name that an override sets, without Hydra's ``+`` and ``~`` and without its package."""
    return override.lstrip("+~").split("=")[0].split("@")[0]


def read(folder: Path) -> Run:
    """Reads a run folder.

    Args:
        folder: the folder; files that a run of ours writes may be missing or cut off.

    Returns:
        The run with every secret-looking value redacted.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder at {folder}")
    paths = RunFolder(folder)
    missing: list[str] = []

    def take(path: Path, reader: Callable[[Path], Any], kind: type) -> Any:
        name = path.relative_to(folder).as_posix()
        if not path.is_file():
            missing.append(name)
            return kind()
        try:
            value = reader(path)
        except (OSError, ValueError, yaml.YAMLError) as error:
            log.warning("%s of %s cannot be read: %s", name, folder, error)
            missing.append(f"{name} (unreadable)")
            return kind()
        return clean(value) if isinstance(value, kind) else kind()

    run = {
        "config": take(paths.config, _read_yaml, dict),
        "overrides": take(paths.overrides, _read_lines, list),
        "plan": take(paths.plan, read_json, dict),
        "env": take(paths.env, read_json, dict),
        "status": take(paths.status, read_json, dict),
        "metrics": take(paths.metrics, read_metrics, dict),
        "events": [event for event in take(paths.events, _read_events, list) if isinstance(event, dict)],
        "results": take(paths.results, read_json, dict),
        "summary": take(paths.summary, read_json, dict),
    }
    if not run["summary"]:
        run["summary"] = _derived_summary(folder)
    not_an_error = {"events.jsonl"}  # written with the first event: a calm run has none
    evaluation = run["config"].get("evaluation")
    if isinstance(evaluation, dict) and evaluation.get("suite") == "none":
        not_an_error.add("evaluation/results.json")
    return Run(folder=folder, missing=tuple(name for name in missing if name not in not_an_error), **run)


def _read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _read_events(path: Path) -> list[Any]:
    events = read_events(path)
    if not events and path.stat().st_size:
        raise ValueError("no line of it is an event")
    return events


def _read_lines(path: Path) -> list[str]:
    """Overrides: one a line, or a YAML list of them as Hydra writes it."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line.removeprefix("- ") for line in lines if line and line != "[]"]


def _derived_summary(folder: Path) -> dict[str, Any]:
    try:
        return clean(json.loads(json.dumps(summarize(folder))))
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        log.warning("no summary of %s can be derived: %s", folder, error)
        return {}
