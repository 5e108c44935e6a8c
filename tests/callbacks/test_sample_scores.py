"""SampleScores in somebody else's project: the run must not feel it, and it sees what validation sees."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from foreign_project import FakeClock, Foreign, Logged, Rows, both_agree, fit
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn

from lightning_opt import optim
from lightning_opt.callbacks import EMA, OptimizerSignals, Progress, SampleScores, Throughput
from lightning_opt.plan import ConfigError


def weights(module: torch.nn.Module) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).double().numpy()


class Scorer:
    """Disturbs all it can, as other people's code does; keeps what it was shown."""

    columns = ("score/toy/acc",)

    def __init__(self, clock: FakeClock | None = None, fails_at: int | None = None) -> None:
        self.clock, self.fails_at = clock, fails_at
        self.steps: list[int] = []
        self.seen: list[np.ndarray] = []

    def __call__(self, module: pl.LightningModule) -> dict[str, Any]:
        assert not module.training
        assert not torch.is_grad_enabled()
        self.steps.append(module.trainer.global_step)
        self.seen.append(weights(module))
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        module.table[0].train()
        if self.clock:
            self.clock.ms(500)
        if self.steps[-1] == self.fails_at:
            raise OSError("the documents\nare gone")
        return {"score/toy/acc": torch.tensor(0.25)}


class Noisy(Foreign):
    """Draws random numbers in every step, and has a dropout."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.table.append(torch.nn.Dropout(0.3))


def with_rule(name: str) -> Any:
    return {"adamw": optim.AdamW, "schedule_free_adamw": optim.ScheduleFreeAdamW}[name]


def trained(tmp_path: Path, callbacks: list[pl.Callback], module: Foreign | None = None, **options: Any) -> Foreign:
    module = module or Noisy()
    torch.manual_seed(1)
    fit(tmp_path, module, callbacks, **options)
    return module


def test_scores_every_n_steps_and_at_the_end(tmp_path: Path) -> None:
    scorer = Scorer()
    _, logged = fit(tmp_path, Foreign(), [SampleScores(scorer, every_n_steps=5)])
    assert scorer.steps == [5, 10, 12]
    assert logged.column("score/toy/acc") == [0.25] * 3
    assert all(0 < share <= 1 for share in logged.column("score/time_share"))


def test_steps_are_optimizer_steps(tmp_path: Path) -> None:
    scorer = Scorer()
    fit(tmp_path, Foreign(), [SampleScores(scorer, every_n_steps=2)], max_steps=5, accumulate_grad_batches=3)
    assert scorer.steps == [2, 4, 5]


@pytest.mark.parametrize(("every", "steps"), [(None, [2, 4, 6, 8, 10, 12]), (0, [])])
def test_by_itself_it_scores_ten_times_at_most_and_0_is_off(
    tmp_path: Path, every: int | None, steps: list[int]
) -> None:
    scorer = Scorer()
    callback = SampleScores(scorer, every_n_steps=every)
    fit(tmp_path, Foreign(), [callback])
    assert scorer.steps == steps
    expected = [] if every == 0 else ["score/toy/acc", "score/seconds", "score/time_share"]
    assert callback.columns(nn.Module()) == expected


def test_without_a_scorer_it_does_nothing(tmp_path: Path) -> None:
    callback = SampleScores(every_n_steps=1)
    fit(tmp_path, Foreign(), [callback])
    assert callback.last == {}
    assert callback.columns(nn.Module()) == []


@pytest.mark.parametrize("rule", ["adamw", "schedule_free_adamw"])
def test_the_run_takes_the_same_steps(tmp_path: Path, rule: str) -> None:
    def run(*own: pl.Callback) -> Foreign:
        averaging = [] if rule == "schedule_free_adamw" else [EMA(0.9)]
        return trained(tmp_path, [*own, OptimizerSignals(), *averaging], Noisy(make_optimizer=with_rule(rule)))

    plain, scored = run(), run(SampleScores(Scorer(), every_n_steps=2))
    assert plain.micro_losses == scored.micro_losses
    assert np.array_equal(weights(plain), weights(scored))
    assert scored.table[2].training


class Validated(Noisy):
    """Keeps what validation saw."""

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.validated = getattr(self, "validated", {}) | {self.trainer.global_step: weights(self)}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("averaging", ["ema", "schedule_free"])
def test_it_scores_the_averaged_weights_that_validation_sees(tmp_path: Path, averaging: str, first: bool) -> None:
    """Wherever it stands among the callbacks; not the trained weights."""
    scorer = Scorer()
    others: list[pl.Callback] = [OptimizerSignals()]
    module = Validated(make_optimizer=with_rule("schedule_free_adamw" if averaging == "schedule_free" else "adamw"))
    if averaging == "ema":
        others.append(EMA(0.8))
    trained_weights: list[np.ndarray] = []
    module.on_train_batch_end = lambda *_: trained_weights.append(weights(module))
    own = SampleScores(scorer, every_n_steps=4)
    trained(
        tmp_path, [own, *others] if first else [*others, own], module, val_rows=Rows(4), val_check_interval=4,
        check_val_every_n_epoch=None,
    )  # fmt: skip
    assert scorer.steps == [4, 8, 12]
    for step, seen in zip(scorer.steps, scorer.seen, strict=True):
        assert np.array_equal(seen, module.validated[step])
        assert np.abs(seen - trained_weights[step - 1]).max() > 1e-4


def test_lightnings_own_averaging_counts_too(tmp_path: Path) -> None:
    scorer, module = Scorer(), Validated()
    averaging = WeightAveraging(avg_fn=lambda average, new, _: (average + new) / 2)
    trained(
        tmp_path, [SampleScores(scorer, every_n_steps=6), averaging], module, val_rows=Rows(4), val_check_interval=6,
        check_val_every_n_epoch=None,
    )  # fmt: skip
    assert np.array_equal(scorer.seen[0], module.validated[6])


def test_an_exception_is_one_warning_and_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scorer = Scorer(fails_at=4)
    with caplog.at_level(logging.WARNING, "lightning_opt"):
        scored = trained(tmp_path, [EMA(0.9), SampleScores(scorer, every_n_steps=2)])
    assert scorer.steps == [2, 4]
    told = [record.getMessage() for record in caplog.records]
    assert told == ["scores     step 4: OSError: the documents are gone: training goes on, without scores"]
    assert np.array_equal(weights(scored), weights(trained(tmp_path, [EMA(0.9)])))


def test_what_is_no_exception_ends_the_run(tmp_path: Path) -> None:
    def stop(module: pl.LightningModule) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, Foreign(), [SampleScores(stop, every_n_steps=2)])


def test_a_resumed_run_scores_and_trains_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    class SaveAt(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "at6.ckpt")

    rows = Rows(6 * 4).tokens.repeat(3, 1)
    whole, again = Scorer(), Scorer()
    first = Foreign()
    fit(tmp_path, first, [EMA(0.8), SampleScores(whole, every_n_steps=3), SaveAt()], rows=rows)
    second = Foreign()
    fit(tmp_path, second, [EMA(0.8), SampleScores(again, every_n_steps=3)], rows=rows, ckpt_path=tmp_path / "at6.ckpt")
    assert again.steps == [9, 12]
    assert all(np.array_equal(a, b) for a, b in zip(again.seen, whole.seen[2:], strict=True))
    assert np.array_equal(weights(first), weights(second))


@pytest.mark.parametrize("first", [True, False])
def test_the_speed_that_is_shown_does_not_count_it(tmp_path: Path, clock: FakeClock, first: bool) -> None:
    """Each step takes 10 ms of the clock, each scoring 500."""
    own = SampleScores(Scorer(clock), every_n_steps=3, clock=clock)
    speed, shown = Throughput(warmup_steps=0, clock=clock), Progress(clock=clock, every_n_steps=1)
    module = Foreign(forward=lambda: clock.ms(10))
    _, logged = fit(tmp_path, module, [own, speed, shown] if first else [speed, shown, own])
    assert logged.column("step_ms") == pytest.approx([10.0] * 12)
    assert logged.column("score/seconds") == pytest.approx([0.5] * 4)
    assert logged.column("score/time_share")[-1] == pytest.approx(2.0 / 2.12)


def test_wrong_intervals_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sample_scores.every_n_steps = -1"):
        SampleScores(None, every_n_steps=-1)


def test_scores_go_to_every_logger(tmp_path: Path) -> None:
    other = Logged()
    fit(tmp_path, Foreign(), [SampleScores(Scorer(), every_n_steps=6)], logger=[Logged(), other])
    assert [step for step, row in other.rows if "score/toy/acc" in row] == [5, 11]  # as Lightning counts


TWO_PROCESSES = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from foreign_project import Foreign, Rows, fit
from lightning_opt.callbacks import SampleScores

class Scorer:
    columns = ("score/toy/acc",)
    steps = []

    def __call__(self, module):
        self.steps.append(module.trainer.global_step)
        if module.trainer.global_rank == 1 and self.steps[-1] == 8:
            raise OSError("gone")
        return {"score/toy/acc": 0.25 + module.trainer.global_rank}

if __name__ == "__main__":
    module, scorer = Foreign(), Scorer()
    options = {"rows": Rows(96), "max_steps": 12, "devices": 2, "strategy": "ddp"}
    trainer, logged = fit(Path(sys.argv[2]), module, [SampleScores(scorer, every_n_steps=2)], **options)
    assert trainer.world_size == 2
    assert scorer.steps == [2, 4, 6, 8], scorer.steps
    first = trainer.global_rank == 0
    assert logged.column("score/toy/acc") == [0.25] * 3 * first, logged.rows
    assert trainer.global_step == 12
    every = trainer.strategy.all_gather(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(every[0], every[1])
    print("AGREED", flush=True)
"""


@pytest.mark.slow
def test_over_two_processes_all_score_one_logs_and_a_failure_ends_it_for_all(tmp_path: Path) -> None:
    both_agree(TWO_PROCESSES, tmp_path)
