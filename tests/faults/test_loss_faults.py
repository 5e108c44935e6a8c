"""Losses and gradients that are spoiled for real in whole runs: no bad step is taken, and the run says what it did.

The runs are this very process, which saves each the seconds of its imports; two ranks are processes of their own.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import driver
import poison
import pytest
import torch
from poison import SEEN, Seen
from safetensors.torch import load_file

from lightning_opt import checkpoints
from lightning_opt.launch import main
from lightning_opt.run_folder import RunFolder, read_events, read_json, read_metrics, read_status

TINY = (
    *driver.SMALLEST,
    "name=spoiled",
    "trainer.num_threads=1",
    "trainer.max_steps=12",
    "trainer.global_batch_size=4",
    "trainer.micro_batch_size=2",
    "trainer.val_every_n_steps=6",
    "trainer.log_every_n_steps=5",
    "callbacks.checkpoint.every_n_steps=3",
    "+callbacks.poison._target_=poison.Poison",
)
"""Two micro-batches of two sequences a step, checkpoints at 3, 6, 9 and 12."""
SMALL_WINDOW = ("callbacks.loss_guard.window=8", "callbacks.loss_guard.warmup=4")


@pytest.fixture
def run(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, list[Seen]]]:
    """`train.py` in a folder of its own: its exit code, and the steps it was about to take."""
    cache = tmp_path_factory.getbasetemp() / "spoiled-cache"
    texts = driver.write_texts(tmp_path / "texts")
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def run(name: str, *more: str, gradient: Callable[[int, torch.Tensor], float] = lambda *_: 1.0):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setattr(poison, "GRADIENT", gradient)
        SEEN.clear()
        code = main([*TINY, f"data.path={texts}", f"data.cache_dir={cache}", *more])
        return code, list(SEEN)

    return run


def folder(tmp_path: Path, name: str) -> RunFolder:
    (path,) = (tmp_path / name).glob("runs/spoiled/*-*")
    return RunFolder(path)


def weights(folder: RunFolder) -> tuple[int, list[torch.Tensor]]:
    """Step and weights of the newest checkpoint."""
    newest = checkpoints.find(folder.checkpoints)[0]
    return newest.step, list(checkpoints.read(newest.path)["state_dict"].values())


@pytest.mark.fault(13, "a NaN loss at a step that is not logged: no update, everything named, exit 3, a report")
def test_a_loss_that_is_not_a_number(run: Callable, tmp_path: Path) -> None:
    code, seen = run("a", "+callbacks.poison.loss_at=8")
    assert code == 3
    spoiled = folder(tmp_path, "a")
    status = read_status(spoiled.status)  # the largest rate: the embedding's 0.048, 5/12 of it at step 8 of 12
    assert (status["state"], status["step"]) == ("DIVERGED", 7)
    said = "gradient norm nan at step 8 (loss nan, lr 0.02, sequences 28 to 31); the step was not taken"
    assert status["reason"] == said
    assert said in spoiled.log.read_text()
    assert seen[-1].step == 8
    assert seen[-1].weights.isfinite().all()
    assert max(step for step in read_metrics(spoiled.metrics)["step"] if step) <= 7
    assert read_json(spoiled.summary)["state"] == "DIVERGED"
    assert "sequences 28 to 31" in spoiled.report_html.read_text()
    step, saved = weights(spoiled)
    assert step == 6
    assert all(tensor.isfinite().all() for tensor in saved)


@pytest.mark.fault(15, "a spike skipped: weights and states untouched, counted, remembered over a breakdown")
def test_a_skipped_spike(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second spike is right behind the resume, where only the window from before it knows what is usual."""
    skip = (*SMALL_WINDOW, "callbacks.loss_guard.on_spike=skip", "+callbacks.poison.fail_at=9")
    spikes = {6: 100.0, 7: 100.0}
    gradient = lambda step, _: spikes.get(step, 1.0)  # noqa: E731
    code, calm = run("calm", *skip, gradient=gradient)
    assert code == 0
    for before, after in itertools.pairwise(calm):
        untouched = torch.equal(before.weights, after.weights) and torch.equal(before.state, after.state)
        assert untouched == (before.step in (6, 7))
    monkeypatch.setenv("POISON_FAILS", "yes")
    assert run("broken", *skip, gradient=gradient)[0] == 1
    monkeypatch.delenv("POISON_FAILS")
    code, again = run("broken", *skip, gradient=gradient)
    assert (code, again[0].step) == (0, 7)
    for name in ("calm", "broken"):
        skipped = [event for event in read_events(folder(tmp_path, name).events) if event["kind"] == "step_skipped"]
        assert {event["step"] for event in skipped} == {6, 7}
        assert read_json(folder(tmp_path, name).summary)["skipped_steps"] == 2
    ends = [weights(folder(tmp_path, name))[1] for name in ("calm", "broken")]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert torch.equal(calm[-1].state, again[-1].state)


@pytest.mark.fault(16, "a spike with rewind: back to the last good checkpoint, and past the bad sequences")
@pytest.mark.parametrize("factor", [1000.0, pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_going_back_past_the_bad_batches(run: Callable, tmp_path: Path, factor: float) -> None:
    """What is bad is the data: a run that went over it again would be spoiled again."""
    rewind = (*SMALL_WINDOW, "callbacks.loss_guard.on_spike=rewind")
    _, calm = run("calm", *rewind, "trainer.max_steps=14", "schedule=constant")
    bad = calm[7].sequences
    code, seen = run("a", *rewind, gradient=lambda _, rows: factor if torch.equal(rows, bad) else 1.0)
    assert code == 0
    assert [one.step for one in seen] == [*range(1, 9), *range(7, 13)]
    assert torch.equal(seen[8].weights, seen[6].weights)
    assert torch.equal(seen[8].state, seen[6].state)
    for place, one in enumerate(seen[8:]):
        assert torch.equal(one.sequences, calm[8 + place].sequences)
    spoiled = folder(tmp_path, "a")
    (event,) = [event for event in read_events(spoiled.events) if event["kind"] == "rewound"]
    assert (event["step"], event["not_before"]) == (8, 32)
    assert read_json(spoiled.summary)["rewinds"] == 1
    logged = read_metrics(spoiled.metrics)["step"]
    assert logged == sorted(set(logged))


@pytest.mark.fault(16, "broken down between a rewind and the next checkpoint: the rewind is remembered, to the bit")
def test_a_rewind_outlives_a_breakdown(run: Callable, tmp_path: Path) -> None:
    """The run breaks down when it comes to step 8 for the second time; the bad batch is met once only."""
    rewind = (*SMALL_WINDOW, "callbacks.loss_guard.on_spike=rewind", "trainer.val_every_n_steps=12")

    def gradient(step: int, rows: torch.Tensor) -> float:
        if len(SEEN) == 10:
            raise OSError("the machine breaks down")
        return 1000.0 if len(SEEN) == 8 else 1.0

    code, seen = run("a", *rewind, gradient=gradient)
    assert (code, [one.step for one in seen]) == (1, [*range(1, 9), 7, 8])
    bad = seen[7].sequences
    code, again = run("a", *rewind, gradient=lambda _, rows: 1000.0 if torch.equal(rows, bad) else 1.0)
    assert (code, [one.step for one in again]) == (0, [7, 8, 9, 10, 11, 12])
    for one, other in zip(seen[8:], again, strict=False):
        assert torch.equal(one.sequences, other.sequences)
        assert torch.equal(one.weights, other.weights)
        assert torch.equal(one.state, other.state)
    spoiled = folder(tmp_path, "a")
    assert read_json(spoiled.summary)["rewinds"] == 1
    state = checkpoints.read(checkpoints.find(spoiled.checkpoints)[0].path)["callbacks"]
    assert [kept["rewinds"] for kept in state.values() if "rewinds" in kept] == [1]


@pytest.mark.slow
@pytest.mark.fault(16, "bad steps without end: rewound n times at most, then diverged")
def test_rewinding_ends(run: Callable, tmp_path: Path) -> None:
    rewind = ("callbacks.loss_guard.on_spike=rewind", "callbacks.loss_guard.max_rewinds=2")
    code, seen = run("a", *rewind, gradient=lambda step, _: float("nan") if step == 8 else 1.0)
    assert code == 3
    assert [one.step for one in seen] == [*range(1, 9), 7, 8, 7, 8]
    sequences = [one.sequences for one in seen if one.step == 8]
    assert not torch.equal(sequences[0], sequences[1])
    status = read_status(folder(tmp_path, "a").status)
    assert status["reason"].endswith("the step was not taken; rewound 2 times before")
    assert read_json(folder(tmp_path, "a").summary)["rewinds"] == 2


@pytest.mark.slow
@pytest.mark.fault(14, "an infinite gradient, or a spike, on one rank only: both decide alike at the same step")
@pytest.mark.parametrize(("factor", "strategy"), [("inf", "ddp"), ("1e6", "ddp"), ("1e6", "fsdp")])
def test_one_rank_alone_is_bad(repository: Path, tmp_path: Path, factor: str, strategy: str) -> None:
    more = ("trainer=" + strategy, "trainer.devices=2", "+callbacks.poison.rank=1", "+callbacks.poison.rank_at=8")
    texts = (f"data.path={driver.write_texts(tmp_path / 'texts')}", f"data.cache_dir={tmp_path / 'cache'}")
    path = os.pathsep.join([str(repository), str(Path(__file__).parent)])
    skip = (*SMALL_WINDOW, "callbacks.loss_guard.on_spike=skip")
    done = subprocess.run(
        [sys.executable, str(repository / "train.py"), *TINY, *skip, *texts, *more],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "POISON_FACTOR": factor},
        capture_output=True,
        text=True,
        timeout=240,
    )
    (run_path,) = tmp_path.glob("runs/spoiled/*-*")
    spoiled = RunFolder(run_path)
    if factor == "inf":
        assert done.returncode == 3, done.stdout + done.stderr
        assert read_status(spoiled.status)["reason"].startswith("gradient norm inf at step 8 (")
        return
    assert done.returncode == 0, done.stdout + done.stderr
    assert [event["step"] for event in read_events(spoiled.events) if event["kind"] == "step_skipped"] == [8]
    if strategy == "ddp":
        assert torch.equal(torch.load(tmp_path / "weights-0.pt"), torch.load(tmp_path / "weights-1.pt"))


def exported(folder: RunFolder) -> dict[str, torch.Tensor]:
    """The model that the run has left."""
    return load_file(folder.model / "model.safetensors")


@pytest.mark.slow
@pytest.mark.fault(15, "averaged weights over a breakdown: the same average, in the checkpoint and the exported model")
def test_averaged_weights(run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    average = ("callbacks=ema", "callbacks.ema.decay=0.8", "+callbacks.poison.fail_at=9")
    code, _ = run("calm", *average)
    assert code == 0
    monkeypatch.setenv("POISON_FAILS", "yes")
    assert run("broken", *average)[0] == 1
    monkeypatch.delenv("POISON_FAILS")
    assert run("broken", *average)[0] == 0
    calm, broken = (exported(folder(tmp_path, name)) for name in ("calm", "broken"))
    assert all(torch.equal(calm[name], broken[name]) for name in calm)
    newest = checkpoints.read(checkpoints.find(folder(tmp_path, "calm").checkpoints)[0].path)
    kept = {name.removeprefix("model."): tensor for name, tensor in newest["state_dict"].items()}
    trained = {name.removeprefix("model."): tensor for name, tensor in newest["current_model_state"].items()}
    assert all(torch.equal(calm[name], kept[name]) for name in calm)
    assert not any(torch.equal(calm[name], trained[name]) for name in calm)


@pytest.mark.slow
@pytest.mark.fault(16, "a bad step before the first checkpoint: from the start, past the bad sequences")
def test_going_back_to_the_start(run: Callable) -> None:
    code, seen = run(
        "a", "callbacks.loss_guard.on_spike=rewind", gradient=lambda step, rows: float("nan") if len(SEEN) == 2 else 1.0
    )
    assert code == 0
    assert [one.step for one in seen] == [1, 2, *range(1, 13)]
    assert torch.equal(seen[2].weights, seen[0].weights)
    assert not any(torch.equal(one.sequences, bad.sequences) for one in seen[2:4] for bad in seen[:2])
