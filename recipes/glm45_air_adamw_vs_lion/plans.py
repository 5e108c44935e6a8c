"""Which runs the page needs: sweeps of ``train.py`` over the article's rows, one folder for each part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

ROWS = {
    "glm45_air_adamw": "AdamW, common configuration",
    "glm45_air_lion": "Lion, common configuration",
    "glm45_air_lion_accumulated": "Lion, 5e-5, 4x accumulation",
    "glm45_air_adamw_stable": "AdamW, 1.5e-5, stable",
    "glm45_air_adamw_code": "AdamW, decay 0.015 for code",
    "glm45_air_staged": "Lion, AdamW, Lion",
}
"""``experiment=`` by row of the decision matrix, and its words."""
SCANNED = ("glm45_air_adamw", "glm45_air_lion")
RATES = (1e-5, 2.5e-5, 5e-5, 1e-4)
PARTS = {"rows": "every row, three seeds", "rates": "AdamW and Lion over rates, one seed"}
SEEDS = (1, 2, 3)
SIZES = {"nano": "moe_nano", "mini": "glm_mini", "air": "glm45_air", "120b": "glm45_air"}
"""``--model_size`` to ``model=``; no GLM of 120B exists: the article's word for Air's 106B with 12B active."""

LR_SCALE = {"nano": 40, "mini": 10, "air": 1}
"""The article's rates suit a model that has learned; from fresh weights, and smaller, all are multiplied alike."""
NANO_EPOCH = 32_768  # tokens; a pass over the embedded corpora would take 2 cores hours
_CPU = (
    "data=embedded",
    "trainer=cpu",
    "trainer.devices=1",
    "trainer.precision=32-true",
    "trainer.num_threads=1",
    "trainer.max_epochs=null",
    "trainer.micro_batch_size=4",
    "jobs_per_device=2",
    "evaluation=mini",
)
_GPU = ("trainer=gpu", "trainer.devices=1", "trainer.precision=bf16-mixed", "trainer.micro_batch_size=8")
_SMALL_BATCH = 4  # sequences of 256 tokens


def place_of(size: str) -> str:
    """The folder and the plan of a size: ``120b`` is ``air``."""
    return "air" if size == "120b" else size


def commands(
    size: str, epochs: int, folder: Path, parts: Sequence[str] = tuple(PARTS), extra: Sequence[str] = ()
) -> Iterator[list[str]]:
    """Overrides of each sweep.

    Args:
        size: of `SIZES`, or ``quick``: two rows of a few steps.
        epochs: passes over the texts; at nano, multiples of `NANO_EPOCH` tokens.
        folder: of the page; every part has its own inside.
        parts: of `PARTS`.
        extra: overrides that come last and win.
    """
    place = place_of(size)
    seeds = (1, 2) if place == "quick" else SEEDS
    if "rows" in parts:
        rows = tuple(ROWS)[:2] if place == "quick" else tuple(ROWS)
        wide = [row for row in rows if row.endswith("accumulated")]
        for group, factor in (([row for row in rows if row not in wide], 1), (wide, 4)):
            if group:
                words = [f"experiment={','.join(group)}", f"seed={','.join(map(str, seeds))}"]
                yield [*words, *_common(place, epochs, factor), *extra, f"hydra.sweep.dir={folder / 'rows'}"]
    if "rates" in parts:
        rates = [rate for rate in RATES if rate != 2.5e-5]  # the rows have that one
        words = [f"experiment={','.join(SCANNED)}", f"optimizer.lr={','.join(f'{rate:g}' for rate in rates)}", "seed=1"]
        if place == "quick":
            words[1] = "optimizer.lr=1e-4"
        yield [*words, *_common(place, epochs, 1), *extra, f"hydra.sweep.dir={folder / 'rates'}"]


def _common(place: str, epochs: int, factor: int) -> list[str]:
    if place in ("nano", "quick"):
        tokens = 4 * 1024 if place == "quick" else NANO_EPOCH * epochs
        words = [f"model={SIZES['nano']}", *_CPU, f"trainer.max_tokens={tokens}"]
        words += [f"trainer.global_batch_size={_SMALL_BATCH * factor}", f"optimizer.lr_scale={LR_SCALE['nano']}"]
        words += ["optimizer.implementation=auto", f"trainer.val_sequences={4 if place == 'quick' else 80}"]
        return [*words, "evaluation.limit=4"] if place == "quick" else words
    words = [f"model={SIZES[place]}", "data=files", "evaluation=full", f"trainer.max_epochs={epochs}"]
    return [*words, f"optimizer.lr_scale={LR_SCALE[place]}", *(_GPU if place == "mini" else ())]
