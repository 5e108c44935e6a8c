"""Two gloo processes, DDP and FSDP2: a run that was killed goes on to the same bits; one process goes on with two."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from test_exact_resume import assert_same, end_of, fit, killed_after, step_folder
from test_fit import TRAINER

from lightning_opt import training
from lightning_opt.checkpoints import read
from lightning_opt.job.outcomes import Outcome, outcome_of
from lightning_opt.job.ranks import start_ranks
from lightning_opt.plan import Place
from lightning_opt.run_folder import RunFolder, read_metrics

pytestmark = pytest.mark.slow
WAYS = ("ddp", "fsdp")
KILLED, END = 5, 8


class Draws(pl.Callback):
    """Random numbers of each step, of which the ranks have used up differently many."""

    def __init__(self, rank: int) -> None:
        self.rank, self.drawn = rank, {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        drawn = [(random.random(), float(torch.rand(()))) for _ in range(1 + self.rank)]
        self.drawn[trainer.global_step] = drawn


def rank_work(order: dict[str, Any], folder: RunFolder | None, status: Any, here: Place) -> Outcome:
    """Per way: a whole run, the same killed and resumed, and one that a single process began."""
    assert folder is not None
    try:
        torch.set_num_threads(1)
        with training.joined(here, {**TRAINER, "devices": 2}) as group:
            for way in WAYS:
                place = folder.path / way
                lives = {"whole": None, "again": place / "whole", "spread": Path(order["alone"])}
                for name, before in lives.items():
                    if before and group.first:
                        killed_after(before, KILLED, place / name)
                    group.max(0)
                    draws = Draws(here.rank)
                    resume = step_folder(place / name, KILLED) if before else None
                    how = {"steps": END, "world": 2, "group": group, "strategy": way}
                    fit(place / name, resume=resume, extra=[draws], **how)
                    torch.save(draws.drawn, place / name / f"draws-{here.rank}.pt")
        return Outcome()
    except BaseException as error:
        outcome = outcome_of(error, 0)
        outcome.leave(folder, here.rank)
        return outcome


def alone(folder: Path, resume: Path | None = None) -> Path:
    """One process, without noise."""
    fit(folder, steps=END, resume=resume, dice=False, extra=[Draws(0)])
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    order = {"alone": str(alone(folder / "alone"))}
    outcome = start_ranks(rank_work, order, RunFolder(folder), SimpleNamespace(step=0), 2)
    assert outcome.state == "FINISHED", outcome.reason + outcome.traceback
    return folder


@pytest.mark.fault(1, "two processes, killed and resumed: the same bits, each rank its own random numbers")
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_go_on_exactly(runs: Path, way: str) -> None:
    assert_same(end_of(runs / way / "whole", END), end_of(runs / way / "again", END))
    for rank in (0, 1):
        before, after = (
            torch.load(runs / way / name / f"draws-{rank}.pt", weights_only=True) for name in ("whole", "again")
        )
        assert after == {step: drawn for step, drawn in before.items() if step > KILLED}
        assert len(after) == END - KILLED


def losses(folder: Path) -> list[float]:
    return read_metrics(folder / "metrics.csv")["train/loss"]


@pytest.mark.parametrize("way", WAYS)
def test_one_process_goes_on_as_two(runs: Path, way: str) -> None:
    """Loosely: a mean over two halves is rounded otherwise."""
    assert losses(runs / way / "spread") == pytest.approx(losses(runs / "alone"), rel=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_go_on_as_one(runs: Path, tmp_path: Path, way: str) -> None:
    killed_after(runs / way / "whole", KILLED, tmp_path / "b")
    alone(tmp_path / "b", resume=step_folder(tmp_path / "b", KILLED))
    assert losses(tmp_path / "b") == pytest.approx(losses(runs / "alone"), rel=1e-4)


def test_checkpoints_of_split_models_are_whole(runs: Path) -> None:
    """The same names, shapes and types whoever wrote them."""

    def shapes(way: str) -> dict[str, Any]:
        tree = read(step_folder(runs / way / "whole", END))
        states = tree["optimizer_states"][0]["state"]
        kept = {name: (tensor.shape, tensor.dtype) for name, tensor in tree["state_dict"].items()}
        return kept | {
            f"{index}/{name}": getattr(value, "shape", value)
            for index, state in states.items()
            for name, value in state.items()
        }

    assert shapes("fsdp") == shapes("ddp")
