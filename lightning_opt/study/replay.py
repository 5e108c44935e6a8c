"""A study's analysis from its table of results: no training, no drawing."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_opt.plan import ConfigError
from lightning_opt.run_folder.records import write_text
from lightning_opt.study.hyper_laws import HYPER_LAW_COLUMNS, JointLaw, fit_joint_law, law_row, tuned_laws
from lightning_opt.study.laws import LossLaw, NotEnoughCells
from lightning_opt.study.recorded import LOST, recorded_cost, recorded_gains
from lightning_opt.study.results import PUBLISHED, Cell, Results, non_embedding, read_results
from lightning_opt.study.sensitivity import NEAR, Sensitivity, recorded_trials, sensitivity
from lightning_opt.study.significance import Noise, pooled
from lightning_opt.study.speedups import INTERPOLATED, SpeedUp, baseline_of, speed_ups
from lightning_opt.study.tuned import Tuned, read_tuned

SPEEDUP_COLUMNS = ("optimizer", "params", "chinchilla", "speedup", "low", "high", "by", "note")
LAW_COLUMNS = ("optimizer", "params", "fit_points", "alpha", "exponent", "floor")

FIRST_PHASE = (("130m", 1.0), ("130m", 2.0), ("130m", 4.0), ("130m", 8.0), ("300m", 1.0), ("520m", 1.0))
"""The study's settings of phase I: all hyperparameters were searched there."""


@dataclass(frozen=True)
class Replayed:
    """What came out, and where it was written.

    Attributes:
        results: as read.
        speedups: of every cell but the baseline's own: by tokens, then by time and by memory where they are known.
        laws: rows of ``laws.csv``.
        facts: what the report says besides, as `lightning_opt.reports.study.write` lists it.
        paths: ``speedups.csv`` and ``laws.csv``, and ``hyper_laws.csv`` where tuned configurations were given.
    """

    results: Results
    speedups: list[SpeedUp]
    laws: list[dict[str, Any]]
    facts: dict[str, Any]
    paths: tuple[Path, ...]


def replay(
    results_csv: str | Path,
    out: str | Path,
    baseline: str = "adamw",
    fit: tuple[float, float] | None = (1, 8),
    sigma: float | None = 3e-3,
    level: float = 0.90,
    tuned: str | Path | None = None,
    near: float = NEAR,
) -> Replayed:
    """Analyses a table of results and writes ``speedups.csv`` and ``laws.csv``, and with `tuned` ``hyper_laws.csv``.

    Args:
        results_csv: the table, as `read_results` takes it.
        out: folder of the files; made where it is missing.
        baseline: the optimizer the others are held against.
        fit: lowest and highest data ratio of the laws; None: all.
        sigma: standard deviation of a final loss between seeds, nats; None: pooled from the table's repeated seeds.
        level: share of the truth that the intervals are meant to cover.
        tuned: the tuned configurations that the table's ``…_ablation`` rows are changes of, as `read_tuned` takes
            them; None: nothing is said of sensitive hyperparameters.
        near: near-best configurations reach so far above the lowest loss, nats per token.

    Raises:
        ConfigError: the table or a value is wrong.
    """
    results, settled = read_results(results_csv), None if tuned is None else read_tuned(tuned)
    noise = Noise.of(sigma) if sigma is not None else pooled(results.losses.values())
    if noise is None:
        raise ConfigError("sigma", None, "must be a number (nats) for a table in which no cell has two seeds")
    found = analyse(results, out, baseline=baseline, fit=fit, sigma=noise, level=level)
    if results.tuning:
        found.facts["cost"], found.facts["failures"] = recorded_cost(results)
        found.facts["cost_note"] = _COST_NOTE
    found.facts["notes"] += [*_lowest_note(results), *_gain_notes(results)]
    if settled is None:
        return found
    found.facts.update(phase_two(results, settled, near))
    found.facts["notes"] += _maybe_note(found.facts["maybe_sensitive"])
    sizes = {cell.params: size for cell in settled.best if (size := non_embedding(cell.params)) is not None}
    searched = {cell: best for cell, best in settled.best.items() if cell in settled.searched}
    found.facts["hyper_laws"] = laws = tuned_laws(searched, {**sizes, **results.sizes})
    path = _write(Path(out) / "hyper_laws.csv", HYPER_LAW_COLUMNS, map(law_row, laws))
    return replace(found, paths=(*found.paths, path))


_COST_NOTE = (
    "What the table records: the last tuned configuration of each cell and the changes to it, not the passes before. "
    f"Diverged: no finite loss, or {LOST:g} nat and more above the cell's lowest. Tokens as if each ran to its end."
)


def analyse(
    results: Results,
    out: str | Path,
    *,
    baseline: str = "adamw",
    fit: tuple[float, float] | None = (1, 8),
    sigma: float | Noise = 3e-3,
    level: float = 0.90,
) -> Replayed:
    """As `replay`, of results that are at hand: a live study's.

    Args:
        results: what was found.
        out: folder of the files; made where it is missing.
        baseline: the optimizer the others are held against.
        fit: lowest and highest data ratio of the laws; None: all.
        sigma: standard deviation of a final loss between seeds, nats, or a `Noise` pooled from repeated seeds.
        level: share of the truth that the intervals are meant to cover.
    """
    found = [
        one
        for by in ("tokens", "time", "memory")
        for one in speed_ups(results, baseline=baseline, fit=fit, sigma=sigma, level=level, by=by)
    ]
    laws = law_rows(results, fit)
    folder = Path(out)
    paths = (
        _write(folder / "speedups.csv", SPEEDUP_COLUMNS, map(_speedup_row, found)),
        _write(folder / "laws.csv", LAW_COLUMNS, ([row[name] for name in LAW_COLUMNS] for row in laws)),
    )
    noise = Noise.of(sigma)
    facts = {"title": "Which optimizer?", "source": results.source, "baseline": baseline, "level": level}
    facts |= {"sigma": noise.sigma, "sigma_origin": _origin(noise), "fit": _fit_words(results, baseline, fit)}
    if math.isfinite(noise.freedom):
        facts["freedom"] = noise.freedom
    facts["refit"] = _refit(results, baseline, fit, noise, level)
    facts["joint_law"] = joint = _joint(results, baseline, fit)
    facts["notes"] = [
        *_coverage_notes(found),
        *_refit_notes(found, facts["refit"]),
        *_unseen(results, baseline, fit),
        *_joint_note(joint),
    ]
    return Replayed(results, found, laws, facts, paths)


def law_rows(results: Results, fit: tuple[float, float] | None = (1, 8)) -> list[dict[str, Any]]:
    """The rows of ``laws.csv``: the law of every optimizer on every model with three ratios or more.

    Args:
        results: the losses.
        fit: lowest and highest ratio that counts; None: all.
    """
    rows = []
    for optimizer in results.optimizers:
        for label in results.labels:
            law = baseline_of(results, optimizer, label, fit)
            if isinstance(law, LossLaw):
                points = ";".join(f"{ratio:g}" for ratio, _ in law.points)
                values = (optimizer, label, points, law.alpha, law.exponent, law.floor)
                rows.append(dict(zip(LAW_COLUMNS, values, strict=True)))
    return rows


def phase_two(results: Results, tuned: Tuned, near: float = NEAR) -> dict[str, Any]:
    """What the recorded changes say of each optimizer's hyperparameters.

    Args:
        results: with `tuning`.
        tuned: the configurations that were changed.
        near: near-best configurations reach so far above the lowest loss, nats per token.

    Returns:
        ``insensitive`` and ``sensitive`` (optimizer to hyperparameter to values), ``maybe_sensitive`` (likewise: not in
        the table, but with the tuned configurations of settings whose changes it lacks), ``centre`` (cell to
        configuration) and ``sensitivity`` (optimizer to all of it).
    """
    found = {name: recorded_sensitivity(results, tuned, name, near) for name in results.optimizers}
    found = {name: one for name, one in found.items() if one.near}
    wider = {name: recorded_sensitivity(results, tuned, name, near, bests=True).sensitive for name in found}
    maybe = {
        name: {key: values for key, values in wider[name].items() if key not in one.sensitive}
        for name, one in found.items()
    }
    return {
        "insensitive": {name: one.insensitive for name, one in found.items()},
        "sensitive": {name: one.sensitive for name, one in found.items()},
        "maybe_sensitive": {name: keys for name, keys in maybe.items() if keys},
        "centre": {cell: best for cell, best in tuned.best.items() if cell in results.tuning},
        "sensitivity": found,
    }


def recorded_sensitivity(
    results: Results, tuned: Tuned, optimizer: str, near: float = NEAR, *, bests: bool = False
) -> Sensitivity:
    """An optimizer's sensitive hyperparameters from the settings of phase I that the table holds.

    Args:
        results: with `tuning`.
        tuned: the configurations that were changed.
        optimizer: whose.
        near: near-best configurations reach so far above the lowest loss, nats per token.
        bests: take in the settings of which only the tuned configuration is known, as if nothing else were near-best
            there; what is sensitive then may be so, what is sensitive without them is.
    """
    cells = [cell for setting in FIRST_PHASE if (cell := Cell(optimizer, *setting)) in tuned.best]
    trials = {cell: recorded_trials(results, cell, tuned.best[cell]) for cell in cells if cell in results.tuning}
    lowest = {cell: results.loss(cell) for cell in trials if cell in results.losses}
    if bests:
        trials |= {cell: [(tuned.best[cell], 0.0)] for cell in cells if cell not in trials}
    return sensitivity(trials, near, lowest)


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([columns, *rows])
    write_text(path, text.getvalue())
    return path


def _speedup_row(one: SpeedUp) -> tuple[Any, ...]:
    numbers = ("" if math.isnan(number) else number for number in (one.value, one.low, one.high))
    return (one.optimizer, one.params, f"{one.chinchilla:g}", *numbers, one.by, one.note)


def _origin(noise: Noise) -> str:
    if math.isinf(noise.freedom):
        return "given"
    return f"pooled from repeated seeds, {noise.freedom:g} degrees of freedom"


def _fit_words(results: Results, baseline: str, fit: tuple[float, float] | None) -> str:
    """``1x to 8x``: the ratios that the baseline's laws were really fitted to."""
    low, high = fit or (0.0, math.inf)
    inside = sorted({cell.chinchilla for cell in results.losses if cell.optimizer == baseline})
    inside = [ratio for ratio in inside if low <= ratio <= high]
    return f"{inside[0]:g}x to {inside[-1]:g}x" if inside else "no cell"


def _refit(
    results: Results, baseline: str, fit: tuple[float, float] | None, noise: Noise, level: float
) -> list[tuple[str, list[SpeedUp]]]:
    """The speed-ups by the baseline's other fit, of the models where that is another one.

    The other takes every ratio; where `fit` does so already, those up to 8x.
    """
    used = _fit_words(results, baseline, fit)
    for other in (None, ((fit or (0.0,))[0], _USUAL)):
        if (words := _fit_words(results, baseline, other)) != used:
            moved = {
                label
                for label in results.labels
                if _ratios(results, baseline, label, fit) != _ratios(results, baseline, label, other)
            }
            found = speed_ups(results, baseline=baseline, fit=other, sigma=noise, level=level)
            found = [one for one in found if one.params in moved]
            return [(words, found)] if found else []
    return []


_USUAL = 8.0  # the most data that the study's own fits take in


def _ratios(results: Results, baseline: str, label: str, fit: tuple[float, float] | None) -> tuple[float, ...]:
    law = baseline_of(results, baseline, label, fit)
    return () if law is None else tuple(ratio for ratio, _ in law.points)


def _coverage_notes(found: Sequence[SpeedUp]) -> list[str]:
    """How far the intervals are to be believed."""
    notes = []
    if any(math.isfinite(one.low) and one.note != INTERPOLATED for one in found):
        notes.append(
            "In simulations (1000 tables of a known law and speed-up for each of 16 shapes), the 90 % intervals of "
            "fitted and of extrapolated speed-ups held the truth in 88 to 92 %. That is for losses that follow the law "
            "with normal noise of this sigma; of a law of another form no interval knows."
        )
    if any(one.note == INTERPOLATED for one in found):
        notes.append(
            "With two ratios the intervals are wider than they need be: in simulations they held the truth in 95 to "
            "100 %, for they allow every exponent from 0 to 1."
        )
    return notes


def _refit_notes(found: Sequence[SpeedUp], refit: Sequence[tuple[str, Sequence[SpeedUp]]]) -> list[str]:
    """How far the choice of the fit's points moves a speed-up, at the cell of 8x or less where it moves most."""
    notes = []
    usual = {(one.optimizer, one.params, one.chinchilla): one for one in found if one.by == "tokens"}
    for words, others in refit:
        pairs = [(usual[one.optimizer, one.params, one.chinchilla], one) for one in others]
        moved = [(a, b) for a, b in pairs if a.chinchilla <= _USUAL and math.isfinite(a.value - b.value)]
        if moved:
            a, b = max(moved, key=lambda pair: abs(pair[0].value - pair[1].value))
            notes.append(
                f"The points of the baseline's fit matter: fitted over {words}, the speed-up of {a.optimizer} "
                f"{a.params} {a.chinchilla:g}x, which moves most, is {b.value:.2f} instead of {a.value:.2f}."
            )
    return notes


def _unseen(results: Results, baseline: str, fit: tuple[float, float] | None) -> list[str]:
    """The baseline's own cells that its fit did not see: what its law makes of them is what it is off by."""
    notes = []
    for label in results.labels:
        law = baseline_of(results, baseline, label, fit)
        if not isinstance(law, LossLaw) or not law.falls:
            continue
        seen = {ratio for ratio, _ in law.points}
        for cell in results.of(baseline, label):
            loss = results.loss(cell)
            if cell.chinchilla in seen or not math.isfinite(loss):
                continue
            reached = law.equivalent(loss) / cell.chinchilla
            credit = f"{reached:.2f}x over itself" if math.isfinite(reached) else "no speed-up at all: under its floor"
            notes.append(
                f"{label}: at {cell.chinchilla:g}x, which the fit did not see, {baseline} had {loss:.4f} and its law "
                f"says {law(cell.chinchilla):.4f}, which would credit {baseline} with {credit}. Extrapolated "
                "speed-ups there are off by as much."
            )
    return notes


def _joint(results: Results, baseline: str, fit: tuple[float, float] | None) -> JointLaw | str:
    """The baseline's law in model size and tokens, of the cells that its other laws take; why there is none."""
    low, high = fit or (0.0, math.inf)
    cells = [cell for cell in results.losses if cell.optimizer == baseline and cell.params in results.sizes]
    cells = [cell for cell in cells if low <= cell.chinchilla <= high and math.isfinite(results.loss(cell))]
    try:
        return fit_joint_law(
            [results.sizes[cell.params] for cell in cells],
            [cell.chinchilla for cell in cells],
            [results.loss(cell) for cell in cells],
        )
    except NotEnoughCells as error:
        return str(error)


def _joint_note(joint: JointLaw | str) -> list[str]:
    if isinstance(joint, str):
        return [f"No joint law in model size and tokens: {joint}."]
    return [
        f"Joint law of the baseline over {joint.cells} cells: L(N, D) = {joint.floor:.4g} + {joint.by_size:.4g} "
        f"(N / {joint.unit_size:.4g})^-{joint.size_exponent:.3g} + {joint.by_tokens:.4g} "
        f"(D / {joint.unit_tokens:.4g})^-{joint.tokens_exponent:.3g}; it misses them by {joint.error:.4f} nats (root "
        "mean square)."
    ]


def _lowest_note(results: Results) -> list[str]:
    if results.metric != PUBLISHED or not results.tuning:
        return []
    counts = [len(runs) for runs in results.tuning.values()]
    return [
        "A final loss here is the lowest of its cell's tuning runs, seen on the text that they were tuned on (winner's "
        f"curse): too low by part of the noise, and by more where more was tried ({min(counts)} to {max(counts)} runs "
        "of a cell are recorded). No fresh seeds are published."
    ]


def _gain_notes(results: Results) -> list[str]:
    """What was left on the table: recorded changes of tuned configurations that a descent would have taken."""
    return [
        f"{cell.optimizer} {cell.params} {cell.chinchilla:g}x: a descent from the tuned configuration takes a recorded "
        f"change, {step.axis} = {step.after[step.axis]}, for {step.gain:.4f} nats less."
        for cell, descent in recorded_gains(results).items()
        for step in descent.accepted
    ]


def _maybe_note(maybe: dict[str, dict[str, Any]]) -> list[str]:
    if not maybe:
        return []
    named = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in maybe.items())
    return [
        "Sensitive hyperparameters are those that the recorded changes show. The table lacks the changes of some "
        f"settings of phase I; by their tuned configurations alone these may be sensitive too: {named}."
    ]
