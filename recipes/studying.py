"""How a live study goes about its runs, what it says of them, and what it makes of them (see `recipes.study`)."""

from __future__ import annotations

import csv
import io
import math
import os
import shlex
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_opt.plan import duration
from lightning_opt.run_folder.records import write_text
from lightning_opt.study.cells import REPORTING, TUNING, Key, Ledger, Outcome, Trial, read_ledger
from lightning_opt.study.forecast import Forecast, Speeds, counts, forecast
from lightning_opt.study.harvest import check_same_data, facts_of, results_of
from lightning_opt.study.hyper_laws import HYPER_LAW_COLUMNS, law_row, tuned_laws
from lightning_opt.study.phases import STOPS, CellStanding, Design, Standing, stand
from lightning_opt.study.replay import analyse
from lightning_opt.study.results import Results, write_results
from lightning_opt.study.significance import pooled

COLUMNS = ("cell", "phase", "state", "tuning runs", "under way", "diverged", "best loss", "final runs", "final loss")
_STATES = {"FINISHED": "finished", "DIVERGED": "diverged", "RUNNING": "under way", "FAILED": "failed"}


@dataclass(frozen=True)
class About:
    """How a study stands, in words; everything is read anew from its run folders.

    Attributes:
        design: the study's.
        folder: of its runs.
        at_once: runs side by side.
        flops_per_second: of one run, as long as none was measured.
    """

    design: Design
    folder: Path
    at_once: int
    flops_per_second: float

    def ledger(self) -> dict[Key, Outcome]:
        """What has become of its runs."""
        return read_ledger(self.folder)

    def _now(self) -> tuple[Standing, Ledger, Speeds]:
        ledger = self.ledger()
        return stand(self.design, ledger), ledger, Speeds(self.design, ledger, self.flops_per_second)

    def show(self) -> None:
        """Prints a row for every cell and a last line: by rich where it is installed, else as plain columns."""
        standing, ledger, speeds = self._now()
        rows = [_row(self.design, one, ledger) for one in standing.cells]
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
            for row in (COLUMNS, *rows):
                print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
        else:
            drawn = Table(*COLUMNS)
            for row in rows:
                drawn.add_row(*row)
            console = Console()
            (console if console.is_terminal else Console(width=160)).print(drawn)
        print(self._line(standing, ledger, speeds), flush=True)

    def line(self) -> str:
        """How the study stands, in one line."""
        return self._line(*self._now())

    def _line(self, standing: Standing, ledger: Ledger, speeds: Speeds) -> str:
        states, cells = counts(self.design, ledger), standing.cells
        left = forecast(self.design, standing, speeds)
        said = [f"{sum(one.is_done for one in cells)} of {len(cells)} cells done"]
        said += [f"{states[state]} runs {word}" for state, word in _STATES.items() if states.get(state)]
        if capped := sum(one.capped for one in cells):
            said.append(f"cap hit in {capped}")
        if standing.threshold is None:
            said.append("measuring the spread between seeds")
        if not standing.is_done:
            said.append(f"{_most(left)} to go, {duration(left.seconds / self.at_once)} at {self.at_once} at once")
        return "study: " + ", ".join(said)

    def plan_lines(self) -> Iterator[str]:
        """What the study takes at most, for a dry run."""
        design, (standing, _, speeds) = self.design, self._now()
        left = forecast(design, standing, speeds)
        second = "" if design.reduced_budget == design.budget else f", in phase II {design.reduced_budget}"
        yield f"{len(design.plans)} cells, {len(design.first)} of them in phase I; cap on one: {design.budget}{second}"
        for plan in design.plans.values():
            cell, values = plan.cell, " ".join(f"{name}={value}" for name, value in plan.start.items())
            length = f"{plan.tokens:,.0f} tokens ({plan.steps(plan.start)} steps)"
            yield f"  {_named(plan.cell)}: {length}, phase {_phase(design, cell)}, from {values} ({plan.origin})"
        if design.threshold is None:
            yield f"the start of each optimizer on {len(design.noise_seeds) + 1} seeds measures the threshold"
        words = "runs that are known to come (a search has no cap)" if left.open else "runs at most"
        yield (
            f"{left.runs} {words}: {left.tuning} to tune, {left.reporting} to report ({len(design.seeds)} seeds a cell)"
        )
        if left.measured:
            clock = duration(left.seconds / self.at_once)
            yield f"{clock} at most with {self.at_once} at once, at the speed that this study's runs had"
        else:
            yield f"{left.seconds:,.0f} core-seconds at most, estimated by flops_per_second"


def _named(cell: Any) -> str:
    return f"{cell.optimizer} {cell.params} {cell.chinchilla:g}x"


def _phase(design: Design, cell: Any) -> str:
    return "I" if cell in design.first else "II"


def _row(design: Design, one: CellStanding, ledger: Ledger) -> tuple[str, ...]:
    """How a cell stands, in `COLUMNS`."""
    budget = design.budget if one.phase == 1 else design.reduced_budget
    found = [ledger.get(design.key(trial), Outcome()) for trial in (*one.pending, *one.finals)]
    ended = [outcome.loss for outcome in one.reported if outcome.loss is not None]
    return (
        _named(one.plan.cell),
        _phase(design, one.plan.cell),
        f"{one.state} (cap hit)" if one.capped else one.state,
        f"{one.spent.runs}" if budget.runs is None else f"{one.spent.runs} of at most {budget.runs}",
        str(sum(outcome.state == "RUNNING" for outcome in found) or ""),
        str(one.spent.diverged or ""),
        "" if one.best_loss is None else f"{one.best_loss:.4f}",
        f"{len(ended)} of {len(design.seeds)}",
        f"{math.fsum(ended) / len(ended):.4f}" if ended else "",
    )


def _most(left: Forecast) -> str:
    return f"{left.runs} runs known" if left.open else f"at most {left.runs} runs"


class Progress:
    """Says every minute how the study stands, where that has changed; a context manager.

    Args:
        about: what is said of it.
    """

    EVERY_S = 60.0

    def __init__(self, about: About) -> None:
        self._about, self._over = about, threading.Event()
        self._thread = threading.Thread(target=self._look, name="study", daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        before = ""
        while not self._over.wait(self.EVERY_S):
            try:
                now = self._about.line()
            except (OSError, ValueError):  # a file that is being written
                continue
            if now != before:
                print(now, flush=True)
                before = now


class Waves:
    """Runs trials as jobs of one sweep folder, until the time is over.

    Args:
        design: the study's.
        folder: of the runs.
        command: the command line, after ``python``.
        shared: overrides of the sweep.
        stop_after: seconds after which nothing more is started; None: never.
    """

    OUT_OF_TIME = -1

    def __init__(
        self,
        design: Design,
        folder: Path,
        *,
        command: Sequence[str],
        shared: Sequence[str] = (),
        stop_after: float | None = None,
    ) -> None:
        self.design, self.folder, self.command, self.shared = design, folder, command, shared
        self._end = math.inf if stop_after is None else time.monotonic() + stop_after

    def __call__(self, trials: Sequence[Trial]) -> int:
        """The exit code of a sweep of these trials, or `OUT_OF_TIME`."""
        code = self.OUT_OF_TIME
        if time.monotonic() < self._end:
            from lightning_opt.launch import run_jobs

            lists = [self.design.words(trial) for trial in trials]
            code = run_jobs(lists, self.folder, words=self.command, shared=self.shared, draw=False, until=self._end)
            self._tidy()
        return code if code in STOPS or time.monotonic() < self._end else self.OUT_OF_TIME

    def _tidy(self) -> None:
        """Nobody goes on from a run that has a result, and nobody uses the weights of one that only chose."""
        ours = any(word.startswith("callbacks.checkpoint.") for word in self.design.extra.get(TUNING, ()))
        for key, one in read_ledger(self.folder).items() if ours else ():
            if ("trainer.val_part", TUNING) in key and one.is_result and one.folder:
                shutil.rmtree(one.folder / "checkpoints", ignore_errors=True)


def command(words: Sequence[str]) -> str:
    """The command line as one would type it."""
    from lightning_opt.launch import redact

    return shlex.join(["python", "-m", "recipes.study", *redact(words)])


def say_paths(paths: Sequence[Path]) -> None:
    """One path a line."""
    for path in paths:
        print(path)


def conclude(
    design: Design,
    out: Path,
    *,
    baseline: str,
    fit: tuple[float, float] | None,
    sigma: float | None,
    asked: Sequence[str],
) -> None:
    """Writes the results, the analysis and the verdict of a study as it stands; says where.

    Args:
        design: the study's.
        out: its folder.
        baseline: whom the others are held against.
        fit: scales of the baseline's law; None: all.
        sigma: between seeds, nats; None: pooled from the reported ones.
        asked: the command line's words.
    """
    ledger = read_ledger(out / "runs")
    standing = stand(design, ledger)
    check_same_data(design, standing, ledger)
    results = results_of(standing, f"run folders of {out.name}")
    if not results.losses:
        print("no run that is reported has come to its end yet: nothing to conclude")
        return
    write_results(results, out / "results.csv")
    paths, speedups, laws = [out / "results.csv"], [], []
    facts = facts_of(design, standing, ledger)
    if any(cell.optimizer == baseline for cell in results.losses):
        noise = sigma or pooled(results.losses.values()) or standing.noise or 3e-3
        found = analyse(results, out, baseline=baseline, fit=fit, sigma=noise)
        speedups, laws, paths = found.speedups, found.laws, [*paths, *found.paths]
        facts = {**found.facts, **facts, "notes": [*found.facts.get("notes", ()), *facts["notes"]]}
        facts["sigma_origin"] = _origin(found.facts["sigma_origin"], sigma, noise)
    text = io.StringIO()
    laws_of = tuned_laws({one.plan.cell: one.best for one in standing.cells if one.over and one.best}, results.sizes)
    csv.writer(text, lineterminator="\n").writerows([HYPER_LAW_COLUMNS, *map(law_row, laws_of)])
    write_text(out / "hyper_laws.csv", text.getvalue())
    facts["hyper_laws"] = laws_of
    facts |= {"title": "Which optimizer?", "commands": commands(standing, results, design, out, asked)}
    from lightning_opt.reports.study import write

    tried = {one.plan.cell: one.tried for one in standing.cells if one.tried}
    say_paths([*paths, out / "hyper_laws.csv", *write(out, results, speedups, laws, tried, facts)])


def _origin(words: str, given: float | None, noise: Any) -> str:
    if given is None and isinstance(noise, float):
        return "taken from the study's threshold: one seed a cell says nothing of the spread"
    return words


def commands(
    standing: Standing, results: Results, design: Design, out: Path, asked: Sequence[str]
) -> list[tuple[str, str]]:
    """What to type: the study again, its analysis, and the best optimizer's run of each model at its largest scale."""
    near = os.path.relpath(out / "results.csv")
    found = [
        ("All of this again, or what is missing", command(asked)),
        ("How far it is", command([*asked, "status=true"])),
        ("The analysis alone", command([f"results={near}", "sigma=pooled", "fit=all"])),
    ]
    for label in results.labels:
        ratio = max(cell.chinchilla for cell in results.losses if cell.params == label)
        level = [cell for cell in results.losses if (cell.params, cell.chinchilla) == (label, ratio)]
        best = min(level, key=results.loss)
        one = next(one for one in standing.cells if one.plan.cell == best)
        words = design.words(Trial(one.plan, one.best or {}, design.seeds[0], REPORTING))
        lowest = f"The lowest loss of {label} at {ratio:g}x ({best.optimizer})"
        found.append((lowest, shlex.join(["python", "train.py", *words])))
    return found
