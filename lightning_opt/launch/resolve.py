"""From OmegaConf to plain dictionaries, and to text that may be kept on disk because it holds no secret."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_opt.plan import ConfigError, secrets
from lightning_opt.plan.lengths import params_for_length


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """The job's configuration: resolved, without the `hydra` node, of dicts, lists and scalars only.

    Raises:
        ConfigError: a value is missing or refers to something that does not exist.
    """
    job = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    if "hydra" in cfg:
        HydraConfig.instance().set_config(cfg)
    try:
        config = OmegaConf.to_container(job, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        why = (
            " ".join(str(error.msg or error).split("\n")[0].split())
            .rpartition("resolving interpolation: ")[2]
            .strip('"')
        )
        raise ConfigError(str(error.full_key or "configuration"), _raw(job, error.full_key), why) from None
    assert isinstance(config, dict)
    if isinstance(config.get("model"), dict) and (count := params_for_length(config["model"])) is not None:
        config["model"]["non_embedding_params"] = count  # follows the shape, also an overridden one
    return config  # type: ignore[return-value]


def _raw(cfg: DictConfig, key: str | None) -> Any:
    node = OmegaConf.to_container(cfg, resolve=False)
    for part in (key or "").split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def saved_config(cfg: DictConfig) -> dict[str, Any]:
    """`plain_config` with environment variables left as `${oc.env:NAME}` and secrets blotted out: fit for a file."""
    with _environment_unresolved():
        config = plain_config(cfg)
    return secrets.clean(config)


def saved_text(cfg: DictConfig) -> str:
    """`saved_config` as YAML."""
    return yaml.safe_dump(saved_config(cfg), sort_keys=False, allow_unicode=True, width=120)


@contextmanager
def _environment_unresolved() -> Iterator[None]:
    """While this lasts, `${oc.env:NAME,default}` resolves to its own text, also where another value refers to it."""

    def keep(*parts: Any) -> str:
        return "${oc.env:" + ",".join("null" if part is None else str(part) for part in parts) + "}"

    from omegaconf.resolvers import oc

    OmegaConf.register_new_resolver("oc.env", keep, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def quoted(value: Any) -> str:
    """A value in Hydra's grammar, whatever characters it holds."""
    return Override._get_value_element_as_str(QuotedString(str(value), Quote.single))


def redact(overrides: Sequence[str]) -> list[str]:
    """The overrides without secrets: neither values of what is named like one, also inside maps, nor what looks so."""
    return [_redacted(line) for line in overrides]


def _parsed(line: str) -> Any:
    """The value of an override; None where it is not in Hydra's grammar."""
    try:
        return OverridesParser.create().parse_override(line).value()
    except HydraException:
        return None


def _redacted(line: str) -> str:
    key, equals, text = line.partition("=")
    if not equals:
        return line
    parsed = _parsed(line)
    value = parsed if isinstance(parsed, dict | list) else text
    cleaned = secrets.clean(value, key)
    if cleaned == value:
        return line
    if isinstance(cleaned, str):  # the mark's brackets may need quotes: who reads it again uses Hydra's grammar
        plain = f"{key}={cleaned}"
        return f"{key}={quoted(cleaned)}" if _parsed(plain) is None else plain
    escaped = Override._get_value_element_as_str(secrets.REDACTED)  # a mark, no value that needs its brackets escaped
    return f"{key}={Override._get_value_element_as_str(cleaned).replace(escaped, secrets.REDACTED)}"
