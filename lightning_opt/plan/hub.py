"""What a refusal of the Hugging Face hub means: something asked for is wrong, or the hub is lost for now."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_opt.plan.errors import ConfigError


class HubLost(RuntimeError):
    """The hub could not be reached, or gave up on us, after all tries; asking again later may help."""


def hub_said(field: str, kind: str, name: str, error: BaseException, instead: str) -> ConfigError | HubLost | None:
    """The hub's refusals, and those of a hub that is switched off, in one line each; None for what is none of them.

    Args:
        field: the config field.
        kind: ``datasets`` for a data set, empty for a model: the part of its page's address.
        name: on the hub.
        error: what was raised, by huggingface_hub or by who called it.
        instead: what can stand for the hub.
    """
    from huggingface_hub import errors

    lost = errors.HfHubHTTPError | errors.LocalEntryNotFoundError | ConnectionError | TimeoutError
    for one in _with_causes(error):
        if isinstance(one, errors.GatedRepoError):
            page = "/".join(part for part in ("https://huggingface.co", kind, name) if part)
            how = f"accept its terms at {page}, then `hf auth login` (or set HF_TOKEN) and repeat the command"
            return ConfigError(field, name, f"must be open to you: it is gated or private; {how}")
        if isinstance(one, errors.RepositoryNotFoundError):
            what = "data set" if kind else "model"
            return ConfigError(field, name, f"must be a {what} on the hub; `hf auth login` if it is private")
        if isinstance(one, errors.RevisionNotFoundError):
            return ConfigError(f"{field}.revision", name, "must be a branch, tag or commit of it")
        if isinstance(one, errors.HFValidationError):
            return ConfigError(field, name, f"must be a name on the hub ({_short(one)})")
        if isinstance(one, errors.RemoteEntryNotFoundError):
            return ConfigError(field, name, f"must hold what is read of it ({_short(one)})")
        if isinstance(one, lost) or type(one).__module__.startswith("httpx"):  # or httpx2
            return HubLost(f"{field} = {name}: the hub gave up on us ({_short(one)}); {instead}")
    return None


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        yield error
        if (below := error.__cause__ or error.__context__) is None:
            return
        error = below


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
