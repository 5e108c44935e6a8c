"""Which launchers there are beside ours, and what each cannot do."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig

from lightning_opt.plan import ConfigError

_GROUP = "hydra/launcher"
_OURS = "processes"
_PACKAGES = ("hydra_joblib_launcher", "hydra_submitit_launcher")
_INSTALL = "pip install -c constraints.txt -e '.[run,launchers]'"


def check_launcher(hydra: DictConfig, config: dict[str, Any]) -> None:
    """Checks that the chosen launcher is installed and can do what is asked of it.

    Args:
        hydra: the `hydra` node of a composed sweep.
        config: a job's resolved configuration.

    Raises:
        ConfigError: it cannot; says what can.
    """
    name = str(hydra.runtime.choices[_GROUP])
    package = str(hydra.launcher.get("_target_")).split(".")[1]
    if package in _PACKAGES and find_spec(f"hydra_plugins.{package}") is None:
        raise ConfigError(_GROUP, name, f"needs a package more: {_INSTALL}")
    if name == _OURS:
        return
    if config["on_failure"] != "continue":
        why = f"{_GROUP}={name} knows only continue; {_GROUP}={_OURS} knows stop and retry:N too"
        raise ConfigError("on_failure", config["on_failure"], why)
    if config["jobs_per_device"] != 1 and name != "joblib":
        raise ConfigError("jobs_per_device", config["jobs_per_device"], f"{_GROUP}={name} takes only 1")
