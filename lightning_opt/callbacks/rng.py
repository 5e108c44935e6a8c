"""Where the random number generators of this process stand, as tensors and plain types; and how they are left alone."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def rng_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators; the current CUDA device's where it is in use."""
    version, words, spare = random.getstate()
    numpy = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "python": [version, torch.tensor(words), spare],
        "numpy": numpy | {"state": {name: _plain(value) for name, value in numpy["state"].items()}},
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts the generators back to where `rng_state` found them."""
    version, words, spare = state["python"]
    random.setstate((version, tuple(words.tolist()), spare))
    numpy = {
        name: np.asarray(value) if torch.is_tensor(value) else value for name, value in state["numpy"]["state"].items()
    }
    np.random.set_state(state["numpy"] | {"state": numpy})
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def undisturbed(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside; train and eval modes and random states as before afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    state = rng_state()
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        set_rng_state(state)


def of_all_ranks(value: Any, world_size: int) -> list[Any]:
    """Each rank's value, by rank; every rank must ask."""
    if world_size == 1:
        return [value]
    values = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def _plain(value: Any) -> Any:
    return torch.from_numpy(value.astype(np.int64)) if isinstance(value, np.ndarray) else value
