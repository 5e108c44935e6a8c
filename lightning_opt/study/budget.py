"""What each optimizer may spend on a cell while it is tuned, and what it has spent: equal caps, hitters marked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_opt.plan import ConfigError
from lightning_opt.plan.words import one_of

KINDS = ("runs", "tokens", "seconds")


@dataclass(frozen=True)
class Spent:
    """What tuning a cell has cost so far.

    Attributes:
        runs: that were started and ended, however they ended.
        tokens: they were trained on.
        seconds: wall time of them all, as if they had run one after another.
        diverged: how many of them diverged.
        failed: how many of them ended without a result.
    """

    runs: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    diverged: int = 0
    failed: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(mine + theirs for mine, theirs in zip(self._all(), other._all(), strict=True)))

    def _all(self) -> tuple[float, ...]:
        return self.runs, self.tokens, self.seconds, self.diverged, self.failed  # type: ignore[return-value]

    @property
    def seconds_per_token(self) -> float | None:
        """Measured; None where nothing was."""
        return self.seconds / self.tokens if self.tokens and self.seconds else None


@dataclass(frozen=True)
class Budget:
    """The cap on tuning one optimizer on one cell; the same for all. None is no cap of that kind.

    Attributes:
        runs: how many, diverged and failed ones included.
        tokens: trained on by all of them together.
        seconds: of wall time, all of them together.
    """

    runs: int | None = None
    tokens: float | None = None
    seconds: float | None = None

    def allows(self, spent: Spent, tokens: float) -> bool:
        """Whether one more run fits.

        Args:
            spent: so far, with what is under way.
            tokens: of the run; its seconds are those that tokens took in this cell so far, nothing before the first.
        """
        seconds = tokens * (spent.seconds_per_token or 0.0)
        return (
            (self.runs is None or spent.runs + 1 <= self.runs)
            and (self.tokens is None or spent.tokens + tokens <= self.tokens * (1 + 1e-9))
            and (self.seconds is None or spent.seconds + seconds <= self.seconds)
        )

    def most_runs(self, tokens: float, seconds_per_token: float | None) -> int | None:
        """Runs of so many tokens that fit at most; None where nothing bounds them."""
        bounds = [] if self.runs is None else [self.runs]
        if self.tokens is not None:
            bounds.append(int(self.tokens * (1 + 1e-9) // tokens))
        if self.seconds is not None and seconds_per_token:
            bounds.append(max(1, int(self.seconds // (tokens * seconds_per_token))))
        return min(bounds, default=None)

    def __str__(self) -> str:
        said = [f"{getattr(self, kind):,g} {kind}" for kind in KINDS if getattr(self, kind) is not None]
        return " or ".join(said) or "no cap"


def read_budget(value: Any, *, field: str = "budget") -> Budget:
    """The cap that a value stands for: ``12`` runs, ``{runs: 12, tokens: 5e7, seconds: 3600}``, or None for no cap.

    Raises:
        ConfigError: it is none of these.
    """
    if value is None:
        return Budget()
    if not isinstance(value, Mapping):
        value = {"runs": value}
    caps: dict[str, Any] = {}
    for kind, cap in value.items():
        if kind not in KINDS:
            raise ConfigError(f"{field}.{kind}", cap, one_of(str(kind), KINDS))
        if cap is None:
            continue
        if not _is_cap(kind, cap):
            noun = "a whole number of runs" if kind == "runs" else f"a number of {kind}"
            raise ConfigError(field if len(value) == 1 else f"{field}.{kind}", cap, f"must be {noun} > 0, or null")
        caps[kind] = int(cap) if kind == "runs" else float(cap)
    return Budget(**caps)


def _is_cap(kind: str, cap: Any) -> bool:
    if isinstance(cap, bool) or not isinstance(cap, int | float) or not 0 < cap < math.inf:
        return False
    return kind != "runs" or cap == int(cap)
