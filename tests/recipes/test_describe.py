"""The page of every optimizer: written from its files, fresh, and what its costs say."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from lightning_opt.optim.catalogue import OPTIMIZERS
from lightning_opt.optim.costs import _Counter, costs
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
        assert part in text
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


def half(cuts: int) -> float:
    """What is left of a product with a triangular or symmetric matrix after so many cuts."""
    return (1 + 2.0**-cuts) / 2


def both_triangular(cuts: int) -> float:
    """Of two triangular ones: two of half the side, one triangular and one whole product of the quarters."""
    return (2 * both_triangular(cuts - 1) + half(cuts - 1) + 1) / 8 if cuts else 1.0


def test_soap_costs_what_its_products_cost():
    """m x n: two pairs of turns of 2 (m + n) per weight and Gram matrices; with the QR two pairs, L A and QR more."""
    m, n = 512, 2048  # cut twice and four times
    found = costs("soap", (m, n))
    every = 4 * (m + n) + 2 * (m * half(2) + n * half(4))
    qr = 4 * (m + n) + (2 + 8 / 3) * (m**3 + n**3) / (m * n)
    assert found.least == pytest.approx(every, rel=2e-3)
    assert found.most == pytest.approx(every + qr, rel=2e-3)
    assert found.operations == pytest.approx(1.80e4, rel=2e-3)


def test_kron_costs_what_its_products_cost():
    """Four turns of 2 m or 2 n; a fit: two turns, two solves, four Gram matrices and a product with either factor."""
    m, n = 512, 2048
    found = costs("kron", (m, n))
    turn = m * half(2) + n * half(4)
    fit = 6 * turn + (m + n) + 2 * (m**3 * both_triangular(2) + n**3 * both_triangular(4)) / (m * n)
    assert found.least == pytest.approx(4 * turn, rel=2e-3)
    assert found.most == pytest.approx(4 * turn + fit, rel=5e-3)
    assert found.operations == pytest.approx(4 * turn + 0.03 * fit, rel=2e-3)


def test_products_in_place_count_as_the_others():
    a, b = torch.empty(3, 8, 8, device="meta"), torch.empty(3, 8, 5, device="meta")
    of_three = 3 * 2 * 8 * 8 * 5
    products = {
        "baddbmm": (lambda: torch.baddbmm(a, b, b.mT), of_three),
        "baddbmm_": (lambda: a.baddbmm_(b, b.mT, beta=0.5, alpha=2), of_three),
        "bmm, out": (lambda: torch.bmm(b, b.mT, out=a), of_three),
        "addmm_": (lambda: a[0].addmm_(b[0], b[0].mT), of_three / 3),
    }
    for name, (product, right) in products.items():
        with _Counter() as counter:
            product()
        assert counter.operations == right, name


def test_a_heading_inside_a_block():
    assert "## Traps\n\nAs Muon's" in describe.page("normuon")
    assert "## Tuning\n\nLook at" in describe.page("dynamic")


@pytest.mark.parametrize("name", describe.names())
def test_every_section_opens_with_a_capital(name):
    openings = re.findall(r"^#+ .*\n\n(.*)|^# (.*)", describe.page(name), flags=re.MULTILINE)
    assert openings
    assert not [line for found in openings for line in found if line[:1].islower()]


def test_the_list_says_what_each_does():
    cells = re.findall(r"^\| \[\w+\]\(\w+\.md\) \| (.*?) \|", describe.index(), flags=re.MULTILINE)
    assert len(cells) == len(describe.names())
    assert not [cell for cell in cells if cell[:1].islower()]


def test_an_optimizer_made_of_rules_names_them():
    text = describe.page("scion_study")
    assert "- default: [signum](signum.md), momentum 0.98" in text
    assert "- matrix: [muon](muon.md), momentum 0.95, nesterov false, ns_steps 10" in text
    assert "- start, until 30000: [lion](lion.md), lr_scale 0.1, weight_decay 1.0" in describe.page("lion_adamw_lion")


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
