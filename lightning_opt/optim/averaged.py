"""Averaged weights in the place of the trained ones, for rules that average their iterates (schedule-free)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_opt.optim.catalogue import rule_of


class Swap:
    """Which of the two are in the parameters; the trained ones are kept while they are not."""

    def __init__(self) -> None:
        self._trained: dict[Tensor, Tensor] | None = None

    @property
    def swapped(self) -> bool:
        """Whether the averaged ones are in place."""
        return self._trained is not None

    def refuse(self) -> None:
        """Called before an update.

        Raises:
            RuntimeError: while averaged weights are in place.
        """
        if self.swapped:
            raise RuntimeError("the averaged weights are in place: call the optimizer's train() before its next step")

    def put(self, groups: Sequence[Mapping[str, Any]], states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Puts the averaged weights in place; nothing where no rule has any, or they are in place already."""
        averaging = [(rule, group) for group in groups if (rule := rule_of(group)).averaged is not None]
        if self.swapped or not averaging:
            return
        self._trained = {}
        for rule, group in averaging:
            for p in group["params"]:
                if state := states.get(p):
                    self._trained[p] = p.detach().clone()
                    p.copy_(rule.averaged(p, state, group))

    def back(self) -> None:
        """Puts the trained weights back, to the last bit."""
        for p, weights in (self._trained or {}).items():
            p.copy_(weights)
        self.forget()

    def forget(self) -> None:
        """What is in the parameters is what is trained, whatever was kept."""
        self._trained = None
