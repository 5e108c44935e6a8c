"""A value of the device that the host reads later, without the device ever waiting for the host."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """A copy of a small tensor, made behind all work queued so far; only reading it waits, and only for that.

    Args:
        value: on any device; may be changed afterwards.
    """

    def __init__(self, value: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if value.device.type != "cuda":
            self._host = value.detach().to("cpu", copy=True)
            return
        self._host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        self._host.copy_(value.detach(), non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(value.device))

    def read(self) -> Tensor:
        """The value on the CPU; waits until the device has come that far."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
