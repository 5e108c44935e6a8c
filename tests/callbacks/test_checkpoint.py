"""Checkpoint alone in somebody else's project: epochs, dropout, their optimizer and schedules, validation or not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_opt.callbacks import Checkpoint
from lightning_opt.checkpoints import Damaged, find, read
from lightning_opt.plan import ConfigError

BATCHES = 7


class Theirs(pl.LightningModule):
    """Dropout, an optimizer of torch's and a schedule by epochs."""

    def __init__(self, plateau: bool = False) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
        self.plateau = plateau
        self.trained: list[float] = []
        self.validated: list[int] = []

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        self.trained.append(float(batch[0, 0]))
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        if index == 0:
            self.validated.append(self.trainer.global_step)
        self.log("val/loss", self.net(batch).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if self.plateau:
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss"}}
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)}


class Loader:
    """Batches with a position: each pass has its own order."""

    def __init__(self) -> None:
        self.passes, self.given, self._resumed = 0, 0, False

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Any:
        if not self._resumed:
            self.passes, self.given = self.passes + 1, 0
        self._resumed = False
        order = torch.randperm(BATCHES, generator=torch.Generator().manual_seed(self.passes))
        for number in order[self.given :].tolist():
            self.given += 1
            yield torch.full((2, 4), float(number + 1))

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes, "given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.passes, self.given, self._resumed = state["passes"], state["given"], True


def train(
    folder: Path,
    *,
    every: int | None = 1,
    resume: Path | None = None,
    loader: Any = None,
    plateau: bool = False,
    validates: bool = True,
    callback: Checkpoint | None = None,
    kind: type[Theirs] = Theirs,
    also: Any = (),
    **options: Any,
) -> Theirs:
    pl.seed_everything(5 if resume is None else 6, verbose=False)
    module = kind(plateau)
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[callback or Checkpoint(every, keep_last=99), *also],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **({"max_epochs": 3} | options),
    )
    validation = DataLoader(torch.ones(4, 4), batch_size=2) if validates else None
    trainer.fit(module, loader or Loader(), validation, ckpt_path=resume)
    return module


def step_folder(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:06d}"


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for name in one:
            assert_equal(one[name], other[name], f"{where}/{name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}/{index}")
    elif isinstance(one, Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


CASES: dict[str, dict[str, Any]] = {
    "validated at each epoch's end": {},
    "within epochs": {"val_check_interval": 3},
    "never validated": {"validates": False},
    "accumulated": {"accumulate_grad_batches": 2},
    "accumulated, never validated": {"accumulate_grad_batches": 2, "validates": False},
    "by steps": {"max_epochs": -1, "max_steps": 17, "val_check_interval": 4, "check_val_every_n_epoch": None},
}


def resume_from_each(folder: Path, case: str, steps: Any) -> None:
    """Whether a killed run trains on the same batches, validates at the same steps and ends in the same bits."""
    whole = train(folder / "a", **CASES[case])
    end = find(folder / "a" / "checkpoints")[0].step
    accumulate = CASES[case].get("accumulate_grad_batches", 1)
    for step in steps or range(1, end):
        again = train(folder / "b", resume=step_folder(folder / "a", step), **CASES[case])
        epochs, steps_within = divmod(step, -(-BATCHES // accumulate))
        done = epochs * BATCHES + steps_within * accumulate
        assert again.trained == whole.trained[done:], step
        assert again.validated == [validated for validated in whole.validated if validated > step], step
        assert_equal(*(read(step_folder(folder / name, end)) for name in "ab"), f"{step}")


@pytest.mark.fault(2, "in another project: within, at the end of and behind an epoch, each later epoch is whole")
def test_around_the_end_of_an_epoch(tmp_path: Path) -> None:
    resume_from_each(tmp_path, "by steps", (6, 7, 8))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_from_any_step_to_the_same_end(tmp_path: Path, case: str) -> None:
    resume_from_each(tmp_path, case, None)


@pytest.mark.slow
def test_a_plain_loader_goes_on_exactly_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    rows = [torch.full((4,), float(number)) for number in range(2 * BATCHES)]
    whole = train(tmp_path / "a", loader=DataLoader(rows, batch_size=2))
    resume = step_folder(tmp_path / "a", BATCHES)
    again = train(tmp_path / "b", loader=DataLoader(rows, batch_size=2), resume=resume)
    assert again.trained == whole.trained[BATCHES:]
    assert_equal(*(read(step_folder(tmp_path / name, 3 * BATCHES))["state_dict"] for name in "ab"))


def saved(folder: Path) -> list[int]:
    return sorted(checkpoint.step for checkpoint in find(folder / "checkpoints"))


def test_when_it_saves(tmp_path: Path) -> None:
    """About 20 over the run; only the last; a run that ends otherwise than by max_steps."""
    train(tmp_path / "a", every=None, max_epochs=-1, max_steps=40, validates=False)
    assert saved(tmp_path / "a") == list(range(2, 41, 2))
    train(tmp_path / "b", every=0, max_epochs=1)
    assert saved(tmp_path / "b") == [BATCHES]
    train(tmp_path / "c", every=4, max_epochs=2, accumulate_grad_batches=3)
    assert saved(tmp_path / "c") == [3, 4, 6]  # the first validation, at the end of an epoch, is the best so far


class Scored(Theirs):
    """Its validations come out as they are told to, whatever it learned."""

    SCORES: ClassVar = {2: 3.0, 4: 1.0, 6: 2.0, 8: float("nan"), 10: 0.5, 12: 0.7, 14: 0.5}

    def validation_step(self, batch: Tensor, index: int) -> None:
        super().validation_step(batch, index)
        self.log("score", self.SCORES[self.trainer.global_step])


@pytest.mark.parametrize(("keep", "kept"), [(0, [12, 15]), (1, [14, 15]), (2, [10, 14, 15])])
def test_a_validation_that_beats_what_is_kept_is_saved(tmp_path: Path, keep: int, kept: list[int]) -> None:
    """The interval of 6 steps meets no validation but those of 6 and 12."""
    options = {"max_epochs": -1, "max_steps": 15, "val_check_interval": 2, "check_val_every_n_epoch": None}
    callback = Checkpoint(6, keep_last=2, keep_best=keep, monitor="score")
    train(tmp_path, callback=callback, kind=Scored, **options)
    found = {checkpoint.step: checkpoint.metric("score") for checkpoint in find(tmp_path / "checkpoints")}
    assert sorted(found) == kept
    assert found == {step: pytest.approx(Scored.SCORES[step]) if step < 15 else None for step in kept}


class Sober(Theirs):
    """No dropout: their loader draws a number at the start of each validation, also of one that was left."""

    def __init__(self, plateau: bool) -> None:
        super().__init__(plateau)
        self.net[1].p = 0.0


class StopWithin(pl.Callback):
    """Saves within a validation and leaves, as a run that is asked to stop."""

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == BATCHES:
            next(one for one in trainer.callbacks if isinstance(one, Checkpoint)).save_now(trainer)
            raise KeyboardInterrupt


def test_a_validation_that_was_left_is_made_up_for_and_its_step_saved_with_the_metric(tmp_path: Path) -> None:
    """At the end of an epoch; from either of the two checkpoints of that step to the same end."""

    def of(folder: str, **options: Any) -> Theirs:
        return train(tmp_path / folder, kind=Sober, callback=Checkpoint(9, keep_last=99), **options)

    whole = of("a")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        of("b", also=[StopWithin()])
    assert find(tmp_path / "b" / "checkpoints")[0].metric("val/loss") is None
    for _ in range(2):
        again = of("b", resume=step_folder(tmp_path / "b", BATCHES))
        assert again.trained == whole.trained[BATCHES:]
        assert find(tmp_path / "b" / "checkpoints")[-1].metric("val/loss") is not None
        assert_equal(*(read(step_folder(tmp_path / name, 3 * BATCHES))["state_dict"] for name in "ab"))


def test_the_best_is_the_lowest_of_what_was_validated(tmp_path: Path) -> None:
    callback = Checkpoint(1, keep_last=1, keep_best=2)
    train(tmp_path, callback=callback, val_check_interval=2)
    kept = find(tmp_path / "checkpoints")
    scores = {checkpoint.step: checkpoint.metric("val/loss") for checkpoint in kept}
    assert len(kept) == 3
    assert scores.pop(3 * BATCHES) is None  # the newest, not validated
    assert None not in scores.values()
    assert kept[-1].meta["metrics"]["val/loss"] == scores[kept[-1].step]


def test_the_manifest_tells_what_it_is_of(tmp_path: Path) -> None:
    callback = Checkpoint(0)
    callback.identity, callback.tokens_per_step = {"seed": 5}, 100
    train(tmp_path, callback=callback, max_epochs=1)
    meta = find(tmp_path / "checkpoints")[0].meta
    assert meta["identity"] == {"seed": 5}
    assert (meta["tokens"], meta["world_size"], meta["threads"]) == (700, 1, torch.get_num_threads())


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    train(tmp_path, every=0, max_epochs=1)
    file = step_folder(tmp_path, BATCHES) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(Damaged, match=r"step-000007.*model\.safetensors"):
        train(tmp_path, resume=step_folder(tmp_path, BATCHES))


def test_lightnings_own_files_still_work(tmp_path: Path) -> None:
    """Somebody saves by hand, into a file, and goes on from it."""

    class ByHand(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "own.ckpt")

    module = Theirs()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    both = [ByHand(), Checkpoint(0, directory=tmp_path / "ours")]
    pl.Trainer(max_epochs=1, callbacks=both, num_sanity_val_steps=0, **quiet).fit(module, Loader(), Loader())
    assert (tmp_path / "own.ckpt").is_file()
    again = Theirs()
    pl.Trainer(max_epochs=1, callbacks=[Checkpoint(0, directory=tmp_path / "ours")], **quiet).fit(
        again, Loader(), Loader(), ckpt_path=tmp_path / "own.ckpt"
    )
    assert again.trained == []
    assert_equal(dict(module.state_dict()), dict(again.state_dict()))


def test_a_full_disk_does_not_stop_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: list[dict[str, Any]] = []
    callback = Checkpoint(3)
    callback.on_event = lambda kind, **fields: told.append({"kind": kind} | fields)
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with caplog.at_level(logging.ERROR):
        module = train(tmp_path, callback=callback, max_epochs=1)
    assert len(module.trained) == BATCHES
    assert [(event["kind"], event["step"]) for event in told] == [("checkpoint_failed", step) for step in (3, 6, 7)]


@pytest.mark.parametrize("wrong", [{"every_n_steps": -1}, {"keep_last": 0}, {"keep_every_n_steps": 0}])
def test_numbers_that_make_no_sense(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"checkpoint.{next(iter(wrong))}"):
        Checkpoint(**wrong)


def test_a_stop_is_told_what_is_on_disk(tmp_path: Path) -> None:
    """Not the step that could not be saved, but the one before; none where there is none."""

    class Stop(pl.Callback):
        told: ClassVar[list[int | None]] = []

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            (checkpoint,) = trainer.checkpoint_callbacks
            place = tmp_path / "checkpoints"
            if trainer.global_step in (1, 3):
                place.rename(tmp_path / "away") if place.exists() else None
                place.write_text("in the way")
            self.told.append(checkpoint.save_now(trainer))
            if trainer.global_step in (1, 3):
                place.unlink()
                (tmp_path / "away").rename(place) if trainer.global_step == 3 else None

    train(tmp_path, every=0, also=[Stop()], max_steps=4)
    assert Stop.told == [None, 2, 2, 4]
