"""The recipe for somebody else's project, as they would run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

NOT_NEEDED = {
    "hydra",
    "omegaconf",
    "transformers",
    "lm_eval",
    "grain",
    "datasets",
    "matplotlib",
    "psutil",
    "jinja2",
    "yaml",
    "rich",
}
ROOMS = {"launch", "job", "training", "models", "data", "evaluation", "reports", "run_folder"}
CALLBACKS = {
    "lightning_opt.callbacks",
    *(f"lightning_opt.callbacks.{name}" for name in ("stability", "batches", "telling")),
}

# Lightning imports much by itself, so it counts who asks: each import statement is noted with the file it stands in.
WATCHED = """
import builtins, importlib, json, runpy, sys
asked = []
importing, by_name = builtins.__import__, importlib.import_module
def note(name, frame):
    asked.append([name, frame.f_code.co_filename])
def watched(name, globals=None, locals=None, fromlist=(), level=0):
    note(name, sys._getframe(1))
    return importing(name, globals, locals, fromlist, level)
def watched_by_name(name, package=None):
    note(name, sys._getframe(1))
    return by_name(name, package)
builtins.__import__, importlib.import_module = watched, watched_by_name
runpy.run_path(sys.argv[1], run_name="__main__")
print("ASKED", json.dumps(asked))
print("MODULES", json.dumps(sorted(sys.modules)))
"""


def watched_run(script: Path, repository: Path, cwd: Path) -> tuple[str, set[str], set[str]]:
    """What it prints, the modules that the script's and our files ask for, and all modules there are at its end."""
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WATCHED, str(script)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    printed, rest = done.stdout.split("ASKED ")
    asked, modules = rest.split("MODULES ")
    ours = (str(repository / "lightning_opt"), str(script))
    return printed, {name for name, file in json.loads(asked) if file.startswith(ours)}, set(json.loads(modules))


def test_it_runs_learns_and_imports_nothing_else_of_ours(repository: Path, tmp_path: Path) -> None:
    printed, asked, modules = watched_run(repository / "recipes" / "your_own_lightning.py", repository, tmp_path)
    first, last = map(float, re.search(r"loss (\S+) -> (\S+)", printed).groups())
    assert first > 3
    assert last < 0.5
    assert "'grad_norm'" in printed
    assert {"torch", "lightning.pytorch", "lightning_opt.optim.lion", "lightning_opt.callbacks.stability"} <= asked
    assert not {name.split(".")[0] for name in asked} & NOT_NEEDED
    assert not modules & {f"lightning_opt.{room}" for room in ROOMS}
    assert {name for name in modules if name.startswith("lightning_opt.callbacks")} == CALLBACKS
    assert "torch._inductor.compile_fx" not in modules  # so few parameters must not wait for a compiler


def test_the_watch_sees_what_lightning_imported_before(repository: Path, tmp_path: Path) -> None:
    script = tmp_path / "greedy.py"
    script.write_text("import lightning.pytorch\nimport transformers, yaml\n")
    _, asked, _ = watched_run(script, repository, tmp_path)
    assert asked & NOT_NEEDED == {"transformers", "yaml"}


def test_it_fits_on_a_screen(repository: Path) -> None:
    lines = (repository / "recipes" / "your_own_lightning.py").read_text().splitlines()
    code = [line for line in lines if line.strip() and not line.strip().startswith(('"""', "#"))]
    assert len(code) <= 30
