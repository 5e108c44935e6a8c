"""EMA against numpy on the weights that the project recorded itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from foreign_project import Foreign, Rows, fit

from lightning_opt.callbacks import EMA, Checkpoint, CheckpointIO
from lightning_opt.callbacks import averages as weights_are_averaged
from lightning_opt.checkpoints import bytes_needed, find, read
from lightning_opt.plan import ConfigError

DECAY = 0.8


class Recording(Foreign):
    """Keeps its weights after every step, and what validation saw; has a whole number that has no average."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(5))
        self.weights, self.validated = [], []

    def row(self) -> np.ndarray:
        return torch.cat([p.detach().flatten() for p in self.parameters()]).double().numpy()

    def on_train_batch_end(self, *_: Any) -> None:
        self.weights.append(self.row())

    def on_validation_start(self) -> None:
        self.validated.append(None)

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.validated[-1] = self.row()


def averages(weights: list[np.ndarray]) -> list[np.ndarray]:
    """After each step; the first is the first step's weights."""
    result = [weights[0]]
    for row in weights[1:]:
        result.append(DECAY * result[-1] + (1 - DECAY) * row)
    return result


def test_the_average_is_that_of_numpy_and_is_what_is_validated_and_kept(tmp_path: Path) -> None:
    module = Recording()
    fit(
        tmp_path,
        module,
        [EMA(DECAY)],
        val_rows=Rows(8),
        max_steps=12,
        val_check_interval=5,
        check_val_every_n_epoch=None,
    )
    expected = averages(module.weights)
    np.testing.assert_allclose(module.validated[0], expected[4], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(module.validated[1], expected[9], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(module.row(), expected[-1], rtol=1e-5, atol=1e-7)
    assert np.abs(module.row() - module.weights[-1]).max() > 1e-3
    assert module.count == 5


def rows() -> torch.Tensor:
    return Rows(6 * 4).tokens.repeat(3, 1)  # a resumed run's loader starts again, with the same six batches


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole, first, second = Recording(), Recording(), Recording()
    fit(tmp_path, whole, [EMA(DECAY)], rows=rows(), max_steps=12)
    fit(tmp_path, first, [EMA(DECAY), SaveAt(6, tmp_path / "at6.ckpt")], rows=rows(), max_steps=8)
    fit(tmp_path, second, [EMA(DECAY)], rows=rows(), max_steps=12, ckpt_path=tmp_path / "at6.ckpt")
    assert np.array_equal(whole.row(), second.row())
    assert not np.array_equal(first.row(), second.row())


class SaveAt(pl.Callback):
    """Saves in the middle, as a run does."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class SaveAround(pl.Callback):
    """Saves before a validation and within it, as a run that is asked to stop there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / "before.ckpt")

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / "within.ckpt")


def test_within_a_validation_the_two_are_saved_as_what_they_are(tmp_path: Path) -> None:
    steps = {"max_steps": 4, "val_check_interval": 4, "check_val_every_n_epoch": None}
    fit(tmp_path, Recording(), [EMA(DECAY), SaveAround(tmp_path)], val_rows=Rows(8), **steps)
    before, within = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("before", "within"))
    assert not torch.equal(before["state_dict"]["table.0.weight"], before["current_model_state"]["table.0.weight"])
    for part in ("state_dict", "current_model_state"):
        assert list(before[part]) == list(within[part])
        assert all(torch.equal(before[part][name], within[part][name]) for name in before[part])


def test_the_disk_that_is_asked_for_holds_both(tmp_path: Path) -> None:
    class Wide(Recording):
        def __init__(self) -> None:
            super().__init__()
            self.wide = torch.nn.Parameter(torch.zeros(2**20))

    module, callbacks = Wide(), [EMA(DECAY), SaveAround(tmp_path)]
    fit(tmp_path, module, callbacks, val_rows=Rows(8), max_steps=1, val_check_interval=1, check_val_every_n_epoch=None)
    saved, weights = (tmp_path / "within.ckpt").stat().st_size, 4 * sum(p.numel() for p in module.parameters())
    states = 2 * (weights - 4 * 2**20)  # the wide one has no gradient
    assert (
        bytes_needed(weights, states, 0)
        < saved
        < bytes_needed((1 + weights_are_averaged(callbacks)) * weights, states, 0)
    )


def test_a_run_that_was_complete_has_the_average(tmp_path: Path) -> None:
    """Lightning trains nothing then, and tells its callback of no end."""
    module, again = Recording(), Recording()
    fit(tmp_path, module, [EMA(DECAY), SaveAt(6, tmp_path / "at6.ckpt")], rows=rows(), max_steps=6)
    fit(tmp_path, again, [EMA(DECAY)], rows=rows(), max_steps=6, ckpt_path=tmp_path / "at6.ckpt")
    assert again.weights == []
    assert np.array_equal(module.row(), again.row())


class StopAt(pl.Callback):
    """As `EarlyStopping`: the fit ends at a step that nobody foresaw."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


def test_the_last_checkpoint_holds_the_trained_weights_too(tmp_path: Path) -> None:
    module, whole, again = Recording(), Recording(), Recording()
    callbacks = [EMA(DECAY), StopAt(6), Checkpoint(0, directory=tmp_path / "checkpoints")]
    trainer, _ = fit(tmp_path, module, callbacks, rows=rows(), max_steps=12, enable_checkpointing=True)
    trainer.validate(module, torch.utils.data.DataLoader(Rows(8), batch_size=4), verbose=False)
    expected = averages(module.weights)[-1]
    for row in (module.row(), module.validated[-1]):  # and what follows the fit has the average, for good
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-7)
    saved = read(find(tmp_path / "checkpoints")[0].path)
    assert saved["global_step"] == 6
    for part, wanted in (("state_dict", expected), ("current_model_state", module.weights[-1])):
        row = torch.cat([saved[part][name].flatten() for name, _ in module.named_parameters()]).double().numpy()
        np.testing.assert_allclose(row, wanted, rtol=1e-5, atol=1e-7)
    fit(tmp_path, whole, [EMA(DECAY)], rows=rows(), max_steps=8)
    at6 = {"ckpt_path": tmp_path / "checkpoints" / "step-000006", "plugins": [CheckpointIO()]}
    fit(tmp_path, again, [EMA(DECAY)], rows=rows(), max_steps=8, **at6)
    assert len(again.weights) == 2
    assert np.array_equal(whole.row(), again.row())


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ConfigError, match=r"ema\.decay"):
        EMA(decay)


def test_split_weights_are_refused() -> None:
    strategy = pl.strategies.ModelParallelStrategy()
    with pytest.raises(ConfigError, match="strategy=ddp"):
        EMA().setup(SimpleNamespace(strategy=strategy), None, "fit")
