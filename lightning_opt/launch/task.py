"""What Hydra calls for each job: a plain dictionary, checked, in its own run folder, handed to `job`."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_opt.launch.preflight import check_job
from lightning_opt.launch.resolve import redact, saved_text
from lightning_opt.plan import ConfigError, tuned
from lightning_opt.run_folder import claim, config_hash

RUNS = Path("runs")
FAILED, WRONG, INTERRUPTED = 1, 2, 130
_STOPS = (INTERRUPTED, 143)  # whoever interrupts one job of a sweep means the sweep

# Shared with `entry` inside one process: the folder the user named, and each job's exit code.
named_folder: Path | None = None
codes: list[int] = []


def run_job(cfg: DictConfig) -> int:
    """Runs one job; never raises for what the job does, so that the other jobs of a sweep still run.

    Args:
        cfg: as Hydra composed it, without the `hydra` node.

    Returns:
        Its exit code.
    """
    code = _guarded(cfg)
    codes.append(code)
    if code in _STOPS:
        raise SystemExit(code)
    return code


def _guarded(cfg: DictConfig) -> int:
    try:
        return _run(cfg)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return FAILED


def _run(cfg: DictConfig) -> int:
    hydra = HydraConfig.get()
    config = check_job(cfg)
    root = RUNS
    if hydra.mode == RunMode.MULTIRUN and str(hydra.sweep.dir) != ".":
        root = Path(str(hydra.sweep.dir))
    folder, _ = claim(root, config["name"], config_hash(config), resume=config["resume"], path=named_folder)
    text, overrides, source = saved_text(cfg), redact(OmegaConf.to_container(hydra.overrides.task)), tuned_values(cfg)

    from lightning_opt import job  # heavy: only once everything is found right

    return job.run(config, folder, overrides=overrides, saved_config=text, instantiate=instantiate, tuned=source)


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
    """Hydra's `instantiate`, with plain lists and dictionaries for whatever it builds."""
    from hydra.utils import instantiate as build

    return build(config, *args, _convert_="all", **keywords)
