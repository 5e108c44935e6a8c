"""What must be the same where a run goes on from a checkpoint, and what of it the user may let pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_opt.plan.errors import ConfigError, show
from lightning_opt.plan.words import one_of

ALLOWABLE = ("seed", "data", "tokenizer", "sequence_length", "global_batch_size", "optimizer")
"""What `resume_allow` may name. Another model's weights fit nowhere."""

_WEIGHTS = ("model", "vocabulary")
_COMPARED = (*ALLOWABLE, *_WEIGHTS)
_SAME_WEIGHTS = ("activation_checkpointing", "context_length", "experts_implementation", "non_embedding_params")
_FOLLOWS = "data.fingerprint"  # from a changed tokenizer or length
_DIGITS = 16  # of a hash, that a line stays one
_MOST = 4  # differing values that one line names


def identity(config: Mapping[str, Any], max_steps: int | None) -> dict[str, Any]:
    """What a checkpoint is kept with: as much of a run's identity as its configuration tells.

    Args:
        config: the resolved configuration as it may be saved, without secrets.
        max_steps: optimizer steps of the whole run, None where not known yet.

    Returns:
        Plain types. ``length`` may differ on resume, all else may not.
    """
    model, own_positions = config["model"], config["model"].get("_target_") == "lightning_opt.models.gpt2"
    same = set(_SAME_WEIGHTS) - ({"context_length"} if own_positions else set())
    return {
        "seed": config["seed"],
        "sequence_length": config["data"]["sequence_length"],
        "global_batch_size": config["trainer"]["global_batch_size"],
        "optimizer": {key: value for key, value in config["optimizer"].items() if key != "implementation"},
        "model": {key: value for key, value in model.items() if key not in same},
        "length": {"max_steps": max_steps, "schedule": config["schedule"]},
    }


def with_data(
    known: Mapping[str, Any],
    *,
    weights: Mapping[str, float],
    bytes: Mapping[str, int],
    fingerprint: str,
    tokenizer: str,
    vocabulary: int,
    phases: Sequence[tuple[int, Mapping[str, float]]] = (),
    documents_apart: bool = False,
) -> dict[str, Any]:
    """`identity` with what only the built data tells.

    Args:
        known: of the configuration.
        weights: share of each corpus.
        bytes: of each corpus's text.
        fingerprint: of tokens, tokenizer, weights and sequence length.
        tokenizer: SHA-256 of its file.
        vocabulary: rows of the embedding.
        phases: first sequence and shares of each.
        documents_apart: whether no token sees another document.
    """
    data: dict[str, Any] = {"weights": dict(weights), "bytes": dict(bytes), "fingerprint": fingerprint[:_DIGITS]}
    if len(phases) > 1:
        data["phases"] = {f"from_sequence_{first}": dict(shares) for first, shares in phases}
    if documents_apart:
        data["block_cross_document_attention"] = True
    return {**known, "data": data, "tokenizer": tokenizer[:_DIGITS], "vocabulary": vocabulary}


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], allow: Sequence[str], what: str) -> list[str]:
    """Compares two identities in all that both tell.

    Args:
        saved: of the checkpoint.
        now: of this run.
        allow: names in `ALLOWABLE` that may differ.
        what: the checkpoint or run as the user knows it.

    Returns:
        The allowed names that differ.

    Raises:
        ConfigError: something else differs; one line names each value, saved and current, and the remedy.
    """
    changed = {name: list(differences(name, saved[name], now[name])) for name in _shared(saved, now)}
    changed = {name: found for name, found in changed.items() if found}
    if set(changed) & {"tokenizer", "sequence_length"} and [one[0] for one in changed.get("data", [])] == [_FOLLOWS]:
        del changed["data"]
    refused = [name for name in changed if name not in allow]
    if not refused:
        return list(changed)
    told = [one for name in refused for one in changed[name]]
    words = ", ".join(f"{field} (saved {show(old)}, now {show(new)})" for field, old, new in told[:_MOST])
    words += f" and {len(told) - _MOST} more" if len(told) > _MOST else ""
    if set(refused) & set(_WEIGHTS):
        raise ConfigError("resume", what, f"must be of this model, but differs in {words}: its weights do not fit")
    names = ", ".join(name for name in ALLOWABLE if name in changed)
    raise ConfigError("resume", what, f"differs in {words}; to go on all the same: resume_allow=[{names}]")


def length_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs in steps and schedule, which is no reason to refuse: ``max_steps 100 -> 200``."""
    found = differences("length", saved.get("length", {}), now["length"]) if saved.get("length") else ()
    return [f"{name.removeprefix('length.')} {show(old)} -> {show(new)}" for name, old, new in found]


def check_allowed(names: Any) -> None:
    """Checks the value of `resume_allow`.

    Raises:
        ConfigError: it is no list of names in `ALLOWABLE`.
    """
    if not isinstance(names, list):
        raise ConfigError("resume_allow", names, "must be a list, for example [seed]")
    for name in names:
        if name == "model":
            raise ConfigError("resume_allow", names, "cannot hold model: another model's weights fit nowhere")
        if name not in ALLOWABLE:
            raise ConfigError("resume_allow", names, f"{show(name)} {one_of(str(name), ALLOWABLE)}")


def _shared(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [name for name in _COMPARED if name in saved and name in now]


def differences(field: str, saved: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """(field, saved, now) of each value that differs; of two things with different names only their names.

    Args:
        field: what both are, in dots.
        saved: of then.
        now: to compare it with.
    """
    if saved == now:
        return
    if not (isinstance(saved, dict) and isinstance(now, dict)):
        yield field, saved, now
    elif saved.get("name") != now.get("name"):
        yield field, saved.get("name"), now.get("name")
    elif field == "data" and saved.get("weights") != now.get("weights"):
        yield "data.weights", saved["weights"], now["weights"]
    else:
        for key in dict.fromkeys([*saved, *now]):
            yield from differences(f"{field}.{key}", saved.get(key), now.get(key))
