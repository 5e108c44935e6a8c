"""The page of every optimizer: written from its files, fresh, and what its costs say."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lightning_opt.optim.catalogue import OPTIMIZERS
from lightning_opt.optim.costs import costs
from recipes import describe


@pytest.mark.parametrize("name", [*describe.names(), "README"])
def test_the_pages_are_fresh(name):
    written = (describe.PAGES / f"{name}.md").read_text(encoding="utf-8")
    made = describe.index() if name == "README" else describe.page(name)
    assert written == made, "python -m recipes.describe --write"


def test_there_is_no_page_of_something_that_is_gone():
    assert {file.stem for file in describe.PAGES.glob("*.md")} == {*describe.names(), "README"}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_page_says_what_it_must(name):
    text = describe.page(name)
    for part in ("## The rule", "## Tuning", "## Traps", "## What a step costs", "bound by"):
        assert part in text or (name, part) == ("normuon", "## Traps")  # not written yet
    if name in describe.names():
        assert "## Settings" in text


def test_operations_are_those_counted_by_hand():
    """Lion: two lerps of three, sign, rate, subtraction; SGD: rate, subtraction. Torch's own products for the rest."""
    assert costs("lion").operations == 3 + 1 + 1 + 3 + 1
    assert costs("sgd").operations == 2
    assert costs("adamw").state == {"float32": 8.0, "bfloat16": 6.0, "int8": pytest.approx(2 * (1 + 4 / 256))}


def test_newton_schulz_of_a_square_matrix_costs_three_products_a_step():
    """2 n^3 for each of X X^T, its square and the product with X, five times; per weight 30 n."""
    n = 256
    assert costs("muon", (n, n)).operations == pytest.approx(30 * n, rel=0.02)


def test_a_costly_step_now_and_then_is_counted_in_the_mean():
    found = costs("soap")
    assert found.least < found.operations < found.most
    assert found.operations == pytest.approx(0.9 * found.least + 0.1 * found.most, rel=1e-6)  # one in ten steps


def test_what_bounds_a_step():
    assert describe.bound(0.5).startswith("memory")
    assert describe.bound(1000).startswith("arithmetic:")
    assert describe.bound(100).startswith("arithmetic in float32, memory on tensor cores")


def test_an_unknown_name_is_refused_before_torch_loads(repository):
    code = "import sys; from recipes.describe import main; print(main(['lionn']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 False"
    assert done.stderr.strip().count("\n") == 0
    assert "did you mean lion?" in done.stderr
