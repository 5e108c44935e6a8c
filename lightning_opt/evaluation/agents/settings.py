"""What `recipes.evaluate_agent` is told: words ``name=value``, checked before anything is started or asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning_opt.plan import ConfigError, one_of

DOMAINS = ("retail", "airline")
_COUNTS = ("trials", "tasks", "max_steps", "concurrency")


@dataclass(frozen=True)
class AgentSettings:
    """A checked request.

    Attributes:
        url: OpenAI-compatible endpoint that serves the agent, ending in ``/v1``.
        model: name it serves the agent under; None: the only one it serves.
        domains: of `DOMAINS`.
        trials: conversations per task, the n of pass^k.
        tasks: tasks per domain, the first ones; None: all.
        split: tau2's split of the tasks; ``base`` is the one of published scores.
        user: LiteLLM name of the model that plays the user; None: tau2's own choice.
        user_url: OpenAI-compatible endpoint that serves `user`; None: as LiteLLM finds it.
        judge: LiteLLM name of the model that judges natural-language assertions; None: tau2's own choice.
        judge_url: as `user_url`.
        temperature: of the agent.
        seed: of tau2's trials.
        max_steps: of a conversation, after which it counts as failed.
        concurrency: conversations at once.
        out: folder of the results; None: ``runs/agents/<model>``.
        tau2: Python interpreter, or command ``tau2``, of the environment that holds tau2; None: the command on PATH.
    """

    url: str
    model: str | None = None
    domains: tuple[str, ...] = DOMAINS
    trials: int = 4
    tasks: int | None = None
    split: str = "base"
    user: str | None = None
    user_url: str | None = None
    judge: str | None = None
    judge_url: str | None = None
    temperature: float = 0.0
    seed: int = 300
    max_steps: int = 200
    concurrency: int = 3
    out: Path | None = None
    tau2: str | None = None


def parse_words(words: Sequence[str]) -> AgentSettings:
    """Checked settings from words such as ``domains=retail,airline``.

    Raises:
        ConfigError: a word is not ``name=value``, its name is unknown or given twice, or its value is wrong.
    """
    known = [field.name for field in fields(AgentSettings)]
    given: dict[str, Any] = {}
    for word in words:
        name, sign, text = word.partition("=")
        if not sign:
            raise ConfigError("word", word, f"must be name=value, with one of the names {', '.join(known)}")
        if name not in known:
            raise ConfigError("word", name, one_of(name, known))
        if name in given:
            raise ConfigError(name, text, "must be given once")
        given[name] = _value(name, text.strip())
    if "url" not in given:
        raise ConfigError(
            "url", None, "must be the OpenAI-compatible endpoint of the agent: url=http://127.0.0.1:8000/v1"
        )
    for side in ("user", "judge"):
        if given.get(f"{side}_url") and not given.get(side):
            raise ConfigError(side, None, f"must be the model that {side}_url serves")
    return AgentSettings(**given)


def _value(name: str, text: str) -> Any:
    if text.lower() in ("", "null", "none"):
        if name in ("url", "domains", "split"):
            raise ConfigError(name, text or None, "must not be empty")
        return AgentSettings.__dataclass_fields__[name].default
    if name.endswith("url"):
        return _address(name, text)
    if name == "domains":
        return _domains(text)
    if name in _COUNTS or name == "seed":
        if not text.isdecimal() or (name != "seed" and int(text) < 1):
            raise ConfigError(name, text, f"must be a whole number >= {int(name != 'seed')}")
        return int(text)
    if name == "temperature":
        return _temperature(text)
    return Path(text).expanduser() if name == "out" else text


def _address(name: str, text: str) -> str:
    try:
        parts = urlsplit(text)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or True)
    except ValueError:
        whole = False
    if not whole:
        raise ConfigError(name, text, "must be http://HOST:PORT/v1 or https://...")
    if parts.username or parts.password or parts.query:
        # tau2 writes the address into its results.
        raise ConfigError(name, "[redacted]", "must hold no key or password: put keys into the environment")
    return text.rstrip("/")


def _domains(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.strip("[]").split(",") if part.strip()))
    for name in names:
        if name not in DOMAINS:
            raise ConfigError("domains", name, one_of(name, DOMAINS))
    if not names:
        raise ConfigError("domains", text, f"must be some of {','.join(DOMAINS)}")
    return names


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise ConfigError("temperature", text, "must be a number from 0 to 2")
    return value


def folder_of(settings: AgentSettings) -> Path:
    """Where the results go."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "_", settings.model or "agent").strip("_.")
    return settings.out or Path("runs") / "agents" / (slug or "agent")
