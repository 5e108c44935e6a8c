"""The part about experts: the picture is of the counts in the folder, small, and in the page's own colours."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from html_page import Page

from lightning_opt import reports
from lightning_opt.reports import experts
from lightning_opt.reports.style import COLOURS

Make = Callable[..., Path]


def save(path: Path, counts: np.ndarray, sizes: list[int], top_k: int = 2) -> np.ndarray:
    n, layers, _ = counts.shape
    np.savez_compressed(
        path,
        steps=10 * np.arange(1, n + 1),
        counts=counts,
        grad_norm=np.zeros(counts.shape),
        experts=np.array(sizes),
        top_k=np.full(layers, top_k),
        layers=np.array([f"model.layers.{i}.mlp" for i in range(layers)]),
    )
    return counts


def drawn(n: int, layers: int, size: int) -> np.ndarray:
    counts = np.random.default_rng(0).poisson(100, (n, layers, size))
    counts[:, 0, 1] = 0
    return counts


@pytest.fixture
def run(make_run: Make, tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def test_the_page_shows_the_counts_of_the_folder(run: Path) -> None:
    counts = save(run / "expert_load.npz", drawn(30, 3, 8), [8, 8, 8])
    reports.write(run)
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert page.faults == []
    rows = page.tables["expert-load"][1:]
    for number, row in enumerate(rows):
        last = counts[-1, number]
        assert row[:2] == [f"model.layers.{number}.mlp", "8"]
        assert float(row[2]) == pytest.approx(last.std() / last.mean(), rel=5e-3)
        assert float(row[3]) == pytest.approx(np.sqrt((8 - 2) / last.sum()), rel=5e-2)
        assert float(row[4]) == pytest.approx(last.max() / last.mean() - 1, rel=5e-3)
        assert int(row[6]) == (number == 0)
    assert "Expert load" in (run / "report.md").read_text()


def test_a_model_without_experts_has_no_such_part(run: Path) -> None:
    reports.write(run)
    assert "Expert load" not in (run / "report.html").read_text()


def test_the_picture_marks_who_has_more_and_less_than_a_share(tmp_path: Path) -> None:
    counts = np.array([[[8, 0, 4, 4], [3, 3, 0, 0]]] * 4)  # 2, 0, 1, 1 times the mean; a layer of two is even
    save(tmp_path / "x.npz", counts, [4, 2])
    figure = experts.heat_map("heat", experts.read_history(tmp_path / "x.npz"))
    strokes = re.findall(r'stroke: var\(--(indigo|bad)\)[^"]*', figure.svg)
    assert sorted(strokes) == ["bad", "indigo"]  # one line of each, all along
    lines = re.findall(r'd="M ([\d.]+) ([\d.]+) \s*L ([\d.]+) ([\d.]+) \s*"', figure.svg)
    long = [tuple(map(float, line)) for line in lines if float(line[2]) - float(line[0]) > 300]
    assert len(long) >= 2
    assert figure.numbers[0][1:3] == ("0.707", "0.707")
    assert figure.numbers[1][1:3] == ("0", "0")


def test_many_experts_are_ranked_and_the_picture_stays_small(tmp_path: Path) -> None:
    save(tmp_path / "x.npz", drawn(257, 45, 128), [128] * 45, 8)
    figure = experts.heat_map("heat", experts.read_history(tmp_path / "x.npz"))
    assert len(figure.svg) < 60_000
    assert "hottest to the coldest" in figure.caption
    used = set(re.findall(r"var\(--(\w+)\)", figure.svg))
    assert used <= set(COLOURS)
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", figure.svg)


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 cut off"])
def test_a_broken_file_does_not_take_the_report_with_it(run: Path, content: bytes) -> None:
    (run / "expert_load.npz").write_bytes(content)
    reports.write(run)
    page = (run / "report.html").read_text()
    assert "This part could not be drawn" in page
    assert json.loads((run / "summary.json").read_text())["name"] in page
