"""Our optimizers in somebody else's Lightning project: automatic optimization, accumulation, bf16, clipping."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_opt import optim

LIMIT = 0.1


class TwoLayers(pl.LightningModule):
    """Knows nothing of us but the optimizer; clipping is asked of the optimizer, as PretrainModule does."""

    def __init__(self, name, own_clipping):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        self.name, self.own_clipping = name, own_clipping
        self.updates, self.clips, self.norms, self.left = 0, 0, [], []

    def training_step(self, batch, _):
        x, y = batch
        return (self.net(x) - y).float().square().mean()

    def configure_optimizers(self):
        given = {"lr": 1e-2, "max_grad_norm": LIMIT}
        if optim.find_rule(self.name).least_ndim > 1:
            roles = {"default": {"rule": "adamw"}, "matrix": {"rule": self.name}}
            optimizer = optim.build(self.net, {"name": self.name, "roles": roles, **given})
        else:
            optimizer = getattr(optim, optim.OPTIMIZERS[self.name])(self.parameters(), **given)
        optimizer.observe(**{signal: {} for signal in optimizer.needs})
        optimizer.register_before_update_hook(self.count)
        clip = optimizer.clip_
        optimizer.clip_ = lambda: self.counted(clip)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, optim.schedules.build({"name": "linear"}, 5))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def count(self, optimizer):
        self.updates += 1
        self.norms.append(float(optimizer.last_grad_norm))
        self.left.append(float(nn.utils.get_total_norm([p.grad for p in self.parameters()])))

    def counted(self, clip):
        self.clips += 1
        return clip()

    def configure_gradient_clipping(self, optimizer, *args, **kwargs):
        if self.own_clipping:
            optimizer.clip_()


def data():
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


@pytest.mark.parametrize("own_clipping", [True, False])
@pytest.mark.parametrize("name", optim.list_optimizers())
def test_max_steps_are_exactly_optimizer_steps(name, own_clipping, tmp_path):
    model = TwoLayers(name, own_clipping)
    trainer = pl.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        max_steps=5,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    before = [p.detach().clone() for p in model.parameters()]
    trainer.fit(model, data())
    assert trainer.global_step == model.updates == 5
    assert model.clips == 5, "clipped once per optimizer step, not per micro-batch"
    assert min(model.norms) > LIMIT, "nothing to clip: this test would prove nothing"
    assert model.left == pytest.approx([LIMIT] * 5, rel=1e-4)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    (optimizer,) = trainer.optimizers
    assert {state["step"] for state in optimizer.state.values()} == {5}
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["rule"] == name
    # and in again: the next fit goes on from step 5
    resumed = TwoLayers(name, own_clipping)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=7, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(resumed, data(), ckpt_path=tmp_path / "end.ckpt", weights_only=False)
    assert resumed.updates == 2
    assert {state["step"] for state in trainer.optimizers[0].state.values()} == {7}
