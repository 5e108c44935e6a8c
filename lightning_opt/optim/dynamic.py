"""Dynamic: two rules, one for a calm run and one while it is rough, and a measured signal that says which.

The signal is one of

- `loss_volatility`: standard deviation over mean of the training loss, over a window of steps;
- `grad_norm_change`: mean of |g_t - g_(t-1)| / g_(t-1) of the gradient norm, over the same window.

The run begins in the first phase. Above `threshold` for more than `patience` steps it goes to the second; there, below
`threshold` x `hysteresis` for as long, back to the first. A phase lasts at least `dwell` steps. While the run is
waiting, the coming rule's own states are filled as in `optim.phased`, so `patience` is what `warm` is there; if the
signal turns back they are dropped. Every switch says its reason.

The callback `OptimizerSignals` measures the signal, the same on every process, and hands it to `observe`. It is read
one step later, so that no device waits for the host. The counters are part of a checkpoint.

Tuning: look at a run without switches first (`loss_volatility` and `grad_norm_change` are logged) and set the threshold
well above its quiet level: a loss that falls fast is volatile too, so the first steps of every run are. A threshold
that noise crosses costs the ramp each time. Traps: two runs that switch at different steps are hard to compare, and a
sweep over rates moves the switches with it. Source: no paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lightning_opt.kernels import Later
from lightning_opt.optim.phased import Phased
from lightning_opt.plan import check_value


class Dynamic(Phased):
    """Optimizer whose rule follows a signal; see the module's text.

    Args:
        params: as for `Phased`.
        phases: two, the calm one first: name to ``{rule, lr_scale or lr, weight_decay, ...}``.
        lr: the rate that the phases' factors multiply.
        signal: ``loss_volatility`` or ``grad_norm_change``.
        threshold: above it the run is rough.
        hysteresis: below this share of the threshold it is calm again.
        patience: steps that the signal must last, and in which the coming rule's states are filled.
        dwell: steps that a phase lasts at least.
        ramp: steps after a switch over which the rate grows from zero.
        **hyper: as for `Phased`.

    Raises:
        ConfigError: as for `Phased`; for another number of phases than two.
    """

    ends = False
    _kept = (*Phased._kept, "signal", "_limits", "_patience", "_dwell", "_count", "_value", "_newest")

    def __init__(
        self,
        params: Any,
        phases: Mapping[str, Mapping[str, Any] | None],
        lr: float = 1e-3,
        *,
        signal: str = "loss_volatility",
        threshold: float = 0.05,
        hysteresis: float = 0.5,
        patience: int = 20,
        dwell: int = 100,
        ramp: float = 0,
        **hyper: Any,
    ) -> None:
        given = {"signal": signal, "threshold": threshold, "hysteresis": hysteresis}
        given |= {"patience": patience, "dwell": dwell}
        given = {key: check_value(key, value, field=f"optimizer.{key}") for key, value in given.items()}
        self.signal, self._patience, self._dwell = given["signal"], given["patience"], given["dwell"]
        limits = given["threshold"], given["threshold"] * given["hysteresis"]
        names = (name for name, entry in phases.items() if entry is not None)
        self._limits = dict(zip(names, limits, strict=False))  # of two phases: `read_phases` refuses another number
        self._count = 0  # steps that the signal has been beyond the limit
        self._value, self._newest = math.nan, None
        super().__init__(params, phases, lr, warm=0, ramp=ramp, **hyper)

    @property
    def needs(self) -> frozenset[str]:
        """And the signal."""
        return super().needs | {self.signal}

    def describe(self) -> str:
        """The course of the run in one line."""
        (calm, high), (rough, low) = self._limits.items()
        rules = {name: phase.rule for name, phase in self._phases.items()}
        until = f"from {self.signal} above {high:g} until below {low:g}"
        return f"{calm} ({rules[calm]}); {rough} ({rules[rough]}) {until}"

    def observe(self, **signals: Any) -> None:
        """As `Optimizer.observe`; the value of now counts in the next step."""
        super().observe(**signals)
        if self.signal in signals:
            self._value = self._read()
            self._newest = Later(torch.as_tensor(signals[self.signal], dtype=torch.float64))

    def _read(self) -> float:
        return math.nan if self._newest is None else float(self._newest.read())

    def _next(self) -> tuple[str | None, str | None]:
        limit, (calm, rough) = self._limits[self.phase], self._limits
        beyond = self._value > limit if self.phase == calm else self._value < limit
        settled = self.taken - self._entered > self._dwell
        self._count = self._count + 1 if beyond and settled else 0
        if not self._count:
            return None, None
        coming = rough if self.phase == calm else calm
        if self._count <= self._patience:
            return coming, None
        side, steps, self._count = "above" if coming == rough else "below", self._count, 0
        return coming, f"{self.signal} {self._value:.3g} is {side} {limit:.3g} for {steps} steps"

    def _position(self) -> dict[str, Any]:
        return {**super()._position(), "count": self._count, "value": self._value, "newest": self._read()}

    def _go_to(self, position: Mapping[str, Any]) -> None:
        super()._go_to(position)
        self._count, self._value = position["count"], position["value"]
        self._newest = Later(torch.tensor(position["newest"], dtype=torch.float64))
