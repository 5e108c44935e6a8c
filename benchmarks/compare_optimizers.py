"""Which optimizer learns most from the same tokens? Each at its own best of five rates, then on three fresh seeds.

    python -m benchmarks.compare_optimizers                              all rules on pico: about 2 hours on 2 cores
    python -m benchmarks.compare_optimizers --tokens 409600              half the tokens, half the time
    python -m benchmarks.compare_optimizers --model nano --optimizers muon soap adamw --tokens 1638400
    python -m benchmarks.compare_optimizers --quick                      a smoke test: femto, a few steps
    python -m benchmarks.compare_optimizers --values                     runs nothing: tables for plan/tuned

Everything is one sweep of `train.py` in one folder, and its run folders are the only ledger: the same command again
runs what is missing, whatever stopped it. In order: every optimizer at lr_scale 1/4, 1/2, 1, 2 and 4 around the rate of
its YAML, or the tuned one where that is known; where the best lies at an edge, two more rates beyond it, at most twice;
then the best rate with fresh seeds. All see the same data, tokens and schedule (schedule-free AdamW its own) and are
ranked by the mean final validation loss on the fresh seeds, which took no part in the choice of the rate. Only the rate
is chosen here: decay, betas and the rest are the tuned ones where there are any, else the YAML's; the embedding of
every rule but Scion learns at three times the rate of the default role.

*behind*: above the best's mean; *beyond noise* where Student's t, with the spread between seeds pooled over all
optimizers, exceeds its two-sided 5 % limit (no correction for many comparisons). *like momentum or worse*: not beyond
noise below SGD with momentum.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks.record import Page, Table, keep, machine
from lightning_opt.optim import list_optimizers
from lightning_opt.plan import tuned
from lightning_opt.reports.jobs import Job, of_sweep
from lightning_opt.reports.ranking import Cell, Noise, gap, pooled
from recipes.sweeping import ROOT, run

RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
TUNING_SEED = 1234  # train.yaml's
FRESH_SEEDS = (1, 2, 3)
REFERENCE = "momentum"
TOKENS_PER_STEP = 8 * 256  # of the small models
ENDS = ("FINISHED", "DIVERGED", "FAILED")  # states of a job that has had its chance
MOVES = 2  # how often the grid of rates may move outward
FURTHER = (2.0, 4.0)  # beyond the edge
EMBEDDING = 3.0  # its multiple of the other weights' rate, the same for all (results/2026-11-22-tuned-small-models.md)


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        optimizers: by the names of their YAMLs.
        model: a name of conf/model.
        tokens: of every run.
        rates: multiples of each optimizer's own rate that are tried first.
        moves: how often the grid may move outward.
        seeds: of the runs that count.
        folder: of the sweep.
        settings: further overrides of train.py, the same for all.
    """

    optimizers: tuple[str, ...]
    model: str
    tokens: int
    rates: tuple[float, ...]
    moves: int
    seeds: tuple[int, ...]
    folder: Path
    settings: tuple[str, ...] = ()

    def command(self, optimizers: Sequence[str], rates: Iterable[float], seeds: Iterable[int]) -> list[str]:
        """The sweep that adds these runs to the folder; the optimizers want one `embedding_scale`."""
        return [
            f"optimizer={','.join(optimizers)}",
            f"optimizer.lr_scale={','.join(f'{rate:g}' for rate in rates)}",
            f"seed={','.join(map(str, seeds))}",
            *(f"optimizer.roles.embedding.lr_scale={scale}" for scale in {*map(embedding_scale, optimizers)} if scale),
            f"model={self.model}",
            f"trainer.max_tokens={self.tokens}",
            "trainer.accelerator=cpu",
            "trainer.num_threads=1",
            f"trainer.val_every_n_steps={max(1, self.tokens // TOKENS_PER_STEP)}",
            "evaluation=none",
            "jobs_per_device=2",
            *self.settings,
            f"hydra.sweep.dir={self.folder}",
        ]


def jobs_of(study: Study) -> dict[str, dict[float, dict[int, Job]]]:
    """What the folder holds: optimizer, multiple of its rate, seed."""
    found: dict[str, dict[float, dict[int, Job]]] = defaultdict(lambda: defaultdict(dict))
    for job in of_sweep(study.folder).jobs if study.folder.is_dir() else ():
        asked = dict(override.split("=", 1) for override in job.overrides if "=" in override)
        rate, seed = float(asked.get("optimizer.lr_scale", 1)), int(asked.get("seed", TUNING_SEED))
        found[asked.get("optimizer", job.optimizer)][rate][seed] = job
    return found


def losses(by_rate: Mapping[float, Mapping[int, Job]]) -> dict[float, float]:
    """Final loss of each rate on the tuning seed, rates ascending; infinite where the run did not come to its end."""
    tried = {rate: runs[TUNING_SEED] for rate, runs in sorted(by_rate.items()) if TUNING_SEED in runs}
    return {rate: math.inf if job.loss is None else job.loss for rate, job in tried.items() if job.state in ENDS}


def best_rate(found: Mapping[float, float]) -> float | None:
    """The rate of the lowest loss; None where no run came to its end."""
    rate = min(found, key=lambda rate: found[rate], default=None)
    return None if rate is None or math.isinf(found[rate]) else rate


def beyond(found: Mapping[float, float]) -> list[float]:
    """Rates to try next: beyond the edge where the best lies, below all where none came to its end; else none."""
    best, low, high = best_rate(found), min(found), max(found)
    if best is None or best == low:
        return [low / step for step in FURTHER]
    return [high * step for step in FURTHER] if best == high else []


def embedding_scale(optimizer: str) -> float | None:
    """The embedding's multiple of the rate; None where the rule gives embeddings a norm of their own (Scion)."""
    roles = yaml.safe_load((ROOT / "conf" / "optimizer" / f"{optimizer}.yaml").read_text())["roles"]
    if "radius" in roles.get("embedding", {}):
        return None
    return round(EMBEDDING * roles["default"].get("lr_scale", 1.0), 6)


def run_all(study: Study) -> int:
    """Every run that is missing; 0, or the exit code of a sweep that was refused or stopped."""

    def missing(rates: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> int:
        alike: dict[Any, list[str]] = defaultdict(list)
        for name, wanted in rates.items():
            if wanted:
                alike[tuple(wanted), embedding_scale(name)].append(name)
        codes = (run(study.command(names, wanted, seeds)) for (wanted, _), names in alike.items())
        return next(filter(None, codes), 0)

    if code := missing(dict.fromkeys(study.optimizers, study.rates), [TUNING_SEED]):
        return code
    for _ in range(study.moves):
        jobs = jobs_of(study)
        further = {name: beyond(losses(jobs[name])) for name in study.optimizers if losses(jobs[name])}
        if code := missing(further, [TUNING_SEED]):
            return code
    jobs = jobs_of(study)
    best = {name: best_rate(losses(jobs[name])) for name in study.optimizers}
    return missing({name: [rate] for name, rate in best.items() if rate}, study.seeds)


def standing(study: Study) -> tuple[list[dict[str, Any]], str]:
    """One row per optimizer, best first, and who won in words."""
    jobs = jobs_of(study)
    cells, rates = {}, {}
    for name in study.optimizers:
        rates[name] = best_rate(losses(jobs[name]))
        fresh = jobs[name].get(rates[name], {}) if rates[name] else {}
        cells[name] = Cell(tuple(job for seed, job in fresh.items() if seed in study.seeds))
    noise = pooled(cells.values())
    ranked = sorted((name for name in study.optimizers if cells[name].n), key=lambda name: cells[name].mean)
    left = [name for name in study.optimizers if not cells[name].n]
    rows = [row(name, jobs[name], rates[name], cells, ranked, noise) for name in (*ranked, *left)]
    return rows, verdict(ranked, cells, noise)


def row(
    name: str,
    by_rate: Mapping[float, Mapping[int, Job]],
    rate: float | None,
    cells: Mapping[str, Cell],
    ranked: Sequence[str],
    noise: Noise | None,
) -> dict[str, Any]:
    """What one optimizer did."""
    cell, every = cells[name], [job for runs in by_rate.values() for job in runs.values()]
    states = [job.state for job in every]
    found = {
        "optimizer": name,
        "best lr": cell.rate if cell.jobs else None,
        "x its own": rate,
        "at an edge": "yes" if rate is not None and rate in (min(by_rate), max(by_rate)) else "",
        "loss, nats": _digits(cell.mean) if cell.n else None,
        "+-": None if cell.std is None else _digits(cell.std),
        "n": cell.n,
        "behind": None,
        "told apart from the best": "",
        "like momentum or worse": "",
        "state bytes": _middle(cell, "optimizer_state_bytes"),
        "runs": sum(state in ENDS for state in states),
        "diverged": states.count("DIVERGED"),
        "failed": states.count("FAILED"),
    }
    if cell.n and name != ranked[0]:
        to_best = gap(cells[ranked[0]], cell, noise)
        found["behind"] = _digits(to_best.value)
        found["told apart from the best"] = {"beyond": "beyond noise", "inside": "no"}.get(to_best.judgement, "unknown")
    if cell.n and name != REFERENCE and REFERENCE in ranked:
        to_reference = gap(cell, cells[REFERENCE], noise)
        beats = to_reference.value > 0 and to_reference.judgement != "inside"
        found["like momentum or worse"] = "" if beats else "yes"
    return found


def _middle(cell: Cell, key: str) -> int | None:
    values = [value for job in cell.finished if (value := job.run.summary.get(key)) is not None]
    return round(median(values)) if values else None


def verdict(ranked: Sequence[str], cells: Mapping[str, Cell], noise: Noise | None) -> str:
    """Who won, in words, and who cannot be told apart from the winner."""
    if not ranked:
        return "No run with a fresh seed has come to its end."
    first, *others = ranked
    level = [name for name in others if gap(cells[first], cells[name], noise).judgement == "inside"]
    words = f"Lowest: {first}, {cells[first].mean:.4f} nats (n = {cells[first].n})"
    words += f"; not told apart from it: {', '.join(level)}." if level else ", beyond noise below all others."
    if noise is None:
        return f"Lowest: {first}; without repeated seeds nothing says what is noise."
    return f"{words} Standard deviation between seeds, pooled: {math.sqrt(noise.variance):.4f}."


def tuning(study: Study) -> list[dict[str, Any]]:
    """Loss at every rate that was tried."""
    jobs = jobs_of(study)
    found = {name: losses(jobs[name]) for name in study.optimizers}
    rates = sorted({rate for losses in found.values() for rate in losses})
    return [
        {"optimizer": name, **{f"x {rate:g}": _shown(losses.get(rate)) for rate in rates}}
        for name, losses in found.items()
    ]


def tuned_table(study: Study, name: str, source: str) -> str | None:
    """For `lightning_opt/plan/tuned/<name>.yaml`, in place of the model's table there, which gives all but the rate.

    None where no fresh run came to its end.
    """
    by_rate = jobs_of(study)[name]
    rate = best_rate(losses(by_rate))
    cell = Cell(tuple(job for seed, job in by_rate.get(rate, {}).items() if seed in study.seeds)) if rate else Cell(())
    if not cell.n:
        return None
    used = tuned(name, study.model, "any")
    always = {key: value for key, value in used.values.items() if key != "optimizer.lr"} if used else {}
    if scale := embedding_scale(name):
        always["optimizer.roles.embedding.lr_scale"] = scale
    return f"""\
- source: {source}
  measured: ours
  tokens: {study.tokens}
  always: {json.dumps(always).replace('"', "")}
  columns: [loss, optimizer.lr]
  cells:
    {study.model}/any: [{_digits(cell.mean)}, {cell.rate:.4g}]
"""


def _shown(loss: float | None) -> str | None:
    return None if loss is None else "no end" if math.isinf(loss) else _digits(loss)


def _digits(nats: float) -> str:
    return f"{nats:.4f}"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pico", help="of conf/model (pico)")
    parser.add_argument("--optimizers", nargs="+", default=list_optimizers(), metavar="NAME", help="(all rules)")
    parser.add_argument("--tokens", type=int, default=819200, help="of each run, 2048 a step (819200: 400 steps)")
    parser.add_argument("--seeds", type=int, default=len(FRESH_SEEDS), help="fresh ones at the best rate (3)")
    parser.add_argument("--moves", type=int, default=MOVES, help="how often the grid may move outward (2)")
    parser.add_argument("--folder", type=Path, help="of the runs (runs/compare/MODEL-TOKENS)")
    parser.add_argument("--quick", action="store_true", help="femto, two optimizers, two rates, two seeds, 4 steps")
    parser.add_argument("--table", action="store_true", help="runs nothing: the table of what is there")
    parser.add_argument("--values", action="store_true", help="as --table, and prints what plan/tuned would take")
    parser.add_argument("--out", type=Path, help="folder of the page (benchmarks/results)")
    return parser.parse_args()


def study_of(args: argparse.Namespace) -> Study:
    """What the command line asks for."""
    model, tokens = ("femto", 8192) if args.quick else (args.model, args.tokens)
    folder = args.folder or ROOT / "runs" / "compare" / f"{model}-{tokens}"
    seeds = tuple(range(1, args.seeds + 1))
    if args.quick:
        quiet = ("trainer.val_sequences=8", "trainer.log_every_n_steps=1")
        return Study(("lion", "momentum"), model, tokens, (1.0, 2.0), 0, (1, 2), folder.resolve(), quiet)
    names = tuple(dict.fromkeys(args.optimizers))
    return Study(names, model, tokens, RATES, args.moves, seeds, folder.resolve())


def main() -> int:
    """Runs what is missing and writes the page; the exit code of a sweep that was refused or stopped."""
    args = options()
    study, where = study_of(args), machine()
    code = 0 if args.table or args.values else run_all(study)
    rows, words = standing(study)
    steps = f"{study.tokens:,} tokens a run, one seed to choose the rate, {len(study.seeds)} fresh seeds"
    tables = [
        Table(f"Final validation loss on {study.model}", rows, f"{words} {steps}."),
        Table("Rates", tuning(study), "Final loss by multiple of the optimizer's own rate."),
    ]
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    page = Page("compare_optimizers", "Which optimizer learns most from the same tokens?", about, tables)
    suffix = "-quick" if args.quick else f"-{study.model}-{study.tokens}"
    kept = keep(page, where, args.out, suffix=suffix, more=bool(code))
    for name in study.optimizers if args.values else ():
        print(f"# {name}.yaml\n{tuned_table(study, name, f'benchmarks/results/{kept.name}')}")
    return code


if __name__ == "__main__":
    sys.exit(main())
