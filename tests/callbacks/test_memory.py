"""Memory against the kernel's own books and against state sizes counted by hand."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from foreign_project import Foreign, fit

from lightning_opt.callbacks import Memory
from lightning_opt.callbacks.memory import state_bytes

PARAMETERS = 16 * 16 + 16 * 16 + 16


def test_adam_holds_two_copies_and_a_counter_per_tensor(tmp_path: Path) -> None:
    memory = Memory()
    _, logged = fit(tmp_path, Foreign(), [memory], max_steps=4, log_every_n_steps=2)
    expected = 4 * (2 * PARAMETERS + 3)
    assert memory.last["optimizer_state_bytes"] == expected
    assert logged.column("optimizer_state_bytes") == [expected] * 2


def test_with_accumulation_it_tells_nothing_between_steps(tmp_path: Path) -> None:
    """Also where the last step is logged whatever the interval, which its first micro-batch then sees already."""

    class Last(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.log_every_n_steps = 1 if trainer.global_step == 5 else 4

    callbacks = [Last(), Memory()]
    _, logged = fit(tmp_path, Foreign(), callbacks, max_steps=6, log_every_n_steps=4, accumulate_grad_batches=3)
    assert len(logged.column("optimizer_state_bytes")) == 2


def test_cpu_shows_the_process_as_the_kernel_counts_it(tmp_path: Path) -> None:
    memory = Memory()
    _, logged = fit(tmp_path, Foreign(), [memory], max_steps=2)
    with open("/proc/self/status", encoding="ascii") as status:
        resident = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
    assert memory.last["memory_allocated_bytes"] == pytest.approx(resident, rel=0.1)
    assert memory.last["memory_peak_bytes"] == pytest.approx(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.01
    )
    assert memory.last["memory_peak_bytes"] >= memory.last["memory_allocated_bytes"]
    assert "memory_reserved_bytes" not in memory.last
    assert logged.column("memory_peak_bytes")[-1] == memory.last["memory_peak_bytes"]  # not rounded to float32


def test_a_shared_storage_counts_once() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(8)) for _ in range(2)], lr=0.1)
    flat = torch.zeros(16)
    first, second = optimizer.param_groups[0]["params"]
    optimizer.state[first] = {"momentum": flat[:8], "nested": [{"q": torch.zeros(3, dtype=torch.int8)}], "step": 4}
    optimizer.state[second] = {"momentum": flat[8:], "none": None}
    assert state_bytes(optimizer) == 16 * 4 + 3


def test_the_walk_is_repeated_only_when_state_was_added(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    walks: list[Any] = []
    monkeypatch.setattr("lightning_opt.callbacks.memory.state_bytes", lambda optimizer: walks.append(optimizer) or 7)
    fit(tmp_path, Foreign(), [Memory()], max_steps=6)
    assert len(walks) == 1


def test_an_optimizer_without_state_holds_nothing(tmp_path: Path) -> None:
    memory = Memory()
    fit(tmp_path, Foreign(torch.optim.SGD), [memory], max_steps=2)
    assert memory.last["optimizer_state_bytes"] == 0


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_is_asked(tmp_path: Path) -> None:
    block = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    memory = Memory()
    fit(tmp_path, Foreign(), [memory], max_steps=2, accelerator="gpu", devices=1)
    assert memory.last["memory_allocated_bytes"] >= block.nbytes
    assert memory.last["memory_reserved_bytes"] >= memory.last["memory_allocated_bytes"]
    assert memory.last["memory_peak_bytes"] >= memory.last["memory_allocated_bytes"]
