"""Which implementation runs a rule: the user's word where it can be had, else the fastest right one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lightning_opt.kernels import compiled, eager, foreach, fused, whole
from lightning_opt.kernels.rule import Bucket, Rule, Variant

_RUN: dict[str, Callable[[Rule, Bucket], None]] = {
    "eager": eager.run,
    "foreach": foreach.run,
    "compiled": compiled.run,
    "fused": fused.run,
    "whole": whole.run,
}

# On a CPU compiling takes about half a second. Per step and million elements it then saves 2 to 3 ms against foreach
# and 0.2 to 0.5 ms against torch's fused kernels (2 cores), so from here on it has paid for itself in 200 to 400 steps.
CPU_ELEMENTS = {"foreach": 500_000, "fused": 5_000_000}


@dataclass(frozen=True)
class Choice:
    """What runs and why, in a few words for the routing table."""

    implementation: str
    why: str

    def __str__(self) -> str:
        return f"{self.implementation} ({self.why})"


def possible(rule: Rule) -> list[str]:
    """The implementations that a rule has on some device."""
    names = ["eager", "foreach", "compiled"] if rule.elementwise else ["whole"]
    return [*names, "fused"] if rule.fused is not None else names


def choose(
    rule: Rule,
    asked: str,
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    elements: int,
    variant: Variant = Variant(),  # noqa: B008 (frozen)
    one_count: bool = True,
) -> Choice:
    """The implementation for tensors of one rule.

    Args:
        rule: the rule.
        asked: ``auto``, ``eager``, ``foreach``, ``compiled``, ``fused`` or, for rules of whole matrices, ``whole``.
        device: where the tensors are.
        dtypes: of weight, gradient and each state.
        elements: number of weights under this rule in all.
        variant: what else the update does.
        one_count: all states have had as many updates: torch's kernels know one count only.

    Returns:
        what runs, and why; where what was asked cannot be had here, the next best and the reason.
    """
    if not rule.elementwise:
        return Choice("whole", "matrix by matrix")
    if asked in ("eager", "foreach"):
        return Choice(asked, "as asked")
    has_fused = one_count and variant.plain and fused.supports(rule, device, tuple(dtypes))
    if asked == "fused":
        if has_fused:
            return Choice("fused", "as asked, torch's kernel")
        what = f"{_names(dtypes)} on {device.type}" if one_count else "states of several ages"
        what = "experts that go each their own way" if variant.experts else what
        return Choice("foreach", f"torch's fused {rule.name} does not take {what}")
    if asked == "compiled":
        can, why = compiled.possible(rule, variant, device, tuple(dtypes))
        return Choice("compiled", f"as asked, {why}") if can else Choice("foreach", why)
    size = f"{elements / 1e6:.{1 if elements >= 1e6 else 3}f}M parameters"
    other, known = ("fused", "torch's kernel") if has_fused else ("foreach", f"{size} are too few to pay for compiling")
    if elements < CPU_ELEMENTS[other] if device.type == "cpu" else has_fused:
        return Choice(other, f"auto: {known}")  # before asking, since that compiles
    can, why = compiled.possible(rule, variant, device, tuple(dtypes))
    return Choice("compiled", f"auto: {size}, {why}") if can else Choice(other, f"auto: {why}")


def run(implementation: str, rule: Rule, bucket: Bucket) -> None:
    """Carries out one bucket's update in place."""
    if bucket.params:
        _RUN[implementation](rule, bucket)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return "/".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
