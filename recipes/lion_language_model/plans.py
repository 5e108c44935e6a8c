"""Which runs the page needs: sweeps of ``train.py``, one folder for each part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

# Section 4.4 of arXiv 2302.06675: betas of its language models, and AdamW's eps
BETA1 = {"lion": 0.95, "adamw": 0.9}
CONTESTANTS = {
    "lion": ("optimizer.betas=[0.95,0.98]",),
    "adamw": ("optimizer.betas=[0.9,0.99]", "optimizer.eps=1e-6"),
    "adafactor": ("optimizer.beta1=0.9",),
}
RATES = "optimizer.lr_scale=0.5,1,2"
PARTS = {
    "optimizers": "each at the best of three rates, two seeds",
    "batch_size": "equal tokens in batches of different size, the best of three rates at each",
    "beta2": "how long the past is remembered",
}
BETAS2 = {"lion": (0.9, 0.95, 0.98, 0.99, 0.995), "adamw": (0.9, 0.95, 0.98, 0.99, 0.999)}

_HERE = ("trainer.accelerator=cpu", "trainer.num_threads=1", "jobs_per_device=2", "evaluation=none")
PLACES = {
    "nano": ("model=nano", "trainer.max_tokens=819200", "trainer.val_every_n_steps=100000", *_HERE),
    "wiki40b": ("experiment=lion_wiki40b",),
    "pg19": ("experiment=lion_pg19",),
}
"""Overrides by place: nano on a CPU, GPT-2 124M on a GPU."""
_QUICK = ("model=femto", "trainer.max_tokens=8192", "trainer.val_sequences=4", *_HERE)
BATCHES = {"nano": (2, 8, 32), "wiki40b": (128, 512, 2048), "pg19": (64, 256, 1024), "quick": (2, 4)}


def commands(place: str, parts: Sequence[str], folder: Path) -> Iterator[list[str]]:
    """Overrides of each sweep, in the order of `PARTS`.

    Args:
        place: of `PLACES`, or ``quick``.
        parts: names of `PARTS`.
        folder: of the page; every part has its own inside.
    """
    common = _QUICK if place == "quick" else PLACES[place]
    for part in PARTS:
        if part in parts:
            where = f"hydra.sweep.dir={folder / part}"
            for words in _of_part(part, BATCHES[place], quick=place == "quick"):
                yield [*words, *common, where]


def _of_part(part: str, batches: Sequence[int], *, quick: bool) -> Iterator[list[str]]:
    rates = "optimizer.lr_scale=1,2" if quick else RATES
    if part == "optimizers":
        for name, settings in CONTESTANTS.items():
            yield [f"optimizer={name}", *settings, rates, f"seed={'1' if quick else '1,2'}"]
    elif part == "batch_size":
        sizes = f"trainer.global_batch_size={','.join(map(str, batches))}"
        for name in ("lion", "adamw"):
            yield [f"optimizer={name}", *CONTESTANTS[name], sizes, "optimizer.lr_scale=1" if quick else rates]
    else:
        for name, values in BETAS2.items():
            pairs = ",".join(f"[{BETA1[name]},{value}]" for value in values[: 2 if quick else None])
            yield [f"optimizer={name}", *CONTESTANTS[name][1:], f"optimizer.betas={pairs}"]
