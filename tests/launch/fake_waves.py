"""`run_jobs`, wave after wave in one process, with jobs that do not train. An argument is a wave: seeds, by commas."""

from __future__ import annotations

import sys

import fake_train

import lightning_opt.job
from lightning_opt.plan import ConfigError

lightning_opt.job.__dict__["run"] = fake_train.run  # its processes import this file as well


if __name__ == "__main__":
    from lightning_opt.launch import run_jobs

    for wave in sys.argv[1:]:
        lists = [[f"seed={seed}"] for seed in wave.split(",")]
        shared = ["evaluation=none", "jobs_per_device=2"]
        try:
            code = run_jobs(lists, "waves", words=["fake_waves.py", *sys.argv[1:]], shared=shared, draw=False)
        except ConfigError as error:
            print(error, flush=True)
            code = 2
        print(f"wave {wave}: {code}", flush=True)
        if code in (130, 143):
            sys.exit(code)
