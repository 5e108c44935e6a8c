"""Hydra's own composition, used before `hydra.main` so that every job is known and checked before the first starts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lightning_opt.launch.tuning import register_tuned
from lightning_opt.plan import ConfigError, tuned_records

CONFIG_NAME = "train"
CONF = Path(__file__).resolve().parents[2] / "conf"

# joblib's workers load the plugins, and with them those schemas, once more.
warnings.filterwarnings("ignore", r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema", UserWarning)


class Composer:
    """Composes configurations from a folder of YAML files; a context manager, because Hydra's state is global.

    Args:
        conf: the folder.
        extra: one more folder to search first (`--config-dir`).
        name: the primary configuration.
    """

    def __init__(self, conf: Path = CONF, extra: Path | None = None, name: str = CONFIG_NAME) -> None:
        self.conf, self.extra, self.name = conf, extra, name
        self._options: dict[str, list[str]] = {}
        if extra is not None and not extra.is_dir():
            raise ConfigError("--config-dir", str(extra), "no such folder")

    def __enter__(self) -> Composer:
        path = create_config_search_path(str(self.conf))
        if self.extra is not None:
            path.prepend("command-line", f"file://{self.extra.resolve()}", SearchPathQuery(provider="schema"))
        GlobalHydra.instance().clear()
        ConfigStore.instance().__deepcopy__ = _shared
        register_tuned(self.options_in("scale"), self.options_in("schedule"))
        self._hydra = Hydra.create_main_hydra2("train", path)
        for kind in ("launcher", "sweeper"):  # Hydra would take a plugin's file of that name for a schema
            schemas = ConfigStore.instance().repo["hydra"].get(kind, {})
            for name in self.options_in(f"hydra/{kind}"):
                schemas.pop(f"{name}.yaml", None)
        return self

    def __exit__(self, *_: object) -> None:
        GlobalHydra.instance().clear()

    @property
    def loader(self) -> Any:
        """Hydra's config loader."""
        return self._hydra.config_loader

    def options_in(self, group: str) -> list[str]:
        """Names of the files of one group, without asking Hydra."""
        folders = [folder / group for folder in (self.conf, self.extra) if folder is not None]
        return sorted({file.stem for folder in folders if folder.is_dir() for file in folder.glob("*.yaml")})

    @property
    def groups(self) -> list[str]:
        """Our own config groups."""
        folders = [folder for folder in (self.conf, self.extra) if folder is not None]
        names = {entry.name for folder in folders for entry in folder.iterdir() if entry.is_dir()}
        return sorted(names - {"hydra"} | {"tuned"})

    def is_group(self, name: str) -> bool:
        """Whether this names a config group."""
        return name == "tuned" or self.loader.repository.group_exists(name)

    def options(self, group: str) -> list[str]:
        """Choices of a group."""
        if group not in self._options:  # Hydra looks into every file source anew each time
            if group == "tuned":
                scales = self.options_in("scale")
                self._options[group] = sorted(
                    f"{record.optimizer}/{record.model}_{scale}"
                    for record in tuned_records()
                    for scale in scales
                    if record.at(scale)
                )
            else:
                self._options[group] = sorted(self.loader.get_group_options(group))
        return self._options[group]

    def parse(self, lines: Sequence[str]) -> list[Override]:
        """Reads `key=value` arguments.

        Raises:
            ConfigError: one is not in Hydra's grammar.
        """
        parser = OverridesParser.create(config_loader=self.loader)
        overrides = []
        for line in lines:
            try:
                overrides += parser.parse_overrides([line])
            except (OverrideParseException, HydraException) as error:
                key, _, value = line.partition("=")
                why = " ".join(str(error).split("\nSee http")[0].split())[:160]
                help_text = "write key=value, and quote special characters like key='\"a,b\"'"
                raise ConfigError(key or line, value, f"cannot be read ({why}); {help_text}") from None
        return overrides

    def compose(self, overrides: Sequence[str], *, sweep: bool = False) -> DictConfig:
        """The configuration of one job, with its `hydra` node.

        Raises:
            ConfigError: Hydra refuses; its own words on one line.
        """
        with _one_line(overrides):
            return self._hydra.compose_config(
                config_name=self.name,
                overrides=list(overrides),
                run_mode=RunMode.MULTIRUN if sweep else RunMode.RUN,
                from_shell=False,
                validate_sweep_overrides=not sweep,
            )

    def with_fields(self, base: DictConfig, overrides: Sequence[Override]) -> DictConfig:
        """A copy of a composed configuration with these fields set, as Hydra sets them; much quicker than composing.

        Raises:
            ConfigError: Hydra refuses; its own words on one line.
        """
        cfg = copy.deepcopy(base)
        with _one_line([str(override.input_line) for override in overrides]):
            ConfigLoaderImpl._apply_overrides_to_config(list(overrides), cfg)
        return cfg


@contextmanager
def _one_line(overrides: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        text = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise ConfigError("configuration", " ".join(overrides) or "defaults", text) from None


def _shared(memo: dict[int, Any]) -> ConfigStore:
    """Hydra copies the whole store at every composition, and each node that it takes from it once more."""
    return ConfigStore.instance()
