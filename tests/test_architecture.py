"""The floors of the house: who may import whom, what stays light, and what no package may hold."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest


def test_imports_run_one_way(repository: Path) -> None:
    # in a process of its own: it switches off every logger that exists
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--config", str(repository / "pyproject.toml"), "--no-cache"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("lightning_opt.plan", ("torch", "numpy", "hydra")),
        ("lightning_opt.run_folder", ("torch", "hydra")),
        ("lightning_opt.launch", ("torch", "lightning", "transformers")),
        ("lightning_opt.reports", ("torch", "lightning")),
        ("lightning_opt.study", ("torch", "lightning", "hydra", "matplotlib")),
        ("lightning_opt.optim", ("lightning", "transformers", "hydra")),
        ("lightning_opt.callbacks", ("hydra", "lightning_opt.optim", "lightning_opt.training", "lightning_opt.models")),
        ("lightning_opt.job", ("torch", "lightning", "hydra")),
        ("lightning_opt.evaluation", ("torch", "lm_eval")),
        ("lightning_opt.data", ("torch", "grain", "datasets")),
        ("lightning_opt.checkpoints", ("torch", "lightning", "transformers", "hydra")),
    ],
)
def test_a_room_imports_only_what_it_needs(module: str, absent: tuple[str, ...], repository: Path) -> None:
    """Every public name is imported too where that is promised to stay light."""
    code = f"""
import sys, importlib
room = importlib.import_module({module!r})
light = ("plan", "run_folder", "study", "optim", "callbacks")
if {module!r} in [f"lightning_opt.{{name}}" for name in light]:
    [getattr(room, name) for name in room.__all__]
print([name for name in {absent!r} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=repository, check=True)
    assert result.stdout.strip() == "[]"


def test_no_file_has_a_name_that_says_nothing(repository: Path) -> None:
    nothing = {"utils.py", "common.py", "helpers.py", "misc.py"}
    assert not [path for path in (repository / "lightning_opt").rglob("*.py") if path.name in nothing]


def test_no_optimizer_overrides_step() -> None:
    """Law 3: the base owns the only step."""
    from lightning_opt import optim

    classes = [getattr(optim, name) for name in optim.OPTIMIZERS.values()]
    assert len(classes) >= 2
    for cls in classes:
        assert inspect.unwrap(cls.step) is inspect.unwrap(optim.Optimizer.step)  # torch wraps it at first use


def test_train_py_fits_on_a_screen(repository: Path) -> None:
    assert len((repository / "train.py").read_text(encoding="utf-8").splitlines()) <= 40
