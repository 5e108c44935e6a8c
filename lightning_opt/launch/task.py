"""What Hydra calls for each job: a plain dictionary, checked, in its own run folder, handed to `job`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_opt.launch.preflight import check_job
from lightning_opt.launch.resolve import redact, saved_text
from lightning_opt.plan import ConfigError, tuned
from lightning_opt.run_folder import ExitCode, FolderRefused, RunFolder, claim, config_hash

RUNS = Path("runs")
_STOPS = (ExitCode.INTERRUPTED, ExitCode.PREEMPTED)  # whoever interrupts one job of a sweep means the sweep

# Hydra hands neither anything but a configuration to a job nor a job's answer back, so both pass by here.
_named_folder: Path | None = None
_codes: list[int] = []


def begin(named_folder: Path | None) -> None:
    """Gets ready for the jobs of one command.

    Args:
        named_folder: the run folder the user named, if any.
    """
    global _named_folder
    _named_folder = named_folder
    _codes.clear()


def report(codes: Sequence[int]) -> None:
    """For a sweeper: the exit codes of all jobs, which may have run in other processes."""
    _codes[:] = codes


def exit_code() -> int:
    """One exit code for all jobs since `begin`: a job's own where there is one, else 1 before 3 before 0."""
    if len(_codes) == 1:
        return int(_codes[0])
    if any(code not in (ExitCode.FINISHED, ExitCode.DIVERGED) for code in _codes):
        return int(ExitCode.FAILED)
    return int(ExitCode.DIVERGED if ExitCode.DIVERGED in _codes else ExitCode.FINISHED)


def run_job(cfg: DictConfig) -> int:
    """Runs one job; never raises for what the job does, so that the other jobs of a sweep still run.

    Args:
        cfg: as Hydra composed it, without the `hydra` node.

    Returns:
        Its exit code.
    """
    code = _guarded(cfg)
    _codes.append(code)
    if code in _STOPS:
        raise SystemExit(code)
    return code


def _guarded(cfg: DictConfig) -> int:
    try:
        return _run(cfg)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return ExitCode.CONFIGURATION
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except Exception:
        traceback.print_exc()
        return ExitCode.FAILED


def _run(cfg: DictConfig) -> int:
    hydra = HydraConfig.get()
    config = check_job(cfg)
    root = RUNS
    if hydra.mode == RunMode.MULTIRUN and str(hydra.sweep.dir) != ".":
        root = Path(str(hydra.sweep.dir))
    folder = _claim(root, config)
    text, overrides, source = saved_text(cfg), redact(OmegaConf.to_container(hydra.overrides.task)), tuned_values(cfg)

    from lightning_opt import job  # heavy: only once everything is found right

    return job.run(config, folder, overrides=overrides, saved_config=text, instantiate=instantiate, tuned=source)


def _claim(root: Path, config: dict[str, Any]) -> RunFolder:
    field, place = "hydra.sweep.dir" if root != RUNS else "hydra.run.dir", _named_folder or root
    try:
        return claim(root, config["name"], config_hash(config), resume=config["resume"], path=_named_folder)[0]
    except FolderRefused as error:
        raise ConfigError(field, str(place), f"must be {error}") from None
    except OSError as error:
        raise ConfigError(field, str(place), f"must be a folder we can write to ({error.strerror})") from None


def tuned_values(cfg: DictConfig) -> dict[str, Any] | None:
    """The tuned record that is in effect, with those of its values that nothing overrode; None without one."""
    choices = HydraConfig.get().runtime.choices
    name = choices.get("tuned")
    if not name:
        return None
    optimizer, _, cell = str(name).partition("/")
    model, _, scale = cell.rpartition("_")
    record = tuned(optimizer, model, scale)
    if record is None:
        return None
    kept = {key: value for key, value in record.values.items() if _plain(OmegaConf.select(cfg, key)) == value}
    return {"source": record.source, "measured": record.measured, "values": kept} if kept else None


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def instantiate(config: Any, *args: Any, **keywords: Any) -> Any:
    """Hydra's `instantiate`, with plain lists and dictionaries for whatever it builds.

    Raises:
        Exception: what the constructor raised, as it raised it: Hydra would wrap a ConfigError beyond recognition.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as build

    try:
        return build(config, *args, _convert_="all", **keywords)
    except InstantiationException as error:
        raise error.__cause__ or error from None
