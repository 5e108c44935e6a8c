"""A run that goes on with another batch, optimizer, average or precision than it was saved with."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from test_exact_resume import Corpus, Seen, step_folder
from test_fit import LENGTH, PLAN, run
from torch import Tensor

from lightning_opt.callbacks import EMA, Checkpoint
from lightning_opt.checkpoints import find, read
from lightning_opt.plan import ConfigError
from lightning_opt.run_folder import read_metrics

BATCH = 6


def life(
    folder: Path, steps: int, *, batch: int = BATCH, accumulate: int = 1, callbacks: Any = (), **how: Any
) -> list[list[int]]:
    """One life of a run, saved after each step; the sequences that it was trained on."""
    plan = replace(
        PLAN,
        max_steps=steps,
        val_every_n_steps=4,
        accumulate=accumulate,
        global_batch_size=batch,
        micro_batch_size=batch // accumulate,
        tokens_per_step=batch * LENGTH,
    )
    seen, saving = Seen(), Checkpoint(1, keep_last=99)
    saving.tokens_per_step = plan.tokens_per_step
    run(folder, plan=plan, train=Corpus(200), callbacks=[seen, *callbacks, saving], val_sequences=2, **how)
    return [row for batches in seen.batches.values() for batch in batches for row in batch]


def test_every_batch_size_goes_on_where_the_one_before_it_ended(tmp_path: Path) -> None:
    """Six steps of 6, that run being over; six of 3 in two parts; from the eighth step on of 12, past all that a run of
    6 would have seen."""
    first = life(tmp_path / "a", 6)
    second = life(tmp_path / "b", 12, batch=3, accumulate=3, resume=step_folder(tmp_path / "a", 6))
    third = life(tmp_path / "c", 10, batch=12, accumulate=2, resume=step_folder(tmp_path / "b", 8))
    corpus = Corpus(200)
    order = [corpus[i]["input_ids"].tolist() for i in range(36 + 2 * 3 + 2 * 12)]
    assert first + second == order[: 36 + 6 * 3]
    assert first + second[: 2 * 3] + third == order
    tokens = {name: read_metrics(tmp_path / name / "metrics.csv")["tokens"][-1] for name in "abc"}
    assert tokens == {"a": 36 * LENGTH, "b": 54 * LENGTH, "c": 66 * LENGTH}
    assert {name: find(tmp_path / name / "checkpoints")[0].meta["tokens"] for name in "abc"} == tokens
    again = life(tmp_path / "d", 10, batch=12, accumulate=2, resume=step_folder(tmp_path / "c", 9))
    assert again == third[12:]
    assert read_metrics(tmp_path / "d" / "metrics.csv")["tokens"] == [54 * LENGTH, 66 * LENGTH]


def test_values_of_now_and_the_state_of_then(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    life(tmp_path / "a", 4)
    now = {"lr": 3e-3, "betas": [0.8, 0.9], "state_dtype": "bfloat16", "weight_decay": 0.0}
    with caplog.at_level(logging.INFO, "lightning_opt.training"):
        life(tmp_path / "b", 5, resume=step_folder(tmp_path / "a", 4), optimizer=now, other_optimizer=True)
    assert [r.message.strip() for r in caplog.records if r.name == "lightning_opt.training"] == [
        "the optimizer's state is kept, its values are those of now"
    ]
    before, after = (read(step_folder(tmp_path / run, step)) for run, step in (("a", 4), ("b", 5)))
    (before,), (after,) = before["optimizer_states"], after["optimizer_states"]
    for group in after["param_groups"]:
        assert (group["initial_lr"], tuple(group["betas"]), group["weight_decay"]) == (3e-3, (0.8, 0.9), 0.0)
    for index, state in after["state"].items():
        assert state["step"] == before["state"][index]["step"] + 1 == 5
        assert state["exp_avg"].dtype == torch.bfloat16
        kept = before["state"][index]["exp_avg_sq"] * 0.9  # what a step adds is not negative
        assert bool((state["exp_avg_sq"] >= kept * (1 - 1e-6)).all())


def test_a_state_of_other_roles_is_left_out_only_where_another_optimizer_may_be(tmp_path: Path) -> None:
    life(tmp_path / "a", 2)
    lion = {"optimizer": {"roles": {"default": {"rule": "adamw"}, "norm": {"rule": "lion"}}}}
    start = step_folder(tmp_path / "a", 2)
    with pytest.raises(ConfigError, match=r"param_groups\[\d\]\.rule = adamw"):
        life(tmp_path / "b", 3, resume=start, **lion)
    life(tmp_path / "c", 3, resume=start, other_optimizer=True, **lion)
    (after,) = read(step_folder(tmp_path / "c", 3))["optimizer_states"]
    assert {state["step"] for state in after["state"].values()} == {1}


class Weights(pl.Callback):
    """The weights that training starts from."""

    def on_train_start(self, _: Any, module: pl.LightningModule) -> None:
        self.found: dict[str, Tensor] = {name: value.clone() for name, value in module.state_dict().items()}


def test_without_averaging_it_goes_on_from_the_trained_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    life(tmp_path / "a", 4, callbacks=[EMA(0.9)])
    saved, start = read(step_folder(tmp_path / "a", 3)), Weights()
    with caplog.at_level(logging.INFO, "lightning_opt.training"):
        life(tmp_path / "b", 4, resume=step_folder(tmp_path / "a", 3), callbacks=[start])
    assert "goes on from the trained ones" in caplog.text
    assert all(torch.equal(start.found[name], value) for name, value in saved["current_model_state"].items())
    assert not all(torch.equal(start.found[name], value) for name, value in saved["state_dict"].items())
    after = read(step_folder(tmp_path / "b", 4))
    trained = read(step_folder(tmp_path / "a", 4))["current_model_state"]
    assert all(torch.equal(after["state_dict"][name], value) for name, value in trained.items())


def test_another_precision_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    life(tmp_path / "a", 2)
    life(tmp_path / "b", 3, resume=step_folder(tmp_path / "a", 2), precision="bf16-mixed")
    said = [record.message for record in caplog.records if "bits may differ" in record.message]
    assert [line.split(": ")[1] for line in said] == ["precision 32-true -> bf16-mixed"]
