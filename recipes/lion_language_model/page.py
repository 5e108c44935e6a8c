"""The page: perplexities, and the final loss by rate, batch size and beta2."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lightning_opt.reports import sweep_figures
from lightning_opt.reports.jobs import Job, of_sweep
from lightning_opt.reports.page import Section, render
from lightning_opt.reports.ranking import Cell, gap, pooled
from lightning_opt.reports.style import optimizer_colours
from lightning_opt.reports.sweep_figures import Response
from lightning_opt.reports.tables import Table
from lightning_opt.reports.verdicts import loss_of
from recipes.lion_language_model.plans import PARTS

Value = Callable[[Job], float]


def write(folder: Path, place: str) -> Path:
    """Writes ``index.html`` from the sweeps in the folder, whatever is there.

    Returns:
        the page's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cells = {part: _cells(folder / part) for part in PARTS}
    words = _verdict(cells["optimizers"])
    command = f"python -m recipes.lion_language_model --on {place}".replace("--on quick", "--quick")
    content = {
        "title": "Lion as a language model's optimizer",
        "state": f"{sum(cell.n for found in cells.values() for cell in found)} settings with a result",
        "tone": "muted",
        "subtitle": f"against AdamW and Adafactor, on {place}",
        "source": "runs of train.py in this folder",
        "reading": "How to read these figures",
        "alarm_tone": "warn",
        "alarm": "",
        "verdict": (words,),
        "cards": (),
        "notes": _NOTES,
        "sections": [section for part in PARTS if (section := _SECTIONS[part](cells[part]))],
        "commands": (("All of this again, or what is missing:", command),),
        "missing": tuple(f"{part}: no run has come to its end" for part in PARTS if not cells[part]),
    }
    page = folder / "index.html"
    page.write_text(render("report.html.j2", content), encoding="utf-8")
    return page


_NOTES = (
    "Equal data, tokens and schedule for all; a point is the mean over seeds where there are several.",
    "The Lion paper names its limits: no gain in batches of fewer than 64 sequences, and none in perplexity for its "
    "large models against Adafactor (arXiv 2302.06675, sections 4.4 and 6).",
    "Reading the batch-size curve: with equal tokens a larger batch means fewer steps, so every loss rises with it; "
    "what counts is whether Lion's rises less.",
)


def _cells(folder: Path) -> list[Cell]:
    """Settings with a result, seeds together."""
    by_identity: dict[str, list[Job]] = defaultdict(list)
    for job in of_sweep(folder).jobs if folder.is_dir() else ():
        by_identity[job.identity].append(job)
    return [cell for jobs in by_identity.values() if (cell := Cell(tuple(jobs))).n]


def _asked(job: Job, key: str) -> str:
    return dict(override.split("=", 1) for override in job.overrides)[key]


def _points(cells: Sequence[Cell], value: Value) -> dict[str, list[tuple[float, Cell]]]:
    """By optimizer and value, the best setting."""
    best: dict[tuple[str, float], Cell] = {}
    for cell in sorted(cells, key=lambda cell: cell.mean):
        best.setdefault((cell.best.optimizer, value(cell.best)), cell)
    points: dict[str, list[tuple[float, Cell]]] = defaultdict(list)
    for (name, number), cell in sorted(best.items(), key=lambda item: item[0][1]):
        points[name].append((number, cell))
    return dict(points)


def _best(cells: Sequence[Cell]) -> dict[str, Cell]:
    return {cell.best.optimizer: cell for cell in sorted(cells, key=lambda cell: cell.mean, reverse=True)}


def _verdict(cells: Sequence[Cell]) -> str:
    ranked = sorted(_best(cells).items(), key=lambda item: item[1].mean)
    if not ranked:
        return "No run has come to its end."
    (first, best), *others = ranked
    noise = pooled(cells)
    words = [f"{first} ended lowest: perplexity {math.exp(best.mean):.1f}, {loss_of(best)} nats."]
    for name, cell in others:
        test = gap(best, cell, noise)
        told = {"inside": "inside the noise between seeds", "beyond": "beyond the noise"}
        judged = told.get(test.judgement, "untested")
        words.append(f"{name}: {math.exp(cell.mean):.1f}, {test.value:.3f} nats behind ({judged}).")
    return " ".join(words)


def _figure(key: str, title: str, label: str, thing: str, points: Mapping[str, Sequence[tuple[float, Cell]]], **how):
    narrowed = how.get("narrowed", False)
    what = Response(key, title, label, points, how.get("log", True), thing, narrowed)
    return sweep_figures.response(what, optimizer_colours(points))


def _optimizers(cells: Sequence[Cell]) -> Section | None:
    if not cells:
        return None
    ranked = sorted(_best(cells).items(), key=lambda item: item[1].mean)
    rows = tuple(
        (name, f"{math.exp(cell.mean):.2f}", loss_of(cell), str(cell.n), f"{cell.rate:.2g}") for name, cell in ranked
    )
    header = ("optimizer", "perplexity", "final loss, nats per token", "n", "rate")
    table = Table("perplexity", "", header, rows, numeric=frozenset({1, 2, 3, 4}), best=frozenset({0}))
    points = _points([cell for cell in cells if cell.rate], lambda job: Cell((job,)).rate or 0.0)
    figure = _figure("rates", "Final loss by rate", "peak learning rate", "rate", points)
    intro = "Lion with betas 0.95 and 0.98, AdamW 0.9 and 0.99, Adafactor with momentum 0.9; each at its own best rate."
    return Section("optimizers", "Optimizers", intro, (figure,), (table,))


def _batch_size(cells: Sequence[Cell]) -> Section | None:
    if not cells:
        return None
    points = _points(cells, lambda job: float(_asked(job, "trainer.global_batch_size")))
    figure = _figure("batch", "Final loss by batch size", "sequences per step", "batch", points, narrowed=True)
    return Section("batch_size", "Batch size", "Equal tokens; at each batch the best of the rates tried.", (figure,))


def _beta2(cells: Sequence[Cell]) -> Section | None:
    if not cells:
        return None
    points = _points(cells, lambda job: 1 / (1 - float(json.loads(_asked(job, "optimizer.betas"))[1])))
    label = "steps remembered, 1 / (1 - beta2)"
    figure = _figure("beta2", "Final loss by beta2", label, "memory", points)
    intro = "beta2 is Lion's memory of gradients (beta1 = 0.95), and AdamW's of their squares (beta1 = 0.9)."
    return Section("beta2", "beta2", intro, (figure,))


_SECTIONS = {"optimizers": _optimizers, "batch_size": _batch_size, "beta2": _beta2}
