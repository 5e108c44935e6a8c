"""The vision recipe: its trials train, its ledger forgets nothing, its page says what is noise."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_opt import optim
from recipes.lion_vision import page, trials
from recipes.lion_vision.__main__ import main
from recipes.lion_vision.models import MODELS
from recipes.lion_vision.trials import Ledger, Result, Standing, Trial


def test_the_split_holds_every_digit_once():
    parts = trials.digits()
    assert [len(part) for part in parts] == [1077, 360, 360]
    images = torch.cat([part.tensors[0] for part in parts]).flatten(1)
    assert len(images.unique(dim=0)) == 1797
    assert images.mean() == pytest.approx(0, abs=1e-5)
    assert images.std() == pytest.approx(1, abs=1e-5)
    assert all(len(part.tensors[1].unique()) == 10 for part in parts)


@pytest.mark.parametrize("model", MODELS)
def test_a_trial_learns_with_our_optimizer_in_lightnings_trainer(model):
    one = trials.train(Trial(model, "lion", 2.0, seed=1, epochs=4))
    assert one.losses[0] > 1.8
    assert sum(one.losses[-5:]) / 5 < 0.85 * one.losses[0]
    assert len(one.losses) == 4 * (1077 // trials.BATCH)
    assert one.test_accuracy > 0.2


def test_lr_times_decay_is_the_same_for_all():
    assert set(trials.RATES) == {"lion", "adamw", "radam", "nadam", "adabelief", "amsgrad"} <= set(optim.OPTIMIZERS)
    for name in trials.RATES:
        module = trials.Classifier(Trial("vit", name, 1.0, 0, 1))
        module._trainer = type("Trainer", (), {"estimated_stepping_batches": 10})()
        optimizer = module.configure_optimizers()["optimizer"]
        decayed, spared = optimizer.param_groups
        assert decayed["lr"] * decayed["weight_decay"] == pytest.approx(trials.DECAY_PER_STEP)
        assert spared["weight_decay"] == 0
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(module.parameters()))


@pytest.fixture
def trained(monkeypatch):
    """Trials without training: the best rate is the fastest for lion, the middle for the others."""
    asked = []

    def train(trial):
        asked.append(trial)
        best = 4.0 if trial.optimizer == "lion" else 1.0
        loss = 0.1 + math.log2(trial.multiple / best) ** 2 + 0.001 * trial.seed
        return Result(loss, 0.9, loss, 0.9, [2.0, 1.0])

    monkeypatch.setattr(trials, "train", train)
    return asked


def test_rates_are_chosen_on_one_seed_and_nothing_is_trained_twice(trained, tmp_path):
    for _ in range(2):
        found = trials.standings(Ledger(tmp_path / "results.jsonl"), "vit", 1, trials.MULTIPLES, (1, 2, 3))
    assert len(trained) == len(set(trained)) == 6 * (5 + 3)
    by_name = {one.optimizer: one for one in found}
    assert by_name["lion"].rate == 4 * trials.RATES["lion"]
    assert by_name["lion"].at_edge
    assert not by_name["adamw"].at_edge
    assert [result.test_loss for result in by_name["adamw"].fresh] == pytest.approx([0.101, 0.102, 0.103])


def standing(name, *losses):
    return Standing(name, 0.1, False, [Result(loss, 0.9, loss, 0.9) for loss in losses])


def test_the_verdict_knows_noise():
    apart = page._verdict("vit", [standing("lion", 0.10, 0.11, 0.12), standing("adamw", 0.30, 0.31, 0.32)])
    assert apart.endswith(
        "Lion has the lowest test loss, 0.110 nats; beyond the noise between seeds below the rest (n = 3)."
    )
    level = page._verdict("vit", [standing("lion", 0.10, 0.20, 0.30), standing("adamw", 0.25, 0.15, 0.35)])
    assert "not told apart from it: AdamW" in level


def test_the_page_is_written(trained, tmp_path, capsys):
    assert main(["--quick", "--models", "vit", "--folder", str(tmp_path)]) == 0
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "AMSGrad" in text
    assert "<svg" in text
    assert str(tmp_path) not in text
