"""A masked step on a GPU leaves no trace, every way it runs, and the guard there decides as on a CPU, unwaited for."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_opt import kernels, optim
from lightning_opt.callbacks import LossGuard
from lightning_opt.run_folder import Diverged

pytestmark = pytest.mark.gpu

SHAPES = [(64, 96), (96,), (257, 33), (), (1,)]
BAD, STEPS = 2, 5


def ways() -> list[tuple[str, str]]:
    return [(name, way) for name in optim.list_optimizers() for way in kernels.possible(optim.find_rule(name))]


def train(name: str, way: str, dtype: torch.dtype, masked: bool, mode: str) -> tuple[list[torch.Tensor], list[Any]]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to("cuda", dtype)) for s in SHAPES]
    optimizer = getattr(optim, optim.OPTIMIZERS[name])(
        params, lr=1e-2, weight_decay=0.1, weight_decay_mode=mode, implementation=way
    )
    now = 0
    optimizer.register_before_update_hook(lambda o: o.skip_step(torch.tensor(masked and now == BAD, device="cuda")))
    for now in range(STEPS):
        generator.manual_seed(100 + now)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to("cuda", dtype)
            p.grad.mul_(torch.nan if now == BAD else 1.0)
        if masked or now != BAD:
            optimizer.step()
    states = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    return params, states


@pytest.mark.parametrize("mode", ["decoupled", "independent", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "way"), ways())
def test_a_masked_step_leaves_no_trace(name: str, way: str, dtype: torch.dtype, mode: str) -> None:
    (params, states), (others, other_states) = (train(name, way, dtype, masked, mode) for masked in (True, False))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    for ours, theirs in zip(states, other_states, strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


class Line(pl.LightningModule):
    """Two linear layers; its loss is multiplied in some steps."""

    def __init__(self, factors: dict[int, float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))
        self.factors = factors

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        x, y = batch
        return (self.net(x) - y).square().mean() * self.factors.get(self.trainer.global_step + 1, 1.0)

    def configure_optimizers(self) -> Any:
        return optim.AdamW(self.parameters(), lr=1e-3, max_grad_norm=1.0)


def fit(module: pl.LightningModule, guard: LossGuard, accelerator: str) -> None:
    torch.manual_seed(1)
    x = torch.randn(400, 8)
    trainer = pl.Trainer(
        max_steps=60,
        accelerator=accelerator,
        devices=1,
        callbacks=[guard],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1000,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8))


def test_the_guard_decides_as_on_a_cpu() -> None:
    factors = {3: 5.0, 20: 40.0, 21: 1e6, 50: 60.0}
    guards = {name: LossGuard("skip", window=16) for name in ("cpu", "gpu")}
    for name, guard in guards.items():
        fit(Line(factors), guard, name)
    assert guards["cpu"].skipped == guards["gpu"].skipped == [20, 21, 50]


def test_what_is_not_finite_stops_with_the_weights_from_before() -> None:
    module = Line({40: float("nan")})
    with pytest.raises(Diverged, match="gradient norm nan at step 40 "):
        fit(module, LossGuard(), "gpu")
    assert all(p.isfinite().all() for p in module.parameters())


def test_nobody_waits_within_a_step() -> None:
    """torch itself says so: whatever makes the host wait for the device raises."""
    p = torch.nn.Parameter(torch.ones(1000, device="cuda"))
    optimizer = optim.AdamW([p], lr=1e-3, max_grad_norm=1.0)
    flag = torch.tensor(False, device="cuda")
    optimizer.register_before_update_hook(lambda o: o.skip_step(~(o.last_grad_norm <= 1e9) | flag))
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.clip_()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
