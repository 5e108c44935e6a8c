"""What does a sweep cost over its jobs? Twenty jobs of about ten seconds, beside the same jobs in one process.

    python -m benchmarks.sweep_overhead                  about 25 minutes on 2 quiet cores
    python -m benchmarks.sweep_overhead --at-once 2      two jobs side by side
    python -m benchmarks.sweep_overhead --quick          does it run here?

*sweep*: wall time of the whole command `python train.py -m`, from start to exit: it checks every job, starts the
server that imports everything once, forks each job from it, draws the comparison. *jobs alone*: the same jobs one after
the other in one process that has done one of them before, so that nothing is imported, compiled or built for the first
time there; of each, from its checked configuration to its finished report; their sum, divided by how many run at once.
The tokenised texts lie ready for both.
*over* is sweep / jobs alone - 1. Both train one thread per job, so that two at once do not share a core where there are
two; no job is scored. The first round finds how many steps take the time that is asked for.

Where the sweep's time goes is read from the run folders: *before* is from the start of the command to the first job's
configuration on disk, *between* from the end of one to the configuration of the next (the sum of all), *after* from the
last job's report to the exit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import Page, Table, keep, machine
from benchmarks.turns import spread

ROOT = Path(__file__).resolve().parents[1]
GOAL = 0.10  # the issue's
WARM_STEPS = 50
SETTINGS = (
    "model=femto",
    "trainer.accelerator=cpu",
    "trainer.num_threads=1",
    "trainer.val_sequences=16",
    "evaluation=none",
    "~tuned",
)


def command(seeds: range, steps: int, *more: str) -> list[str]:
    """The words of a sweep over these seeds."""
    return ["-m", f"seed={','.join(map(str, seeds))}", *SETTINGS, f"trainer.max_steps={steps}", *more]


def in_one_process(jobs: int, steps: int, name: str) -> dict[str, Any]:
    """Runs the jobs here, one more before them; what each took, and each step of the training alone."""
    from lightning_opt import job
    from lightning_opt.launch import main
    from lightning_opt.run_folder import SweepFolder, read_json

    times, run = [], job.run

    def timed(*arguments: Any, **keywords: Any) -> int:
        begin = time.perf_counter()
        try:
            return run(*arguments, **keywords)
        finally:
            times.append(time.perf_counter() - begin)

    job.__dict__["run"] = timed
    words = command(range(jobs + 1), steps, "hydra/launcher=basic", f"hydra.sweep.dir={name}")
    if code := main(words):
        raise RuntimeError(f"the jobs ended with exit code {code}")
    summaries = [read_json(one.folder.summary) for one in SweepFolder(Path(name)).jobs()[1:]]
    return {"times": times[1:], "step": statistics.median(one["seconds"] / steps for one in summaries)}


def alone(jobs: int, steps: int, folder: Path, name: str) -> dict[str, Any]:
    """`in_one_process` in a process of its own."""
    out = folder / f"{name}.json"
    words = ["--part", str(out), "--name", name, "--jobs", str(jobs), "--steps", str(steps)]
    _run(["-m", "benchmarks.sweep_overhead", *words], folder)
    return json.loads(out.read_text(encoding="utf-8"))


def sweep(jobs: int, steps: int, at_once: int, folder: Path, name: str) -> dict[str, float]:
    """A sweep of the jobs: its wall time, and where it went."""
    from lightning_opt.run_folder import SweepFolder

    words = command(range(1, jobs + 1), steps, f"jobs_per_device={at_once}", f"hydra.sweep.dir={name}")
    since, begin = time.time(), time.perf_counter()
    _run([str(ROOT / "train.py"), *words], folder)
    wall, until = time.perf_counter() - begin, time.time()
    places = [one.folder for one in SweepFolder(folder / name).jobs()]
    spans = sorted((one.config.stat().st_mtime, one.report_html.stat().st_mtime) for one in places)
    if len(spans) != jobs:
        raise RuntimeError(f"{len(spans)} of {jobs} jobs were run")
    gaps = sum(max(0.0, later[0] - earlier[1]) for earlier, later in itertools.pairwise(spans))
    ends = max(end for _, end in spans)
    found = {"wall": wall, "before": spans[0][0] - since, "after": until - ends}
    return found | ({"between": gaps} if at_once == 1 else {})


def _run(words: list[str], folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        )


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """All rounds, the order of the two turned round each time."""
    steps = args.steps
    if steps is None:
        steps = max(1, round(args.seconds / alone(1, WARM_STEPS, folder, "warm")["step"]))
    rounds = []
    for number in range(args.rounds):
        if number % 2:
            swept = sweep(args.jobs, steps, args.at_once, folder, f"swept-{number}")
            lone = alone(args.jobs, steps, folder, f"alone-{number}")
        else:
            lone = alone(args.jobs, steps, folder, f"alone-{number}")
            swept = sweep(args.jobs, steps, args.at_once, folder, f"swept-{number}")
        floor = sum(lone["times"]) / args.at_once
        one = {"job": statistics.median(lone["times"]), "jobs alone": floor, **swept, "steps": steps}
        rounds.append({**one, "over": swept["wall"] / floor - 1})
        print(f"round {number + 1}: {rounds[-1]}", flush=True)
    return rounds


def page_of(args: argparse.Namespace, rounds: list[dict[str, float]]) -> Page:
    """What was found."""
    row: dict[str, Any] = {
        "jobs": args.jobs,
        "at once": args.at_once,
        "steps of a job": round(rounds[0]["steps"]),
        "rounds": len(rounds),
    }
    names = {
        "job": "a job alone, s",
        "jobs alone": "jobs alone, s",
        "wall": "sweep, s",
        "over": "over",
        "before": "before, s",
        "between": "between, s",
        "after": "after, s",
    }
    row |= {shown: spread([one[name] for one in rounds]) for name, shown in names.items() if name in rounds[0]}
    middle = statistics.median(one["over"] for one in rounds)
    verdict = "met" if middle < GOAL else "missed"
    row["goal"] = f"below {GOAL:g}: {verdict}" if args.jobs == 20 else None
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    title = "What does a sweep cost over its jobs?"
    return Page(
        "sweep_overhead", title, about, [Table("A sweep and its jobs", [row], "Medians (10-90 %) of the rounds.")]
    )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20, help="of the sweep (20)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of training in each (10)")
    parser.add_argument("--steps", type=int, help="of training in each, in place of --seconds")
    parser.add_argument("--at-once", type=int, default=1, help="jobs side by side (1)")
    parser.add_argument("--rounds", type=int, default=3, help="(3)")
    parser.add_argument("--quick", action="store_true", help="two jobs of two steps, once")
    parser.add_argument("--out", type=Path, help="folder of the page (benchmarks/results)")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)  # a process of its own: where its times go
    parser.add_argument("--name", default="alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.jobs, args.steps, args.rounds = 2, 2, 1
    return args


def main() -> None:
    """Measures and writes the page."""
    args = options()
    if args.part:
        args.part.write_text(json.dumps(in_one_process(args.jobs, args.steps, args.name)), encoding="utf-8")
        return
    where = machine()
    with tempfile.TemporaryDirectory() as folder:
        rounds = measure(args, Path(folder))
    suffix = "-quick" if args.quick else f"-{args.at_once}" if args.at_once > 1 else ""
    keep(page_of(args, rounds), where, args.out, suffix=suffix)


if __name__ == "__main__":
    main()
