"""One trial: a network trained on scikit-learn's digits by Lightning's Trainer, with one of our optimizers alone."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_opt import optim
from lightning_opt.run_folder import read_json_lines
from recipes.lion_vision.models import MODELS

# Rate around which five are tried. Decay: lr * weight_decay is the same for all; Lion's rate a third (arXiv 2302.06675,
# section 5: 3 to 10 times smaller)
RATES = {"lion": 1e-3, "adamw": 3e-3, "radam": 3e-3, "nadam": 3e-3, "adabelief": 3e-3, "amsgrad": 3e-3}
DECAY_PER_STEP = 3e-4
MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)
TUNING_SEED, FRESH_SEEDS = 0, (1, 2, 3)
BATCH = 64


@dataclass(frozen=True)
class Trial:
    """What is trained and how.

    Attributes:
        model: of `MODELS`.
        optimizer: of `RATES`.
        multiple: of its rate.
        seed: of weights and batches; the split is always the same.
        epochs: passes over the training images.
    """

    model: str
    optimizer: str
    multiple: float
    seed: int
    epochs: int

    @property
    def rate(self) -> float:
        """Peak rate."""
        return self.multiple * RATES[self.optimizer]


@dataclass
class Result:
    """What became of a trial: losses in nats per image, accuracies as shares."""

    val_loss: float
    val_accuracy: float
    test_loss: float
    test_accuracy: float
    losses: list[float] = field(default_factory=list)  # of each training batch


@cache
def digits() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Training, validation and test images: 1077, 360 and 360 of scikit-learn's 1797, of mean 0 and variance 1."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1)
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = order.split([1077, 360, 360])
    train, val, test = (TensorDataset(images[part], labels[part]) for part in parts)
    return train, val, test


class Classifier(pl.LightningModule):
    """A network with one of our optimizers; the rate falls to zero along a cosine."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.trial, self.net = trial, MODELS[trial.model]()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Mean loss in nats per image."""
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer as any torch optimizer; vectors are not decayed."""
        rate = self.trial.rate
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim <= 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        made = getattr(optim, optim.OPTIMIZERS[self.trial.optimizer])
        optimizer = made(groups, lr=rate, weight_decay=DECAY_PER_STEP / RATES[self.trial.optimizer])
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Losses(Callback):
    """Keeps the loss of every training batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """Lightning hands over what `training_step` returned."""
        self.values.append(float(outputs["loss"]))


def train(trial: Trial) -> Result:
    """Runs a trial on the CPU; seconds."""
    pl.seed_everything(trial.seed, verbose=False)
    data, val, test = digits()
    module, kept = Classifier(trial), Losses()
    order = torch.Generator().manual_seed(trial.seed)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with warnings.catch_warnings(), _silence():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=trial.epochs, accelerator="cpu", callbacks=[kept], enable_model_summary=False, **quiet
        )
        trainer.fit(module, DataLoader(data, BATCH, shuffle=True, drop_last=True, generator=order))
    return Result(*_scores(module, val), *_scores(module, test), kept.values)


class _silence:  # noqa: N801
    """Lightning's notes about devices, which would come once per trial."""

    def __enter__(self) -> None:
        self.log = logging.getLogger("lightning.pytorch")
        self.before = self.log.level
        self.log.setLevel(logging.ERROR)

    def __exit__(self, *_: Any) -> None:
        self.log.setLevel(self.before)


@torch.no_grad()
def _scores(module: Classifier, data: TensorDataset) -> tuple[float, float]:
    """Loss and accuracy."""
    images, labels = data.tensors
    logits = module.eval().net(images)
    return float(cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


class Ledger:
    """Results by trial, one JSON line each, so that the same command runs what is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results = dict(self._read()) if path.exists() else {}

    def _read(self) -> Iterator[tuple[Trial, Result]]:
        for entry in read_json_lines(self.path):
            yield Trial(**entry["trial"]), Result(**entry["result"])

    def result(self, trial: Trial) -> Result:
        """The trial's result, trained where it is not known."""
        if trial not in self.results:
            self.results[trial] = train(trial)
            entry = {"trial": asdict(trial), "result": asdict(self.results[trial])}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        return self.results[trial]


@dataclass(frozen=True)
class Standing:
    """What one optimizer did on one model: its best rate by validation loss, and fresh runs at it."""

    optimizer: str
    rate: float
    at_edge: bool
    fresh: list[Result]


def standings(ledger: Ledger, model: str, epochs: int, multiples: tuple[float, ...], seeds: tuple[int, ...]) -> list:
    """Every optimizer tuned on one seed by validation loss and run on fresh ones; lowest mean test loss first."""
    found = []
    for name in RATES:
        tried = {m: ledger.result(Trial(model, name, m, TUNING_SEED, epochs)).val_loss for m in multiples}
        best = min(tried, key=lambda m: tried[m] if tried[m] == tried[m] else float("inf"))
        fresh = [ledger.result(Trial(model, name, best, seed, epochs)) for seed in seeds]
        at_edge = best in (min(multiples), max(multiples))
        found.append(Standing(name, best * RATES[name], at_edge, fresh))
        print(f"{model} {name}: rate {best * RATES[name]:.2g}, accuracy {_mean(fresh):.3f}", flush=True)
    return sorted(found, key=lambda one: sum(result.test_loss for result in one.fresh))


def _mean(results: list[Result]) -> float:
    return sum(result.test_accuracy for result in results) / len(results)
