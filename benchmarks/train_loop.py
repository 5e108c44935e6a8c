"""What does our training loop cost beside a bare PyTorch loop, and beside transformers' Trainer?

    python -m benchmarks.train_loop                  nano and wide on a CPU (10 minutes), llama_130m on a GPU
    python -m benchmarks.train_loop --models nano --rounds 40
    python -m benchmarks.train_loop --quick          does it run here?

- *ours*: `training.fit` as a run does it: our module and data module, Lightning, RunLogger, and the default callbacks
  but for checkpoints and the loss guard, which `benchmarks.protections` measures.
- *bare*: zero_grad, forward, backward, step, schedule; the same model, loss, batches and optimizer; nothing else.
- *Trainer*: transformers' own loop on the same model and batches with its own loss and its default fused AdamW;
  clipping, a linear schedule and a log entry every 10 steps as in ours; no saving, evaluation, bar or reporting, and
  without its check of every loss for NaN. It compiles whole models only, which takes minutes: not here.

Each stands still while the others do a block of steps, in an order shuffled every round. Ratios are of tokens/s, within
a round: medians and deciles. By CPU time they are steady on a busy machine; by the clock they are what a user sees.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while waiting would disturb the next contender
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import copy
import io
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import transformers
from torch import Tensor, nn

from benchmarks import presets
from benchmarks.record import Page, Table, keep, machine
from benchmarks.turns import Body, Spent, Turns, alternate, spread
from lightning_opt import data, models, optim, training
from lightning_opt.callbacks import Memory, Progress, Stability, Throughput
from lightning_opt.optim import schedules
from lightning_opt.plan import RunPlan
from lightning_opt.run_folder import RunFolder, Status

BATCHES = {"femto": (2, 64), "nano": (3, 256), "wide": (4, 256), "llama_130m": (4, 4096)}  # sequences, tokens
ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "betas": [0.9, 0.95], "max_grad_norm": 1.0}
LINEAR = {"name": "linear", "warmup": 10, "min_ratio": 0.0}


@dataclass(frozen=True)
class Setting:
    """What all contenders share."""

    model: nn.Module
    sequences: data.Mixture
    batch: int
    length: int
    steps: int
    cuda: bool
    compile: str
    folder: Path

    @property
    def device(self) -> str:
        """As torch calls it."""
        return "cuda" if self.cuda else "cpu"

    def optimizer(self, model: nn.Module) -> optim.Optimizer:
        """The one that *ours* and *bare* use."""
        return optim.build(model, {**ADAMW, "roles": {"default": {"rule": "adamw"}}})

    def loader(self) -> data.BatchLoader:
        """The batches of *ours*, for *bare*."""
        return data.loader(self.sequences, batch_size=self.batch, count=self.steps * self.batch, pin_memory=self.cuda)


class Handover(pl.Callback):
    """Tells when a step is over: the next one's batch is there.

    Args:
        between: called then.
        after: steps of which it does not tell.
    """

    def __init__(self, between: Callable[[], None], after: int = 0) -> None:
        self._between, self._after = between, after

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The step before is over."""
        if batch_idx > self._after:
            self._between()


def ours(setting: Setting, guards: Sequence[pl.Callback] = (), after: int = 0) -> Body:
    """Our loop.

    Args:
        setting: what to train.
        guards: further callbacks, called before the others.
        after: steps before the first turn, see `Handover`.
    """
    plan = RunPlan(
        max_steps=setting.steps,
        tokens=setting.steps * setting.batch * setting.length,
        tokens_per_step=setting.batch * setting.length,
        global_batch_size=setting.batch,
        micro_batch_size=setting.batch,
        accumulate=1,
        devices=1,
        sequence_length=setting.length,
        warmup_steps=LINEAR["warmup"],
        val_every_n_steps=setting.steps,
    )
    config = {
        "accelerator": setting.device.replace("cuda", "gpu"),
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "log_every_n_steps": 10,
        "deterministic": False,  # torch's switch is global: it would slow the others too
        "val_sequences": 0,
        "compile": setting.compile,
    }
    model = copy.deepcopy(setting.model)
    optimizer = setting.optimizer(model)
    module = training.PretrainModule(
        model,
        optimizer,
        schedules.build(LINEAR, setting.steps),
        corpora={"a": 1.0},
        token_bytes=np.ones(model.config.vocab_size, dtype=np.int32),
    )
    batches = training.TokenDataModule(
        setting.sequences, {}, micro_batch_size=setting.batch, micro_batches=setting.steps, val_sequences=0
    )

    def body(between: Callable[[], None]) -> None:
        watchers = [Memory(), Stability(), Throughput(flops_per_token=1.0), Progress(stream=io.StringIO())]
        with Status(setting.folder / "status.json", "0" * 8) as status:
            training.fit(
                module,
                batches,
                plan,
                config=config,
                precision="bf16-mixed" if setting.cuda else "32-true",
                folder=RunFolder(setting.folder),
                columns=[f"{kind}/{group['role']}" for kind in ("lr", "grad_norm") for group in optimizer.param_groups],
                callbacks=[*guards, *watchers, Handover(between, after)],
                loggers=[],
                status=status,
            )

    return body


def bare(setting: Setting) -> Body:
    def body(between: Callable[[], None]) -> None:
        model = copy.deepcopy(setting.model).to(setting.device).train()
        optimizer = setting.optimizer(model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules.build(LINEAR, setting.steps))
        with models.compiled(model, setting.compile):
            for number, batch in enumerate(setting.loader()):
                if number:
                    between()
                inputs, labels = (batch[key].to(setting.device, non_blocking=True) for key in ("input_ids", "labels"))
                optimizer.zero_grad()
                with torch.autocast("cuda", torch.bfloat16, enabled=setting.cuda):
                    loss = models.causal_lm_loss(model, inputs, labels).total
                loss.backward()
                optimizer.step()  # clips as its groups say
                schedule.step()

    return body


def trainer(setting: Setting) -> Body:
    class Between(transformers.TrainerCallback):
        def __init__(self, between: Callable[[], None]) -> None:
            self._between = between

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step:
                self._between()

    def collate(windows: np.ndarray) -> dict[str, Tensor]:
        inputs = torch.from_numpy(windows[:, :-1].astype(np.int64))
        return {"input_ids": inputs, "labels": inputs}  # it shifts labels itself

    def body(between: Callable[[], None]) -> None:
        arguments = transformers.TrainingArguments(
            output_dir=str(setting.folder / "trainer"),
            per_device_train_batch_size=setting.batch,
            max_steps=setting.steps,
            learning_rate=ADAMW["lr"],
            weight_decay=ADAMW["weight_decay"],
            max_grad_norm=ADAMW["max_grad_norm"],
            lr_scheduler_type="linear",
            warmup_steps=LINEAR["warmup"],
            logging_steps=10,
            logging_nan_inf_filter=False,
            save_strategy="no",
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            use_cpu=not setting.cuda,
            bf16=setting.cuda,
        )
        made = transformers.Trainer(
            copy.deepcopy(setting.model),
            arguments,
            train_dataset=setting.sequences,
            data_collator=collate,
            callbacks=[Between(between)],
        )
        made.remove_callback(transformers.trainer_callback.PrinterCallback)
        made.train()

    return body


CONTENDERS: dict[str, Callable[[Setting], Body]] = {"ours": ours, "bare": bare, "Trainer": trainer}


def sequences(folder: Path, vocabulary: int, length: int) -> data.Mixture:
    """Random tokens on disk, read as in a run."""
    from lightning_opt.data.shards import TokenStream, token_dtype

    size, dtype = 4096 * length if length < 1024 else 512 * length, token_dtype(vocabulary)
    np.random.default_rng(0).integers(0, vocabulary, size, dtype=dtype).tofile(folder / "tokens.bin")
    stream = TokenStream([folder / "tokens.bin"], [size], dtype.name)
    return data.Mixture({"a": stream}, {"a": 1.0}, sequence_length=length, seed=0)


def setting_of(name: str, args: argparse.Namespace, folder: Path, more_steps: int = 0) -> Setting:
    """A model with fresh weights and random tokens for it, for as many steps as all rounds take, and some more."""
    batch, length = args.batch or BATCHES[name][0], args.length or BATCHES[name][1]
    torch.manual_seed(0)
    config = presets.preset(name)
    model = presets.build(config, args.device)
    return Setting(
        model=model,
        sequences=sequences(folder, config["vocab_size"], length),
        batch=batch,
        length=length,
        steps=(args.rounds + args.warm) * args.block + 1 + more_steps,
        cuda=args.device == "cuda",
        compile=args.compile,
        folder=folder,
    )


def measure(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One model; a row of the table."""
    setting = setting_of(name, args, folder)
    loops = {contender: Turns(CONTENDERS[contender](setting), args.block) for contender in args.contenders}
    spent = alternate(loops, args.rounds, warm=args.warm)
    return row(name, setting, spent, args.block)


def row(name: str, setting: Setting, spent: dict[str, list[Spent]], block: int) -> dict[str, Any]:
    """Each contender's speed, and that of *ours* over each other's."""
    tokens = setting.batch * setting.length * block
    shown: dict[str, Any] = {"model": name, "tokens per step": setting.batch * setting.length}
    for contender, blocks in spent.items():
        wall = statistics.median(each.wall for each in blocks)
        shown[f"{contender} tokens/s"] = round(tokens / wall)
        shown[f"{contender} step ms"] = round(wall / block * 1e3, 2)
    for other in (name for name in spent if name != "ours" and "ours" in spent):
        pairs = list(zip(spent["ours"], spent[other], strict=True))
        for clock in Spent._fields if not setting.cuda else ("wall",):
            ratios = [getattr(theirs, clock) / getattr(mine, clock) for mine, theirs in pairs]
            shown[f"ours / {other}, {clock}"] = spread(ratios)
    return shown | {"rounds": len(next(iter(spent.values())))}


def arguments(about: str | None, block: int, contenders: Sequence[str] = ()) -> argparse.Namespace:
    """The command line.

    Args:
        about: for ``--help``.
        block: steps of a block, where nothing else is said.
        contenders: to choose from.
    """
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(BATCHES), default=None)
    if contenders:
        parser.add_argument("--contenders", nargs="+", choices=list(contenders), default=list(contenders))
    parser.add_argument("--rounds", type=int, default=20, help="blocks of each contender that count (20)")
    parser.add_argument("--warm", type=int, default=2, help="blocks before that do not (2)")
    parser.add_argument("--block", type=int, default=block, help=f"steps of a block; one in 10 logs ({block})")
    parser.add_argument("--batch", type=int, default=None, help="sequences per step (by model)")
    parser.add_argument("--length", type=int, default=None, help="tokens per sequence (by model)")
    parser.add_argument("--compile", choices=["off", "layers", "model"], default="layers" if cuda else "off")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--quick", action="store_true", help="a few steps of a small model")
    parser.add_argument("--out", type=Path, default=None, help="folder (benchmarks/results)")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.warm, args.block = 2, 1, 5
    default = ["femto"] if args.quick else ["llama_130m"] if args.device == "cuda" else ["nano", "wide"]
    args.models = args.models or default
    return args


def hush() -> None:
    """Keeps what libraries have to say off the page."""
    warnings.filterwarnings("ignore")
    for noisy in ("lightning.pytorch", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def main() -> None:
    """Measures, prints and keeps."""
    args = arguments(__doc__, 10, list(CONTENDERS))
    where = machine()
    hush()
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, args, Path(folder)))
        keep_rows(rows, args, where, more=name != args.models[-1])


def keep_rows(rows: list[dict[str, Any]], args: argparse.Namespace, where: dict[str, Any], more: bool) -> None:
    """Keeps the page of what was measured so far."""
    note = (
        f"{args.rounds} rounds of {args.block} steps; {'bf16-mixed' if args.device == 'cuda' else 'float32'}, "
        f"compile {args.compile} (Trainer: off; compiled it is in benchmarks.mfu); "
        "our AdamW in ours and bare, torch's fused AdamW in Trainer "
        f"{transformers.__version__}. "
        "Ratios above 1: ours is faster. Goals: >= 0.97 of bare, > 1 against Trainer."
    )
    about = "Contenders alternate block by block; ratios are per round, median (10-90 %); see the module's text."
    table = Table("Tokens per second", rows, note)
    page = Page("train_loop", "Training loop", about, [table])
    keep(page, where, args.out, suffix="-quick" if args.quick else "", more=more)


if __name__ == "__main__":
    main()
