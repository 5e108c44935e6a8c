"""From OmegaConf to plain dictionaries, and to text that may be kept on disk because it holds no secret."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_opt.plan import ConfigError
from lightning_opt.plan.lengths import params_for_length

REDACTED = "***"
_SECRET = re.compile(r"(^|[_.\-])(api_?key|key|secret|password|passwd|token|credentials?|auth)$", re.IGNORECASE)
_TOKEN_FIELDS = re.compile(r"(pad|eos|bos|unk|mask|sep|cls)_token$")


def is_secret(key: str) -> bool:
    """Whether a dotted key looks like it holds a secret."""
    return bool(_SECRET.search(key)) and not _TOKEN_FIELDS.search(key)


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
    return _blot(config)


def saved_text(cfg: DictConfig) -> str:
    """`saved_config` as YAML."""
    return yaml.safe_dump(saved_config(cfg), sort_keys=False, allow_unicode=True, width=120)


def _blot(node: Any, key: str = "") -> Any:
    if isinstance(node, dict):
        return {name: _blot(value, f"{key}.{name}") for name, value in node.items()}
    if isinstance(node, list):
        return [_blot(value, key) for value in node]
    if isinstance(node, str) and node and is_secret(key) and not node.startswith("${oc.env:"):
        return REDACTED
    return node


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


def redact(overrides: Sequence[str]) -> list[str]:
    """The overrides with the values of secret-looking keys blotted out."""
    kept = []
    for line in overrides:
        key, equals, value = line.partition("=")
        secret = equals and is_secret(key) and "${oc.env:" not in value
        kept.append(
            f"{key}={REDACTED}"
            if secret
            else re.sub(r"(?i)((?:api_?key|password|secret)\s*:\s*)[^,}\s]+", r"\1***", line)
        )
    return kept
