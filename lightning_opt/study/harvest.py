"""From the run folders of a live study to its results, and to what its report says besides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_opt.plan import ConfigError
from lightning_opt.run_folder import read_json, read_metrics
from lightning_opt.study.budget import Spent
from lightning_opt.study.cells import TUNING, Ledger, Outcome, Trial, costs, scores, shown, summary_of, time_column
from lightning_opt.study.phases import CellStanding, Design, Standing
from lightning_opt.study.results import Cell, Results
from lightning_opt.study.space import changed_axes

_MEASURES = ("optimizer_ms", "optimizer_state_bytes", "loss_volatility", "grad_norm_change", "expert_load_cv")


def results_of(standing: Standing, source: str) -> Results:
    """The results as they stand: of each cell the reported runs in the order of the seeds, up to the first missing.

    Args:
        standing: of the study.
        source: where they come from, in words.
    """
    found = Results(source=source)
    for one in standing.cells:
        cell = one.plan.cell
        found.sizes.setdefault(cell.params, one.plan.params)
        if one.best_loss is not None:
            found.tuning[cell] = _changes(one)
        ended = reported(one)
        if not ended:
            continue
        found.losses[cell] = tuple(outcome.loss for outcome in ended if outcome.loss is not None)
        if all(math.isfinite(loss) for loss in found.losses[cell]):
            known = costs(ended)
            for name in known:
                getattr(found, name)[cell] = known[name]
            if told := scores(ended):
                found.scores[cell] = told
    return found


def check_same_data(design: Design, standing: Standing, ledger: Ledger) -> None:
    """Losses on different data are not compared: the embedded corpora change with Python and its packages.

    Args:
        design: the study's.
        standing: as it stands.
        ledger: its runs, and whatever else the folder holds.

    Raises:
        ConfigError: the runs of a model that chose and those that are reported did not all see the same. Two models may
            have tokenizers of their own, which a note then says.
    """
    for found in _texts(design, standing, ledger).values():
        most, *others = sorted(found.values(), key=len, reverse=True)
        if odd := [name for names in others for name in names]:
            named = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
            why = f"must be the same in all runs of a model, and is another in the {len(most)} others: bring back the "
            why += "packages of then and delete these folders, or start anew with out=ANOTHER_FOLDER"
            raise ConfigError("data", named, why)


def _texts(design: Design, standing: Standing, ledger: Ledger) -> dict[str, dict[str, dict[str, None]]]:
    """Model to the fingerprint of each text that its runs saw, to the names of their folders."""
    seen: dict[str, dict[str, dict[str, None]]] = {}
    for trial in _asked(design, standing):
        one = ledger.get(design.key(trial), Outcome())
        if one.is_result and one.folder:
            mark = str(read_json(one.folder / "plan.json").get("data_fingerprint"))
            seen.setdefault(trial.cell.params, {}).setdefault(mark, {})[one.folder.name] = None
    return seen


def _asked(design: Design, standing: Standing) -> Iterator[Trial]:
    """What the study has asked for so far: the folder may hold another's runs too."""
    if design.threshold is None:
        yield from design.noise_trials()
    for one in standing.cells:
        yield from (Trial(one.plan, config, design.tuning_seed) for config, _ in one.tried)
        yield from one.finals


def reported(one: CellStanding) -> list[Outcome]:
    """The results of a cell's reported runs, in the order of the seeds, so that optimizers are paired by seed."""
    ended = []
    for outcome in one.reported:
        if not outcome.is_result:
            break
        ended.append(outcome)
    return ended


def _changes(one: CellStanding) -> dict[str, float]:
    """The losses of the tuned configuration and of the runs that differ from it in one value."""
    best = one.best or {}
    found = {"best_config": float(one.best_loss or 0.0)}
    for config, loss in one.tried:
        names = list(changed_axes(best, config))
        if len(names) == 1:
            found[f"{names[0]}={shown(config[names[0]])}"] = loss
    return found


def facts_of(design: Design, standing: Standing, ledger: Ledger) -> dict[str, Any]:
    """What the report says besides the results, as `lightning_opt.reports.study.write` lists it.

    Args:
        design: the study's.
        standing: as it stands.
        ledger: its runs.
    """
    done = sum(one.is_done for one in standing.cells)
    noise = () if design.threshold is not None else design.noise_seeds
    facts: dict[str, Any] = {
        "state": f"{done} of {len(standing.cells)} cells done",
        "tone": "good" if standing.is_done else "warn",
        "threshold": standing.threshold,
        "seeds": {"tuning": [*map(str, (design.tuning_seed, *noise))], "reporting": [*map(str, design.seeds)]},
        "validation": "Settings were chosen on every other sequence of the validation text, and are reported on the "
        "others.",
        "centre": {one.plan.cell: one.best for one in standing.cells if one.best},
        "curves": {one.plan.cell: curve for one in standing.cells if (curve := _curve(one))},
        "cost": {name: _cost(design, standing, ledger, name) for name in design.optimizers},
        "failures": list(_failures(design, standing, ledger)),
        "measures": {one.plan.cell: found for one in standing.cells if (found := _measured(one))},
        "insensitive": {name: said.insensitive for name, said in standing.reduced.items()},
        "sensitive": {name: said.sensitive for name, said in standing.reduced.items()},
        "notes": [*_notes(design, standing), *_token_notes(design, standing, ledger)],
    }
    if not standing.is_done:
        facts["alarm"] = "The study is not over: whatever is said below may change."
    return facts


def _curve(one: CellStanding) -> dict[str, tuple[list[float], list[float]]]:
    """Validation losses along the reported run that ended lowest, by tokens and by seconds."""
    ended = [outcome for outcome in reported(one) if outcome.folder and math.isfinite(outcome.loss or math.inf)]
    if not ended:
        return {}
    best = min(ended, key=lambda outcome: outcome.loss or math.inf)
    metrics = read_metrics(best.folder / "metrics.csv") if best.folder else {}
    found = {}
    for name, column in (("tokens", "tokens"), ("time", time_column(best))):
        pairs = zip(metrics.get(column, ()), metrics.get("val/loss", ()), strict=False)
        kept = [(x, y) for x, y in pairs if x is not None and y is not None]
        if len(kept) > 1:
            found[name] = ([x for x, _ in kept], [y for _, y in kept])
    return found


def _measured(one: CellStanding) -> dict[str, tuple[float, ...]]:
    summaries = [summary_of(outcome) for outcome in reported(one) if math.isfinite(outcome.loss or math.inf)]
    known = [name for name in _MEASURES if summaries and all(row.get(name) is not None for row in summaries)]
    return {name: tuple(float(row[name]) for row in summaries) for name in known}


def _cost(design: Design, standing: Standing, ledger: Ledger, optimizer: str) -> dict[str, Any]:
    """What tuning an optimizer took in all its cells, the runs that measured the noise included."""
    mine = [one for one in standing.cells if one.plan.cell.optimizer == optimizer]
    spent = sum((one.spent for one in mine), Spent())
    if design.threshold is None:
        for trial in design.noise_trials():
            found = ledger.get(design.key(trial), Outcome())
            if trial.cell.optimizer == optimizer and trial.seed != design.tuning_seed and found.is_result:
                spent += Spent(1, found.tokens, found.seconds, int(math.isinf(found.loss or 0.0)))
    return {
        "runs": spent.runs,
        "tokens": spent.tokens,
        "seconds": spent.seconds or None,
        "diverged": spent.diverged,
        "capped": [one.plan.cell for one in mine if one.capped],
    }


def _failures(design: Design, standing: Standing, ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Runs that diverged, and reported ones that have no result."""
    for one in standing.cells:
        cell = one.plan.cell
        for config, loss in one.tried:
            if math.isinf(loss):
                trial = Trial(one.plan, config, design.tuning_seed, TUNING)
                yield _failure(cell, config, ledger.get(design.key(trial), Outcome()))
        for trial, outcome in zip(one.finals, one.reported, strict=True):
            if outcome.state in ("FAILED", "DIVERGED"):
                yield _failure(cell, {**trial.config, "seed": trial.seed}, outcome)


def _failure(cell: Cell, config: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    setting = " ".join(f"{name}={shown(value)}" for name, value in config.items())
    about = {"optimizer": cell.optimizer, "params": cell.params, "chinchilla": cell.chinchilla}
    return {**about, "setting": setting, "state": outcome.state, "reason": outcome.reason}


def _notes(design: Design, standing: Standing) -> Iterator[str]:
    if standing.noise is not None:
        yield (
            f"Seeds set the start's final losses apart by {standing.noise.sigma:.4f} nats "
            f"({standing.noise.freedom:g} degrees of freedom): a change is accepted that gains more than "
            f"{standing.threshold:.4f}, which two equal settings differ by with a chance of 5 %."
        )
    caps = f"The cap on tuning a cell is the same for all: {design.budget} in phase I"
    yield f"{caps}, {design.reduced_budget} in phase II."
    ended = [outcome for one in standing.cells for outcome in reported(one)]
    if ended and all(time_column(outcome) == "cpu_time_s" for outcome in ended):
        yield (
            "Seconds and wall time are of reported runs what their one thread computed, as on a core of its own: what "
            "ran beside counts only by caches and memory."
        )
    else:
        yield "Seconds are of this machine, with whatever ran beside: speed-ups by wall time hold there."
    yield from _suite_notes(ended)
    for name in design.optimizers:
        cells, first = (sum(cell.optimizer == name for cell in of) for of in (design.plans, design.first))
        if first < 2 and first < cells:
            yield f"{name}: one cell of phase I cannot say what is insensitive; phase II keeps its values."


def _suite_notes(ended: Sequence[Outcome]) -> Iterator[str]:
    """What the scores may be compared with."""
    found = [evaluation for outcome in ended if (evaluation := summary_of(outcome).get("evaluation"))]
    if any(evaluation.get("suite") == "mini" for evaluation in found):
        rows = {task: row for evaluation in found for task, row in evaluation.items() if isinstance(row, dict)}
        counts = ", ".join(f"{task} {row['n']}" for task, row in rows.items() if row.get("n"))
        yield f"Scores are of our own small sets (items: {counts}), which compare with nothing but each other."


def _token_notes(design: Design, standing: Standing, ledger: Ledger) -> Iterator[str]:
    """Whether nats per token mean the same for all models."""
    marks = {mark for found in _texts(design, standing, ledger).values() for mark in found}
    if len(marks) > 1:
        yield (
            "The models do not all see the same tokens (another vocabulary or sequence length): their losses cannot be "
            "held against one another, nor does a joint law of them mean anything."
        )
