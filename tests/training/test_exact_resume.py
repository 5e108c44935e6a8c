"""2N steps, or N, an end and N more: the same weights, states, schedule, counters, random numbers, data, metrics."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from test_fit import LENGTH, PLAN, VOCABULARY, run
from torch import Tensor

from lightning_opt.callbacks import Checkpoint, LossGuard, Memory, Stability
from lightning_opt.checkpoints import find, read
from lightning_opt.run_folder import read_metrics

STEPS, VALIDATE, EPOCH = 12, 4, 5  # an epoch is 5 steps: a resume may lie in its middle, at its end and behind it
CLOCKS = ("time_s", "cpu_", "memory_")  # columns that measure the machine
LION = {"name": "lion", "lr": 1e-3, "roles": {"default": {"rule": "lion"}, "norm": {"rule": "adamw"}}}
SETUPS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw-compiled": {"optimizer": {"implementation": "compiled"}},
    "lion": {"optimizer": LION},
    "lion-compiled": {"optimizer": {**LION, "implementation": "compiled"}},
    "skipping": {"guard": {"on_spike": "skip", "sigma": 1.0, "window": 4}},
}


class Corpus:
    """So few sequences of random tokens that training sees each of them several times."""

    def __init__(self, sequences: int) -> None:
        self._tokens = torch.randint(VOCABULARY, (sequences, LENGTH + 1), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self._tokens[index % len(self._tokens)]
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}


class Dice(pl.Callback):
    """Noise on the gradients from all three generators: what is not put back exactly changes the weights."""

    def on_after_backward(self, _: Any, module: pl.LightningModule) -> None:
        for parameter in module.parameters():
            parameter.grad += 1e-4 * (torch.randn_like(parameter) + random.gauss(0, 1) + np.random.normal())


class Seen(pl.Callback):
    """The batches that were trained on, by step."""

    def __init__(self) -> None:
        self.batches: dict[int, list[Any]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, _: Any, batch: dict[str, Tensor], __: int) -> None:
        self.batches.setdefault(trainer.global_step + 1, []).append(batch["input_ids"].tolist())


def fit(
    folder: Path,
    *,
    setup: str = "adamw",
    accumulate: int = 1,
    workers: int = 0,
    resume: Path | None = None,
    asked: Any = None,
    every: int = 1,
    log_every: int = 1,
    steps: int = STEPS,
    extra: Any = (),
    world: int = 1,
    dice: bool = True,
    **trainer: Any,
) -> Seen:
    """One life of a run of 12 steps, validated at steps 4, 8 and 12."""
    how = SETUPS[setup]
    plan = replace(
        PLAN,
        max_steps=steps,
        val_every_n_steps=VALIDATE,
        accumulate=accumulate,
        global_batch_size=6,
        micro_batch_size=6 // accumulate // world,
        devices=world,
    )
    seen = Seen()
    guard = LossGuard(**how.get("guard", {}))
    noise = [Dice()] if dice and world == 1 else []  # of their own it would drive ranks apart
    run(
        folder,
        plan=plan,
        train=Corpus(6 * EPOCH),
        callbacks=[guard, seen, *noise, *extra, Memory(), Stability(window=5), Checkpoint(every, keep_last=99)],
        optimizer=how.get("optimizer"),
        workers=workers,
        resume=resume,
        asked=asked or (lambda: None),
        log_every_n_steps=log_every,
        devices=world,
        **trainer,
    )
    return seen


def step_folder(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:06d}"


def flat(tree: Any, where: str = "") -> dict[str, Any]:
    """Every leaf of a checkpoint by its path; tensors as bytes, so that only equal bits are equal."""
    if isinstance(tree, dict):
        return {key: leaf for name, value in tree.items() for key, leaf in flat(value, f"{where}/{name}").items()}
    if isinstance(tree, (list, tuple)):
        return {key: leaf for i, value in enumerate(tree) for key, leaf in flat(value, f"{where}/{i}").items()}
    if isinstance(tree, Tensor):
        return {where: (tree.dtype, tuple(tree.shape), tree.contiguous().view(-1).view(torch.uint8).numpy().tobytes())}
    return {where: repr(tree)}


def clocked(name: str) -> bool:
    return name.rsplit("/", 1)[-1].startswith((*CLOCKS, "seconds"))


def end_of(folder: Path, step: int = STEPS) -> dict[str, Any]:
    """All that is known of a run's end, without what measures the machine."""
    metrics = read_metrics(folder / "metrics.csv")
    checkpoint = flat(read(step_folder(folder, step)))
    assert len(checkpoint) > 100
    assert any(name.startswith("/optimizer_states") for name in checkpoint)
    return {
        "metrics": {name: values for name, values in metrics.items() if not clocked(name)},
        "checkpoint": {name: leaf for name, leaf in checkpoint.items() if not clocked(name)},
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for part in one:
        differing = [name for name in one[part] if one[part][name] != other[part].get(name)]
        assert not differing, f"{part}: {differing}"
        assert list(one[part]) == list(other[part])


def killed_after(whole: Path, step: int, folder: Path) -> Path:
    """A run's folder as a kill some steps after a checkpoint leaves it: with later rows of metrics."""
    folder.mkdir()
    shutil.copy(whole / "metrics.csv", folder)
    shutil.copytree(step_folder(whole, step), step_folder(folder, step))
    return step_folder(folder, step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Undisturbed runs, made when first asked for."""
    made: dict[tuple[Any, ...], tuple[Path, Seen]] = {}

    def of(setup: str, accumulate: int = 1, **options: Any) -> tuple[Path, Seen]:
        key = (setup, accumulate, *options.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[key] = folder, fit(folder, setup=setup, accumulate=accumulate, **options)
        return made[key]

    return of


def resumed_equals(whole: Any, tmp_path: Path, setup: str, accumulate: int, step: int, workers: int = 0) -> None:
    undisturbed, seen = whole(setup, accumulate)
    folder = tmp_path / "resumed"
    again = fit(
        folder,
        setup=setup,
        accumulate=accumulate,
        workers=workers,
        resume=killed_after(undisturbed, step, folder),
    )
    assert again.batches == {number: batches for number, batches in seen.batches.items() if number > step}
    assert_same(end_of(undisturbed), end_of(folder))


@pytest.mark.fault(1, "a kill after step N: N more steps end in the same bits as 2N")
@pytest.mark.fault(2, "a kill inside, at the end of and behind an epoch: no sample repeated or lost")
@pytest.mark.parametrize("step", [3, 4, EPOCH])
def test_n_and_n_more_are_2n(whole: Any, tmp_path: Path, step: int) -> None:
    resumed_equals(whole, tmp_path, "adamw", 1, step)


@pytest.mark.slow
@pytest.mark.fault(1, "for every optimizer, compiled too, whatever the step")
@pytest.mark.parametrize("step", [1, 4, 5, 7, 8, 11])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("setup", SETUPS)
def test_any_step_will_do(whole: Any, tmp_path: Path, setup: str, accumulate: int, step: int) -> None:
    resumed_equals(whole, tmp_path, setup, accumulate, step)


@pytest.mark.fault(4, "0, 1 or 4 workers before and after: one order")
@pytest.mark.parametrize("workers", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_workers_change_nothing(whole: Any, tmp_path: Path, workers: int) -> None:
    resumed_equals(whole, tmp_path, "adamw", 1, 6, workers)


class Ask:
    """Wants the run to end at a moment: of the data, or within a validation."""

    def __init__(self, step: int, callback: str) -> None:
        self.asked: str | None = None
        self.callback = pl.Callback()
        setattr(self.callback, callback, self._look)
        self._step = step

    def _look(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:
            self.asked = "SIGTERM"


@pytest.mark.fault(3, "a stop within an accumulation window: saved at the end of the step, the same bits in the end")
@pytest.mark.parametrize(
    ("step", "moment"),
    [
        (4, "on_train_batch_start"),  # asked in the first micro-batch of step 5
        pytest.param(3, "on_train_batch_start", marks=pytest.mark.slow),  # the step that ends in a validation
        pytest.param(4, "on_validation_batch_start", marks=pytest.mark.slow),
        pytest.param(11, "on_train_batch_start", marks=pytest.mark.slow),  # the last step, validation and all
    ],
)
def test_a_stop_costs_nothing(whole: Any, tmp_path: Path, step: int, moment: str) -> None:
    undisturbed, seen = whole("adamw", 3)
    ask = Ask(step, moment)
    first = fit(tmp_path, accumulate=3, asked=lambda: ask.asked, extra=[ask.callback], every=0)
    done = step + (moment == "on_train_batch_start")
    assert [checkpoint.step for checkpoint in find(tmp_path / "checkpoints")] == [done]
    assert {number: len(batches) for number, batches in first.batches.items()} == dict.fromkeys(range(1, done + 1), 3)
    second = fit(tmp_path, accumulate=3, resume=step_folder(tmp_path, done), every=0)
    assert first.batches | second.batches == seen.batches
    if done < STEPS:
        assert_same(end_of(undisturbed), end_of(tmp_path))
    else:
        assert_same({"metrics": end_of(undisturbed)["metrics"]}, {"metrics": end_of(tmp_path)["metrics"]})


@pytest.mark.fault(
    30, "max_steps=N with accumulation A, killed on the way: N steps, N x A micro-batches over both lives"
)
def test_steps_and_micro_batches_are_counted_over_all_lives(whole: Any, tmp_path: Path) -> None:
    undisturbed, _ = whole("adamw", 3)
    seen = fit(tmp_path / "b", accumulate=3, resume=killed_after(undisturbed, 7, tmp_path / "b"), every=4)
    assert {step: len(batches) for step, batches in seen.batches.items()} == dict.fromkeys(range(8, STEPS + 1), 3)
    loops = read(step_folder(tmp_path / "b", STEPS))["loops"]["fit_loop"]
    assert loops["epoch_loop.batch_progress"]["total"]["ready"] == 3 * STEPS
    assert [checkpoint.step for checkpoint in find(tmp_path / "b" / "checkpoints")] == [12, 8, 7]


@pytest.mark.slow
@pytest.mark.fault(1, "rows that were not on disk yet come back where not every step is logged")
@pytest.mark.parametrize("step", [2, 5, 8, 9])
def test_rows_between_two_logged_steps(whole: Any, tmp_path: Path, step: int) -> None:
    undisturbed, _ = whole("adamw", 1, log_every=5)
    fit(tmp_path / "b", log_every=5, resume=killed_after(undisturbed, step, tmp_path / "b"))
    assert read_metrics(undisturbed / "metrics.csv")["step"] == [1, 4, 5, 8, 10, 12]
    assert_same(end_of(undisturbed), end_of(tmp_path / "b"))


@pytest.mark.fault(1, "a kill after the last step: nothing is trained again, what is left is done")
def test_a_run_that_was_over_is_over(whole: Any, tmp_path: Path) -> None:
    undisturbed, _ = whole("adamw", 1, steps=10)  # no multiple of the validation interval
    last = read_metrics(undisturbed / "metrics.csv")["val/loss"][-1]
    assert find(undisturbed / "checkpoints")[0].metric("val/loss") == pytest.approx(last)
    again = fit(tmp_path / "b", steps=10, resume=killed_after(undisturbed, 10, tmp_path / "b"))
    assert again.batches == {}
    assert_same(end_of(undisturbed, 10), end_of(tmp_path / "b", 10))


def test_a_longer_run_goes_on_where_the_shorter_ended(tmp_path: Path) -> None:
    """The data goes on; rates are those of the new schedule."""
    fit(tmp_path / "a", steps=6)
    seen = fit(tmp_path / "b", resume=step_folder(tmp_path / "a", 6))
    assert list(seen.batches) == list(range(7, STEPS + 1))
    straight = fit(tmp_path / "c", every=0)
    assert seen.batches == {step: batches for step, batches in straight.batches.items() if step > 6}
    longer, direct = (read_metrics(tmp_path / name / "metrics.csv") for name in "bc")
    assert longer["lr/matrix"][-6:] == direct["lr/matrix"][-6:]


@pytest.mark.slow
def test_another_accumulation_goes_on_at_the_same_step(whole: Any, tmp_path: Path) -> None:
    undisturbed, seen = whole("adamw", 3)
    again = fit(tmp_path / "b", accumulate=2, resume=killed_after(undisturbed, 7, tmp_path / "b"))
    assert list(again.batches) == list(range(8, STEPS + 1))
    for step, batches in again.batches.items():
        assert list(chain(*batches)) == list(chain(*seen.batches[step]))
    columns = read_metrics(tmp_path / "b" / "metrics.csv")
    assert [s for s, v in zip(columns["step"], columns["val/loss"], strict=True) if v is not None] == [4, 8, 12]


@pytest.mark.slow
@pytest.mark.fault(1, "a new process goes on to the same bits")
def test_in_a_new_process(whole: Any, tmp_path: Path, repository: Path) -> None:
    undisturbed, _ = whole("adamw", 1)
    killed_after(undisturbed, 7, tmp_path / "b")
    command = [sys.executable, __file__, str(tmp_path / "b"), str(torch.get_num_threads())]
    paths = os.environ | {"PYTHONPATH": str(repository)}
    ended = subprocess.run(command, env=paths, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert_same(end_of(undisturbed), end_of(tmp_path / "b"))


def test_other_threads_are_one_warning(whole: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    undisturbed, _ = whole("adamw", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        fit(tmp_path / "b", resume=killed_after(undisturbed, 11, tmp_path / "b"))
    finally:
        torch.set_num_threads(threads)
    said = [record.message for record in caplog.records if "bits may differ" in record.message]
    assert len(said) == 1
    assert f"threads {threads} -> {threads + 1}" in said[0]


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    fit(Path(sys.argv[1]), resume=step_folder(Path(sys.argv[1]), 7))
