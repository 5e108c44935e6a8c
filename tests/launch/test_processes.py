"""The pool's parts on their own."""

import os
import subprocess
import sys

import pytest

from lightning_opt.launch.processes import Places


def test_places_are_given_out_one_by_one_and_come_back():
    places = Places(["0", "1"], 2)
    assert places.count == 4
    assert [places.take(1) for _ in range(5)] == [["0"], ["1"], ["0"], ["1"], None]
    places.give_back(["1"])
    assert places.take(2) is None
    places.give_back(["0"])
    assert sorted(places.take(2)) == ["0", "1"]


def test_a_job_larger_than_the_machine_takes_all_of_it():
    assert Places([]).take(2) == ["cpu"]
    places = Places(["0", "1"])
    assert places.take(8) == ["0", "1"]
    assert places.take(1) is None


# Asks the server, as it is once everything is imported, from a child.
_ASK = """
import os, sys
from lightning_opt.launch import processes, sweep

def ask():
    import torch
    threads = len(os.listdir(f"/proc/{os.getppid()}/task"))
    loaded = {*sweep.PRELOAD, *sweep.PRELOAD_TO_SCORE} <= set(sys.modules)
    cuda = torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork()
    print("server", threads, loaded, cuda, os.environ.get("OPENBLAS_NUM_THREADS"), flush=True)
    return 0

if __name__ == "__main__":
    processes.start_server([*sweep.PRELOAD, *sweep.PRELOAD_TO_SCORE])
    print(processes.Pool(processes.Places([])).run([processes.Task("", ask)]), processes.visible_devices())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_server_imports_everything_but_starts_no_thread_and_no_cuda(tmp_path, repository):
    (tmp_path / "ask.py").write_text(_ASK)
    environment = {**os.environ, "PYTHONPATH": str(repository), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("OPENBLAS_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "ask.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.stdout == "server 1 True False None\n{0: 0} []\n", done.stderr


# What ends a whole group, as `timeout` and Slurm do, must not end the server: the jobs' exit codes would go with it.
_MASK = """
from multiprocessing import forkserver
from pathlib import Path
from lightning_opt.job.signals import STOP_SIGNALS
from lightning_opt.launch import processes

if __name__ == "__main__":
    processes.start_server([])
    lines = Path(f"/proc/{forkserver._forkserver._forkserver_pid}/status").read_text().splitlines()
    mask = int(next(line.split()[1] for line in lines if line.startswith("SigBlk")), 16)
    print([number.name for number in STOP_SIGNALS if not mask >> (number - 1) & 1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_server_is_born_deaf_to_what_ends_a_group(tmp_path, repository):
    (tmp_path / "mask.py").write_text(_MASK)
    done = subprocess.run(
        [sys.executable, "mask.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "[]\n", done.stderr


_UNTIL = """
import functools, time
from lightning_opt.launch import processes

def work(end):
    while time.monotonic() < end:
        time.sleep(0.05)
    return 0

if __name__ == "__main__":
    processes.start_server([])
    end = time.monotonic() + 5
    pool = processes.Pool(processes.Places([]), until=end)
    print(pool.run([processes.Task("", functools.partial(work, end)) for _ in range(3)]))
    print(processes.Pool(processes.Places([]), until=end).run([processes.Task("", functools.partial(work, end))]))
"""


def test_what_runs_when_the_time_is_over_may_finish_and_nothing_more_starts(tmp_path, repository):
    (tmp_path / "until.py").write_text(_UNTIL)
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "until.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.stdout == "{0: 0}\n{}\n", done.stderr
