"""What Hydra calls for each job: a plain dictionary, checked, in its own run folder, handed to `job`."""

from __future__ import annotations

import faulthandler
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_opt.checkpoints import find
from lightning_opt.job.signals import Terminated, terminable
from lightning_opt.launch.preflight import check_job, check_start
from lightning_opt.launch.refusing import give_up, refuse, say
from lightning_opt.launch.resolve import redact, saved_text
from lightning_opt.launch.tuning import chosen_record
from lightning_opt.plan import ConfigError, place, secrets
from lightning_opt.run_folder import (
    FINISHED_STATES,
    ExitCode,
    FolderRefused,
    RunFolder,
    adoptable,
    claim,
    config_hash,
    owner_is_gone,
    read_status,
    record_end,
    starts_elsewhere,
)

RUNS = Path("runs")
STOPS = (ExitCode.INTERRUPTED, ExitCode.PREEMPTED)  # whoever interrupts one job of a sweep means the sweep

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


def note(code: int) -> None:
    """Adds the exit code of a job, which may have run in another process."""
    _codes.append(code)


def stopped() -> int | None:
    """The exit code of a job that was interrupted or asked to end, if any was."""
    return next((int(code) for code in _codes if code in STOPS), None)


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
    note(code)
    if code in STOPS:
        raise SystemExit(int(code))
    return int(code)


def _guarded(cfg: DictConfig) -> int:
    if not place().first:
        return _follow(cfg)
    with terminable() as signals:
        try:
            signals.begin()
            config = check_job(cfg)
            folder = _claim(cfg, config)
        except ConfigError as error:
            return refuse(error)
        except (KeyboardInterrupt, Terminated) as stop:
            return give_up(stop)
        try:
            return _run(cfg, config, folder)
        except ConfigError as error:
            return _ended(folder, config, ExitCode.CONFIGURATION, str(error))
        except KeyboardInterrupt:
            return _ended(folder, config, ExitCode.INTERRUPTED, "interrupted")
        except Terminated as stop:
            return _ended(folder, config, ExitCode.PREEMPTED, f"stopped by {stop.name}")
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return _ended(folder, config, ExitCode.FAILED, reason, traceback.format_exc())


def _follow(cfg: DictConfig) -> int:
    """Works along in a run that torchrun or srun started several processes for: the first has its folder and speaks."""
    try:
        config = check_job(cfg)
    except ConfigError as error:
        return refuse(error)
    from lightning_opt import job

    return job.run(config, None, overrides=[], saved_config="", instantiate=instantiate)


def _ended(folder: RunFolder, config: dict[str, Any], code: ExitCode, reason: str, trace: str = "") -> int:
    """Says and records how a job ended that did not come as far as its own stages, or was cut off within them."""
    status = read_status(folder.status)
    if code in STOPS:
        reason += f" at step {status['step']}" if status.get("step") else " before the first step"
    reason, trace = secrets.mask(reason), secrets.mask(trace)
    state = "PREEMPTED" if code in STOPS else "FAILED"
    if status.get("state", "RUNNING") == "RUNNING":  # since it was claimed
        record_end(folder, config_hash(config), state, reason, trace)
    say(trace.rstrip() or reason)
    return code


def _run(cfg: DictConfig, config: dict[str, Any], folder: RunFolder) -> int:
    hydra = HydraConfig.get()
    text, overrides, source = saved_text(cfg), redact(OmegaConf.to_container(hydra.overrides.task)), tuned_values(cfg)

    from lightning_opt import job  # heavy: only once everything is found right

    with _crashes_in(folder.log):
        return job.run(config, folder, overrides=overrides, saved_config=text, instantiate=instantiate, tuned=source)


@contextmanager
def _crashes_in(path: Path) -> Iterator[None]:
    """A crash below Python (a segmentation fault) leaves its stack in this file."""
    before = faulthandler.is_enabled()
    with path.open("a") as file:
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()
    if before and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)


def _claim(cfg: DictConfig, config: dict[str, Any]) -> RunFolder:
    """The run's folder: the one that the sweep chose, the one that the user named, or a new one below `RUNS`.

    Where it is new, ``resume=PATH`` is checked before it is made.
    """
    hydra = HydraConfig.get()
    root, named, resume, field = RUNS, _named_folder, config["resume"], "hydra.run.dir"
    if hydra.mode == RunMode.MULTIRUN:
        field = "hydra.sweep.dir"
        root = RUNS if str(hydra.sweep.dir) == "." else Path(str(hydra.sweep.dir))
        if str(hydra.sweep.subdir) != ".":  # the sweep's folder is new or not; its jobs go on
            named, resume = root / str(hydra.sweep.subdir), "auto"
    hash, name = config_hash(config), config["name"]
    if starts_elsewhere(config["resume"]):
        own = adoptable(root, name, hash, path=named)
        if own is None or not find(own.checkpoints):
            check_start(cfg, config)
    try:
        folder, adopted = claim(root, name, hash, resume=resume, path=named)
    except FolderRefused as error:
        raise ConfigError(field, str(named), f"must be {error}") from None
    except OSError as error:
        raise ConfigError(field, str(named or root), f"must be a folder we can write to ({error.strerror})") from None
    if not adopted and named is None and resume == "auto" and hydra.mode != RunMode.MULTIRUN:
        _tell_of_unfinished(folder, hash)
    return folder


def _tell_of_unfinished(folder: RunFolder, hash: str) -> None:
    """The run of this name before this one may be what the user meant to go on with, and then changed a value."""
    earlier = [path for path in sorted(folder.path.parent.glob("*Z-*")) if path != folder.path]
    last = RunFolder(earlier[-1]) if earlier else folder
    status = read_status(last.status)
    unfinished = owner_is_gone(status) and status.get("state") not in FINISHED_STATES
    if unfinished and status.get("config_hash") != hash and (found := find(last.checkpoints)):
        where = f"{last.path} has another configuration and was left unfinished at step {found[0].step}"
        say(f"{where}: to go on from there add resume={last.path}")


def tuned_values(cfg: DictConfig) -> dict[str, Any] | None:
    """The tuned record that is in effect, with those of its values that nothing overrode; None without one."""
    record = chosen_record(HydraConfig.get().runtime.choices)
    if record is None:
        return None
    kept = {key: value for key, value in record.values.items() if _plain(OmegaConf.select(cfg, key)) == value}
    if not kept:
        return None
    told = ("source", "measured", "tokens", "tokens_per_step")
    return {**{name: getattr(record, name) for name in told}, "values": kept}


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
