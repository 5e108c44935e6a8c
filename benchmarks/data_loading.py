"""How many tokens a second reach the training loop? Ours beside the physical limit and other people's loaders.

    python -m benchmarks.data_loading            sequences of 256, 1024 and 4096; 3 minutes
    python -m benchmarks.data_loading --quick    does it run here?

The same random tokens lie on disk as shards of three corpora, mixed as the study's. Contenders:

- *ours, n workers*: shards, mixture and loader as a run uses them (`TokenDataModule.train_dataloader`)
- *memmap*: the limit: windows at random places of one memory map, copied as inputs and labels in one numpy call each
- *torch, n workers*: torch's DataLoader with its own shuffling over the same memory map, a window per item
- *datasets*: Hugging Face datasets with rows of one window each, ``shuffle`` and ``with_format("torch")``

All give batches of ``input_ids`` and ``labels``, int64. Each in turn gives a block of batches, in an order shuffled
every round; a block is long beside what workers read ahead meanwhile.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.record import Page, Table, keep, machine
from benchmarks.turns import spread
from lightning_opt import data, training
from lightning_opt.data.shards import TokenStream

SHARES = {"dclm": 0.9257, "starcoder": 0.0609, "proofpile": 0.0134}
VOCABULARY = 50257
GOAL = 2e6  # tokens/s
ENDLESS = 10**7  # batches

Batches = Iterator[dict[str, Tensor]]


def write_corpora(folder: Path, tokens: int) -> dict[str, TokenStream]:
    """Random uint16 tokens, by corpus."""
    draw, streams = np.random.default_rng(0), {}
    for name in SHARES:
        path = folder / f"{name}.bin"
        draw.integers(0, VOCABULARY, tokens, dtype=np.uint16).tofile(path)
        streams[name] = TokenStream([path], [tokens], "uint16")
    return streams


def ours(streams: dict[str, TokenStream], length: int, batch: int, workers: int) -> Batches:
    mixture = data.Mixture(streams, SHARES, sequence_length=length, seed=0)
    module = training.TokenDataModule(
        mixture, {}, micro_batch_size=batch, micro_batches=ENDLESS, val_sequences=0, num_workers=workers
    )
    return iter(module.train_dataloader())


def memmap(streams: dict[str, TokenStream], length: int, batch: int) -> Batches:
    tokens = np.memmap(streams["dclm"].parts[0], dtype=np.uint16, mode="r").view(np.ndarray)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)
    draw = np.random.default_rng(0)
    while True:
        block = windows[draw.integers(0, len(windows), batch)]
        sides = {"input_ids": block[:, :-1], "labels": block[:, 1:]}
        yield {name: torch.from_numpy(side.astype(np.int64)) for name, side in sides.items()}


class Windows(Dataset):
    """One window per item, as most projects write it."""

    def __init__(self, path: Path, length: int) -> None:
        self.tokens, self.length = np.memmap(path, dtype=np.uint16, mode="r"), length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = torch.from_numpy(self.tokens[index * self.length :][: self.length + 1].astype(np.int64))
        return {"input_ids": window[:-1], "labels": window[1:]}


def plain_torch(streams: dict[str, TokenStream], length: int, batch: int, workers: int) -> Batches:
    dataset = Windows(streams["dclm"].parts[0], length)
    loader = DataLoader(
        dataset, batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )
    while True:
        yield from loader


def hugging_face(streams: dict[str, TokenStream], length: int, batch: int) -> Batches:
    import datasets
    import pyarrow as pa

    tokens = streams["dclm"].read(0, len(streams["dclm"]))[: 2000 * length]
    rows = pa.FixedSizeListArray.from_arrays(pa.array(tokens), length)
    dataset = datasets.Dataset(pa.table({"input_ids": rows})).shuffle(seed=0).with_format("torch")
    while True:
        for rows in dataset.iter(batch, drop_last_batch=True):
            inputs = rows["input_ids"].long()
            yield {"input_ids": inputs[:, :-1].contiguous(), "labels": inputs[:, 1:].contiguous()}


def contenders(streams: dict[str, TokenStream], length: int, batch: int, quick: bool) -> dict[str, Batches]:
    made: dict[str, Callable[[], Batches]] = {"memmap": lambda: memmap(streams, length, batch)}
    for workers in (0, 1) if quick else (0, 1, 2):
        made[f"ours, {workers} workers"] = lambda w=workers: ours(streams, length, batch, w)
    for workers in (0,) if quick else (0, 2):
        made[f"torch, {workers} workers"] = lambda w=workers: plain_torch(streams, length, batch, w)
    made["datasets"] = lambda: hugging_face(streams, length, batch)
    found = {}
    for name, make in made.items():
        try:
            iterator = make()
            next(iterator)
        except ImportError:
            continue
        found[name] = iterator
    return found


def seconds(batches: Batches, count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        next(batches)
    return time.perf_counter() - began


def measure(streams: dict[str, TokenStream], length: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender at one sequence length."""
    found = contenders(streams, length, args.batch, args.quick)
    counts = {}
    for name, batches in found.items():  # so many batches that a block takes about as long as asked
        seconds(batches, 8)
        counts[name] = max(32, int(32 * args.block_s / seconds(batches, 32)))
    rates: dict[str, list[float]] = {name: [] for name in found}
    order, draw = list(found), random.Random(0)
    for _ in range(args.rounds):
        draw.shuffle(order)
        for name in order:
            tokens = counts[name] * args.batch * length
            rates[name].append(tokens / seconds(found[name], counts[name]))
    return [
        {
            "sequence": length,
            "loader": name,
            "M tokens/s": spread([rate / 1e6 for rate in rates[name]], 2),
            "of the limit": spread([r / m for r, m in zip(rates[name], rates["memmap"], strict=True)], 3),
            "times the goal": statistics.median(rates[name]) / GOAL if name.startswith("ours") else None,
        }
        for name in found
    ]


def main() -> None:
    """Measures, prints and keeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=None, help="tokens per sequence (256 1024 4096)")
    parser.add_argument("--batch", type=int, default=8, help="sequences per batch (8)")
    parser.add_argument("--rounds", type=int, default=None, help="blocks of each loader (9)")
    parser.add_argument("--block-s", type=float, default=None, help="seconds a block takes about (0.5)")
    parser.add_argument("--quick", action="store_true", help="one length, two short rounds")
    parser.add_argument("--out", type=Path, default=None, help="folder (benchmarks/results)")
    args = parser.parse_args()
    args.lengths = args.lengths or ([256] if args.quick else [256, 1024, 4096])
    args.rounds = args.rounds or (2 if args.quick else 9)
    args.block_s = args.block_s or (0.05 if args.quick else 0.5)
    where = machine()
    warnings.filterwarnings("ignore")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        streams = write_corpora(Path(folder), 2_000_000 if args.quick else 40_000_000)
        for length in args.lengths:
            rows += measure(streams, length, args)
            keep_rows(rows, args, where, more=length != args.lengths[-1])


def keep_rows(rows: list[dict[str, Any]], args: argparse.Namespace, where: dict[str, Any], more: bool) -> None:
    """Keeps the page of what was measured so far."""
    note = (
        f"Batches of {args.batch}, {args.rounds} rounds; median (10-90 %). Goal: 2 M tokens/s. "
        "The files are in the page cache."
    )
    about = "Every loader in turn, in shuffled order; *of the limit* is within a round. See the module's text."
    table = Table("Tokens per second", rows, note)
    page = Page("data_loading", "Data loading", about, [table])
    keep(page, where, args.out, suffix="-quick" if args.quick else "", more=more)


if __name__ == "__main__":
    main()
