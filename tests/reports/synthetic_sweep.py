"""Made-up sweeps whose losses follow a closed form, so that every number of a comparison can be computed beside it.

A run of final loss ``F`` validates every 100 of its 800 steps at ``F + FALL * (1 - step / 800)``: a straight line, so
it crosses a target ``T`` at step ``800 * (1 - (T - F) / FALL)`` exactly, whatever the points between.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from synthetic_run import build_run, config, env, evaluation, plan

from lightning_opt.run_folder import RunFolder, SweepFolder, SweepJob, job_name

STEPS, PER_STEP, FALL = 800, 2048, 2.0
LR = {"adamw": 0.004, "lion": 0.0004, "muon": 0.02, "soap": 0.003}
STATE_BYTES = {"adamw": 8, "lion": 4}
MS = {"adamw": 150.0, "lion": 140.0, "muon": 165.0}


def rows(final: float, ms: float, until: int = STEPS, seed: int = 0) -> list[dict[str, float]]:
    """One logged row every 10 steps; validation on the straight line, training loss noisy around a steeper start."""
    noise = random.Random(seed)
    found = []
    for step in range(10, until + 1, 10):
        line = final + FALL * (1 - step / STEPS)
        row = {"step": step, "tokens": step * PER_STEP, "time_s": step * ms / 1000}
        row |= {"train/loss": line + 3 * math.exp(-step / 60) + noise.gauss(0, 0.06), "step_ms": ms}
        row |= {"tokens_per_s_per_device": PER_STEP / ms * 1000, "optimizer_ms": 0.04 * ms, "optimizer_share": 0.04}
        row |= {"memory_peak_bytes": 655_000_000, "optimizer_state_bytes": 8_000_000}
        if step % 100 == 0:
            row["val/loss"] = line
        found.append(row)
    return found


def job_config(optimizer: str, scale: float, seed: int = 1234, **optimizer_changes: Any) -> dict[str, Any]:
    changed = config()
    changed["optimizer"] |= {"name": optimizer, "lr": LR.get(optimizer, 0.001), "lr_scale": scale, **optimizer_changes}
    return changed | {"seed": seed, "name": f"{optimizer}_nano"}


def build_job(folder: Path, optimizer: str, final: float, scale: float = 1.0, seed: int = 1234, **changes: Any) -> Path:
    """A run folder; ``state``, ``step``, ``reason``, ``ms``, ``plan``, ``env`` and others may be changed."""
    state, step = changes.get("state", "FINISHED"), changes.get("step", STEPS)
    ms = changes.get("ms", MS.get(optimizer, 150.0))
    planned = plan() | {"optimizer": optimizer, "name": f"{optimizer}_nano", "seed": seed} | changes.get("plan", {})
    status = {"state": state, "step": step, "reason": changes.get("reason"), "config_hash": "1a2b3c4d"}
    build_run(
        folder,
        config=changes.get("config", job_config(optimizer, scale, seed)),
        plan=planned,
        env=env() | changes.get("env", {}),
        status=status | {"owner": changes.get("owner", {})},
        evaluation=changes.get("evaluation", evaluation() if state == "FINISHED" else None),
        overrides=changes.get("overrides", [f"optimizer={optimizer}", f"optimizer.lr_scale={scale:g}"]),
        events=[],
        rows=rows(final, ms, step // 10 * 10, seed + round(1000 * final)),
    )
    if changes.get("report", True):
        (folder / "report.html").write_text("the job's own report")
    return folder


def build_sweep(folder: Path, jobs: list[dict[str, Any]], command: str = "train.py -m optimizer=adamw,lion") -> Path:
    """A sweep folder. Each job: ``optimizer``, ``final``, and what `build_job` takes; ``final`` None never started."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, job in enumerate(jobs):
        job = {"scale": 1.0, "seed": 1234, **job}
        overrides = [f"optimizer={job['optimizer']}", f"optimizer.lr_scale={job['scale']:g}", f"seed={job['seed']}"]
        overrides = [*job.get("overrides", overrides), *job.get("more", [])]
        differs = {"optimizer": job["optimizer"], "optimizer.lr_scale": job["scale"], "seed": job["seed"]}
        place = folder / job_name(differs, f"{number:08x}")
        if job["final"] is not None:
            rest = {key: value for key, value in job.items() if key not in ("optimizer", "final", "more", "command")}
            build_job(place, job["optimizer"], job["final"], **rest | {"overrides": overrides})
        listed.append(SweepJob(RunFolder(place), f"{number:08x}", overrides, differs, job.get("command", "")))
    SweepFolder(folder).write(command, ["optimizer", "optimizer.lr_scale"], listed)
    (folder / "status.json").write_text(json.dumps({"state": "RUNNING", "owner": {}}))
    return folder
