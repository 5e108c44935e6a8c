"""`train.py` with jobs that do not train: a job's seed says what it does. Its processes import this file as well."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning_opt.job
from lightning_opt.job.signals import Terminated, terminable
from lightning_opt.launch import main, processes, sweep
from lightning_opt.run_folder import RunFolder, Status, SweepFolder, config_hash, write_json

DIVERGES, BREAKS, IS_KILLED, CRASHES, BREAKS_ONCE, IS_MISCONFIGURED, WAITS = 503, 599, 609, 611, 620, 502, 700


def run(config: dict[str, Any], folder: RunFolder, **_: Any) -> int:
    seed = config["seed"]
    began = time.time()
    tries = folder.path / "tries.jsonl"
    first = not tries.exists()
    seen = {
        "pid": os.getpid(),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "path": os.environ.get("PYTHONPATH"),
        "server": os.getppid(),
    }
    with tries.open("a") as file:
        file.write(json.dumps({**seen, "began": began, "tty": sys.stdout.isatty()}) + "\n")
    with Status(folder.status, config_hash(config)) as status, terminable():
        try:
            print(f"seed {seed} speaks", flush=True)
            if seed == BREAKS or (seed == BREAKS_ONCE and first):
                raise RuntimeError("a job that breaks")
            if seed == IS_KILLED:
                os.kill(os.getpid(), signal.SIGKILL)
            if seed == CRASHES:
                faulthandler._sigsegv()
            if seed >= WAITS:
                time.sleep((seed - WAITS) / 10)
            state, code = {DIVERGES: ("DIVERGED", 3), IS_MISCONFIGURED: ("FAILED", 2)}.get(seed, ("FINISHED", 0))
            status.set(state, "as told" if code else None)
        except Terminated:
            status.set("PREEMPTED", "stopped by SIGTERM")
            return 143
        except KeyboardInterrupt:
            status.set("PREEMPTED", "interrupted")
            return 130
    loss = seed / 100 + abs(math.log2(config["optimizer"].get("lr_scale", 1)))
    write_json(folder.summary, {"val_loss": loss})
    with (folder.path / "ended").open("w") as file:
        file.write(str(time.time()))
    return code


def draw(folder: Path) -> None:
    """One line for each time, of the jobs' states; the file ``broken`` makes it fail."""
    with Path("reported").open("a") as file:
        file.write(" ".join(str(job.state) for job in SweepFolder(folder).jobs()) + "\n")
    if Path("broken").exists():
        raise RuntimeError("no page")


if __name__ != "fake_train":  # as the tests import it
    lightning_opt.job.__dict__["run"] = run
sweep.PRELOAD, sweep.PRELOAD_TO_SCORE = ("lightning_opt.launch.sweep",), ()  # nothing heavy
sweep.LOOK_S = 0.1
processes.visible_devices = lambda: [name for name in os.environ.get("FAKE_GPUS", "").split(",") if name]


if __name__ == "__main__":
    with contextlib.suppress(FileNotFoundError):
        Path("reported").unlink()
    reports = sys.modules["lightning_opt.reports"] = type(sys)("lightning_opt.reports")
    reports.write_sweep = draw  # type: ignore[attr-defined]
    reports.sweep_lines = lambda folder: [f"table of {folder}"]  # type: ignore[attr-defined]
    lightning_opt.reports = reports  # type: ignore[attr-defined]
    sys.exit(main(sys.argv[1:]))
