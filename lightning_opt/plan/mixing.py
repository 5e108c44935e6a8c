"""What of the data's mixture can be checked before any text is read: phases of weights, and documents kept apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_opt.plan.errors import ConfigError
from lightning_opt.plan.phases import check_order
from lightning_opt.plan.values import check_value
from lightning_opt.plan.words import one_of

LONGEST_DENSE_MASK = 1024
"""Tokens of a sequence whose documents can be kept apart without a GPU: the mask holds a byte for each pair of them."""

_FIELDS = ("until", "weights")
_NEEDED = {"name": "mine", "sequence_length": "${model.context_length}", "source": "prepared"}


@dataclass(frozen=True)
class DataPhase:
    """A stretch of the run's sequences with its own weights.

    Attributes:
        name: the user's.
        until: optimizer steps (>= 1) or fraction of the run (< 1) where it ends; None: the end of the run.
        weights: as ``data.weights``, which holds where it is None.
    """

    name: str
    until: int | float | None
    weights: Any

    @property
    def field(self) -> str:
        """Where the configuration has its weights."""
        return "data.weights" if self.weights is None else f"data.phases.{self.name}.weights"


def check_data_fields(data: Mapping[str, Any]) -> None:
    """Refuses a data set that leaves out what has no default, or has what cannot be a place.

    Args:
        data: ``config["data"]``.

    Raises:
        ConfigError: names the line that its file lacks, or the field.
    """
    for field, example in _NEEDED.items():
        if data.get(field) is None:
            raise ConfigError(f"data.{field}", None, f"must be said by the file in conf/data: {field}: {example}")
    for field in ("path", "root", "decontaminate", "cache_dir"):
        check_value(f"data.{field}", data.get(field))
    tokenizer = data.get("tokenizer") or {}
    if not isinstance(tokenizer, Mapping):
        what = f"must be a mapping; the one to read is named by data.tokenizer.path={tokenizer}"
        raise ConfigError("data.tokenizer", tokenizer, what)
    check_value("data.tokenizer.path", tokenizer.get("path"))


def data_phases(data: Mapping[str, Any]) -> list[DataPhase]:
    """The phases of ``config["data"]``, in order; none where its weights are those of the whole run.

    Raises:
        ConfigError: a phase has an unknown field, no end, or ends before it begins; which corpora there are is not
            asked here.
    """
    phases = data.get("phases") or {}
    if not isinstance(phases, Mapping):
        what = "must be null or {name: {until: 0.8, weights: {...}}, ...}, the last without until"
        raise ConfigError("data.phases", phases, what)
    entries = {name: entry for name, entry in phases.items() if entry is not None}
    found = [_read(str(name), entry, name == list(entries)[-1]) for name, entry in entries.items()]
    for kind in (int, float):  # those of one kind can be compared before the length of the run is known
        same = [phase for phase in found if type(phase.until) is kind]
        check_order(same, [phase.until for phase in same], "data.phases")
    return found


def _read(name: str, entry: Any, last: bool) -> DataPhase:
    field = f"data.phases.{name}"
    if not isinstance(entry, Mapping):
        raise ConfigError(field, entry, "must be {until: 0.8, weights: {...}}, the last phase without until")
    for key, value in entry.items():
        if key not in _FIELDS:
            raise ConfigError(f"{field}.{key}", value, one_of(key, _FIELDS))
    until = check_value("until", entry.get("until"), field=f"{field}.until")
    if (until is None) != last:
        what = "must be null in the last phase" if last else "must say where the phase ends, for example 0.8"
        raise ConfigError(f"{field}.until", until, what)
    return DataPhase(name, until, entry.get("weights"))


def data_seams(phases: Sequence[DataPhase], max_steps: int, global_batch_size: int) -> tuple[int, ...]:
    """First sequence of each phase but the first, as a place in the global order.

    A step's batch may lie on both sides of it, where a fraction of the run is no whole number of steps.

    Args:
        phases: of `data_phases`.
        max_steps: optimizer steps of the run.
        global_batch_size: sequences per step.

    Raises:
        ConfigError: a phase has no sequence.
    """
    whole = max_steps * global_batch_size
    ends = [
        round(phase.until * whole) if isinstance(phase.until, float) else phase.until * global_batch_size
        for phase in phases[:-1]
    ]
    check_order(phases, [end / global_batch_size for end in ends] + [None] * bool(phases), "data.phases")
    for phase, end in zip(phases[:-1], ends, strict=True):
        if not 0 < end < whole:
            what = f"must leave sequences before and after it: the run has {max_steps} steps"
            raise ConfigError(f"data.phases.{phase.name}.until", phase.until, what)
    return tuple(ends)


def check_documents_apart(data: Mapping[str, Any], device: str | None) -> None:
    """Refuses documents kept apart in sequences that a dense mask is too large for.

    Args:
        data: ``config["data"]``.
        device: ``cuda`` has no such limit; None where it is not known yet.

    Raises:
        ConfigError: names the length.
    """
    length = data["sequence_length"]
    if data.get("block_cross_document_attention") and device == "cpu" and length > LONGEST_DENSE_MASK:
        what = (
            f"must be at most {LONGEST_DENSE_MASK} on a CPU with data.block_cross_document_attention=true, "
            "whose mask is dense there; CUDA takes any length"
        )
        raise ConfigError("data.sequence_length", length, what)
