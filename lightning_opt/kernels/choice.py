"""Which implementation runs a rule: the user's word where it can be had, else the fastest right one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lightning_opt.kernels import compiled, eager, foreach, fused
from lightning_opt.kernels.device import can_compile
from lightning_opt.kernels.rule import Bucket, Rule

_RUN: dict[str, Callable[[Rule, Bucket], None]] = {
    "eager": eager.run,
    "foreach": foreach.run,
    "compiled": compiled.run,
    "fused": fused.run,
}

# On a CPU the first compiled step waits 4 s (warm cache) to 13 s (cold), almost all of it inductor's own start. Against
# foreach it saves about 1 ns per element and step (2 cores): at 1M elements 1 s in 800 steps, at 8M 7 s. A step that
# trains 8M parameters takes so long that compiling is then below a hundredth of the run either way.
CPU_COMPILE_ELEMENTS = 8_000_000


@dataclass(frozen=True)
class Choice:
    """What runs and why, in a few words for the routing table."""

    implementation: str
    why: str

    def __str__(self) -> str:
        return f"{self.implementation} ({self.why})"


def possible(rule: Rule) -> list[str]:
    """The implementations that a rule has on some device."""
    names = ["eager", "foreach", "compiled"] if rule.elementwise else ["eager"]
    return [*names, "fused"] if rule.fused is not None else names


def choose(rule: Rule, asked: str, device: torch.device, dtypes: Sequence[torch.dtype], elements: int) -> Choice:
    """The implementation for tensors of one rule.

    Args:
        rule: the rule.
        asked: ``auto``, ``eager``, ``foreach``, ``compiled`` or ``fused``.
        device: where the tensors are.
        dtypes: of weight, gradient and each state.
        elements: number of weights under this rule in all.

    Returns:
        what runs, and why; where what was asked cannot be had here, the next best and the reason.
    """
    if not rule.elementwise:
        return Choice("eager", "whole matrices")
    can, with_what = can_compile(device.type)
    if asked == "fused":
        if fused.supports(rule, device, tuple(dtypes)):
            return Choice("fused", "as asked, torch's kernel")
        return Choice("foreach", f"torch's fused {rule.name} does not take {_names(dtypes)} on {device.type}")
    if asked == "compiled" or (asked == "auto" and compiled.broken(rule)):
        if compiled.broken(rule):
            return Choice("foreach", "compiling failed, see the log")
        return Choice("compiled", f"as asked, {with_what}") if can else Choice("foreach", with_what)
    if asked != "auto":
        return Choice(asked, "as asked")
    if fused.supports(rule, device, tuple(dtypes)):
        return Choice("fused", "auto: torch's kernel")
    if not can:
        return Choice("foreach", f"auto: {with_what}")
    if device.type == "cpu" and elements < CPU_COMPILE_ELEMENTS:
        return Choice("foreach", f"auto: {elements / 1e6:.2f}M parameters are too few to pay for compiling")
    return Choice("compiled", f"auto: {elements / 1e6:.1f}M parameters, {with_what}")


def run(implementation: str, rule: Rule, bucket: Bucket) -> None:
    """Carries out one bucket's update in place."""
    if bucket.params:
        _RUN[implementation](rule, bucket)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return "/".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
