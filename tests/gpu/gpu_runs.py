"""A small fit on the GPU, through the project's own path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_opt import models, optim, training
from lightning_opt.optim import schedules
from lightning_opt.plan import RunPlan
from lightning_opt.run_folder import RunFolder, Status, read_metrics

VOCABULARY, LENGTH, BATCH = 512, 128, 8


class Sequences:
    """Tokens that count upwards, so that a model can learn them."""

    def __len__(self) -> int:
        return 1024

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(LENGTH + 1) + 7 * index) % VOCABULARY
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}


def small_model(**more: Any) -> torch.nn.Module:
    """Two million parameters; head size 64, as the study's models have."""
    shape = {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "intermediate_size": 512, "context_length": LENGTH}
    return models.llama(**shape, vocab_size=VOCABULARY, **more)


def fit(
    folder: Path,
    *,
    steps: int = 12,
    accumulate: int = 1,
    optimizer: str = "adamw",
    precision: str = "bf16-mixed",
    callbacks: Any = (),
    val_sequences: int = 8,
    model: torch.nn.Module | None = None,
    **trainer: Any,
) -> tuple[training.PretrainModule, dict[str, list[float | None]]]:
    """Trains the small model; returns the module and the columns of metrics.csv."""
    training.prepare(0, None)
    plan = RunPlan(
        max_steps=steps,
        tokens=steps * BATCH * LENGTH,
        tokens_per_step=BATCH * LENGTH,
        global_batch_size=BATCH,
        micro_batch_size=BATCH // accumulate,
        accumulate=accumulate,
        devices=1,
        sequence_length=LENGTH,
        warmup_steps=1,
        val_every_n_steps=steps,
    )
    config = {
        "accelerator": "gpu",
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "log_every_n_steps": 1,
        "deterministic": False,
        "val_sequences": val_sequences,
        "compile": "off",
    }
    made = model or small_model()
    settings = {"name": optimizer, "lr": 3e-3 if optimizer == "adamw" else 3e-4, "max_grad_norm": 1.0}
    module = training.PretrainModule(
        made,
        optim.build(made, settings),
        schedules.build({"name": "linear", "warmup": 1, "min_ratio": 0.1}, steps),
        corpora={"a": 1.0} if val_sequences else {},
        token_bytes=[2] * VOCABULARY,
    )
    data = training.TokenDataModule(
        Sequences(),
        {"a": Sequences()} if val_sequences else {},
        micro_batch_size=plan.micro_batch_size,
        micro_batches=steps * accumulate,
        val_sequences=val_sequences,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with Status(folder / "status.json", "0" * 8) as status:
        training.fit(
            module,
            data,
            plan,
            config=config | trainer,
            precision=precision,
            folder=RunFolder(folder),
            columns=["val/loss/a"],
            callbacks=list(callbacks),
            loggers=[],
            status=status,
        )
    return module, read_metrics(folder / "metrics.csv")
