"""The page: who classified best, with spread, and how the training loss fell."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean, stdev, variance

import numpy as np

from lightning_opt.optim import OPTIMIZERS
from lightning_opt.reports import landscapes
from lightning_opt.reports.page import Section, render
from lightning_opt.reports.ranking import t_limit
from lightning_opt.reports.style import optimizer_colours
from lightning_opt.reports.tables import Table
from recipes.lion_vision.trials import Result, Standing

_NAMES = {"vit": "A small ViT", "resnet": "A small ResNet"}
_SMOOTHED = 17  # steps: an epoch


def write(folder: Path, found: dict[str, list[Standing]], command: str) -> Path:
    """Writes ``index.html``.

    Args:
        folder: where; it exists.
        found: by model, its optimizers, best first.
        command: that makes it again.

    Returns:
        the page's path.
    """
    content = {
        "title": "Lion on digits",
        "state": f"{len(found)} models",
        "tone": "muted",
        "subtitle": "Lightning's Trainer with our optimizers alone",
        "source": "1797 digits that scikit-learn carries, 1077 of them for training,",
        "reading": "How to read this",
        "alarm_tone": "warn",
        "alarm": "",
        "verdict": tuple(_verdict(model, standings) for model, standings in found.items()),
        "cards": (),
        "notes": _NOTES,
        "sections": [_section(model, standings) for model, standings in found.items()],
        "commands": (("All of this again:", command),),
        "missing": (),
    }
    page = folder / "index.html"
    page.write_text(render("report.html.j2", content), encoding="utf-8")
    return page


_NOTES = (
    "Each optimizer at its own best of five rates, chosen on the validation images with one seed; the table shows the "
    "test images with fresh seeds. 360 test images: one of them is 0.28 points of accuracy.",
    "Batches of 64: the Lion paper expects its gains in large batches and large ViTs, and ties on ResNets "
    "(arXiv 2302.06675, sections 4.1 and 6).",
)


def _spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _accuracies(standing: Standing) -> list[float]:
    return [100 * result.test_accuracy for result in standing.fresh]


def _losses(standing: Standing) -> list[float]:
    return [result.test_loss for result in standing.fresh]


def _verdict(model: str, ranked: list[Standing]) -> str:
    """Student's t, two-sided, 5 %, with the spread between seeds of all optimizers together."""
    first, *others = ranked
    n = len(first.fresh)
    words = f"{_NAMES[model]}: {OPTIMIZERS[first.optimizer]} has the lowest test loss, {fmean(_losses(first)):.3f} nats"
    if n < 2:
        return f"{words} (n = 1: what is noise is not known)."
    between_seeds = fmean(variance(_losses(one)) for one in ranked)
    limit = t_limit(len(ranked) * (n - 1)) * math.sqrt(between_seeds * 2 / n)
    level = [OPTIMIZERS[one.optimizer] for one in others if fmean(_losses(one)) - fmean(_losses(first)) <= limit]
    apart = f"not told apart from it: {', '.join(level)}" if level else "beyond the noise between seeds below the rest"
    return f"{words}; {apart} (n = {n})."


def _section(model: str, ranked: list[Standing]) -> Section:
    rows = tuple(
        (
            OPTIMIZERS[one.optimizer],
            f"{fmean(_losses(one)):.4f} ± {_spread(_losses(one)):.4f}",
            f"{fmean(_accuracies(one)):.2f} ± {_spread(_accuracies(one)):.2f}",
            str(len(one.fresh)),
            f"{one.rate:.2g}" + (" (edge)" if one.at_edge else ""),
        )
        for one in ranked
    )
    header = ("optimizer", "test loss, nats", "test accuracy, %", "n", "rate")
    table = Table(f"{model}-table", "", header, rows, numeric=frozenset({1, 2, 3, 4}), best=frozenset({0}))
    curves = {OPTIMIZERS[one.optimizer]: (one.rate, _curve(one.fresh)) for one in ranked}
    caption = f"Mean over seeds, averaged over {_SMOOTHED} steps."
    figure = landscapes.scores(
        f"{model}-loss", "Training loss by step", caption, "training loss, nats", curves, optimizer_colours(curves)
    )
    return Section(model, _NAMES[model], "", (figure,), (table,))


def _curve(results: list[Result]) -> np.ndarray:
    losses = np.mean([result.losses for result in results], axis=0)
    window = min(_SMOOTHED, len(losses))
    return np.convolve(losses, np.ones(window) / window, mode="valid")
