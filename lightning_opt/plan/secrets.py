"""Takes what looks like a password, key or access token out of whatever is written to disk or shown."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, quote_plus

REDACTED = "[redacted]"

_SECRET_WORDS = {"token", "key", "apikey", "password", "passwd", "pwd", "passphrase", "secret", "credential"}
_SECRET_WORDS |= {"credentials", "auth", "authorization", "bearer", "cookie"}
_PASSWORDS = {"password", "passwd", "pwd", "passphrase", "secret"}  # secret even where they are a number
_SURELY = {"token", "key", "apikey", "password", "passwd", "passphrase", "secret"}
_NO_SECRETS = re.compile(r"^(?:num|max|min|n)_|(?:^|_)(?:pad|eos|bos|unk|mask|sep|cls|special|per)_tokens?(?:_|$)")
_KIND_BEFORE = re.compile(r"\b(?:pad|eos|bos|unk|mask|sep|cls|special|per)[ -]$", re.IGNORECASE)
_LITERAL = re.compile(
    r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{12,}"
    r"|\b(?:hf|ghp|gho|ghs|ghu|glpat|pypi|xoxb|xoxp|npm)[_-][A-Za-z0-9_-]{12,}"
    r"|\bgithub_pat_[A-Za-z0-9_]{12,}"
    r"|\bAKIA[A-Z0-9]{12,}"
    r"|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}(?:\.[A-Za-z0-9_-]+)?"
    r"|(?<=Bearer )[^\s,;'\"]+"
    r"|(?<=://)(?:[^/\s:@]*:[^/\s@]+(?:@[^/\s@'\"<>]*)*|[^/\s:@]{8,})(?=@)"
)
# A bare value may hold `${...}`; one that opens a map or a list is looked into, not taken whole.
_NAMED = re.compile(
    r"(?<![\w.-])(?P<name>[A-Za-z_][\w./@-]{0,80})(?P<sign>['\"]?\s*[=:]\s*)"
    r"(?P<value>'[^']*'|\"[^\"]*\"|(?![{\[])(?:\$\{[^}]*\}|[^\s,;&}\]])+)"
)
_ENVIRONMENT = re.compile(r"\$\{oc\.env:[^,}]+\}")

_WHOLE, _PART = 6, 8  # characters: shorter values, and words of longer ones, stand in innocent texts as well
_guarded: tuple[str, ...] = ()


@contextmanager
def guarding(config: Any) -> Iterator[None]:
    """While this lasts, `mask` and `clean` know the secrets themselves: other people's errors may quote them anywhere.

    Args:
        config: a tree with its values resolved; what it holds under names of secrets is guarded from six characters
            on, and so is what environment variables of such names hold, if there is a digit in it. Where the name's
            last word leaves no doubt (``DB_PASSWORD``, ``HF_TOKEN``), so is anything of eight characters that is no
            path.
    """
    global _guarded
    before = _guarded
    named = (_values(text, name if _tells(name, text) else "") for name, text in os.environ.items())
    found = {form for text in _values(config).union(*named) for form in _forms(text)}
    _guarded = tuple(sorted(found.union(before), key=len, reverse=True))
    try:
        yield
    finally:
        _guarded = before


def _tells(name: str, text: str) -> bool:
    """Whether an environment variable of a secret's name holds one: a path or a plain word (SSH_AUTH_SOCK) is none."""
    if _SURELY.intersection(_words(name)[-1:]) and len(text) >= _PART:
        return not text.isdecimal() and not os.path.exists(text)
    return bool(re.search(r"^[^/].*\d", text, re.DOTALL))


def _forms(secret: str) -> set[str]:
    """As it stands in messages, JSON, addresses and pages."""
    written = {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]}
    in_bytes = secret.encode("utf-8", "replace")  # an environment may hold what is no text
    quoted = {quote(in_bytes), quote(in_bytes, safe=""), quote_plus(in_bytes)}
    return {secret, *written, *quoted, html.escape(secret), html.escape(secret, quote=False)}


def _values(tree: Any, name: str = "") -> set[str]:
    if isinstance(tree, dict):
        return {text for key, item in tree.items() for text in _values(item, str(key))}
    if isinstance(tree, list | tuple):
        return {text for item in tree for text in _values(item, name)}
    if not isinstance(tree, str) or _harmless(tree):
        return set()
    parts = set() if not is_secret_name(name) else {tree, *(word for word in tree.split() if len(word) >= _PART)}
    parts |= {word for match in _LITERAL.findall(tree) for word in match.split(":") if len(word) >= _PART}
    return {text for text in parts if len(text) >= _WHOLE and "${" not in text}


def mask(text: str) -> str:
    """The text without what `guarding` guards, and without literals that look like a secret; all else to the letter."""
    for secret in _guarded:
        text = text.replace(secret, REDACTED)
    return _LITERAL.sub(REDACTED, text)


def is_secret_name(name: str) -> bool:
    """Whether a field of this name holds something not to be shown (``api_key``, ``wandb.token``, ``authToken``)."""
    words = _words(name)
    return any(word in _SECRET_WORDS for word in words) and not _NO_SECRETS.search("_".join(words))


def _words(name: str) -> list[str]:
    last = re.split(r"[./@]", name)[-1]
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+", last)]


def clean_text(text: str) -> str:
    """The text as `mask` leaves it, and without the values of ``name=value`` pairs that name a secret."""

    def hide(match: re.Match[str]) -> str:
        if REDACTED in match[0] or not is_secret_name(match["name"]) or _harmless(match["value"]):
            return match[0]
        if _KIND_BEFORE.search(match.string, 0, match.start()):
            return match[0]
        return f"{match['name']}{match['sign']}{REDACTED}"

    text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair, as JSON may hold, cannot be written
    return _NAMED.sub(hide, mask(text))


def clean(value: Any, name: str = "") -> Any:
    """A copy of a tree of dicts, lists and plain values with every secret replaced by ``[redacted]``.

    Args:
        value: the tree.
        name: of the field that holds it.
    """
    if isinstance(value, dict):
        return {clean_text(str(key)): clean(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item, name) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return REDACTED if set(_words(name)) & _PASSWORDS else value
    if not isinstance(value, str):
        return value
    if name and is_secret_name(name) and not _harmless(value):
        return REDACTED
    return clean_text(value)


def _harmless(value: str) -> bool:
    """Words that tell nothing: empty, null, a flag, or the name of an environment variable and nothing beside it."""
    bare = value.strip("'\"")
    return bare.lower() in {"", "null", "none", "true", "false"} or bool(_ENVIRONMENT.fullmatch(bare))
