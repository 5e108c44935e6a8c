"""Models side by side: the tests against scipy's, pairing by documents, and what the page says."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from lightning_opt.reports import downstream, downstream_page
from lightning_opt.reports.downstream_page import write_scores


def result(folder: Path, right: dict[str, list[float]], bits: float = 2.0, **entry: Any) -> Path:
    """A results folder: for each task of lm-eval the score of each document."""
    tasks: dict[str, list[float]] = {}
    for name, values in right.items():
        tasks.setdefault("mmlu" if name.startswith("mmlu_") else name, []).extend(values)
    block: dict[str, Any] = {"suite": "full", "comparable": False}
    for task, values in tasks.items():
        mean = sum(values) / len(values)
        about = {"metric": "acc", "value": mean, "stderr": (mean * (1 - mean) / len(values)) ** 0.5, "n": len(values)}
        about |= {"shots": 0, "chance": 0.25, "majority": 0.26, "truncated": 0, "comparable": False, "why_not": "few"}
        block[task] = about | {"bits_per_byte": bits, "bits_per_byte_stderr": 0.1} | entry
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"summary": block}))
    draw = random.Random(len(folder.name))
    records = [
        {"task": name, "doc": place, "hash": f"{name}{place}", "acc": value, "bits_per_byte": bits + draw.random()}
        for name, values in right.items()
        for place, value in enumerate(values)
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "documents.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 0), (3, 9), (40, 60), (700, 600), (9000, 9300)])
def test_mcnemar_is_the_exact_binomial_test(wins: int, losses: int) -> None:
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert downstream.mcnemar(wins, losses) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [*range(2, 21), 4000])
def test_paired_t_is_scipys(n: int) -> None:
    """Few documents too: there the normal distribution calls noise a difference."""
    draw = random.Random(n)
    for shift in (0.0, 0.02, 0.5, 3.0):
        first = [draw.gauss(0, 1) for _ in range(n)]
        second = [one + draw.gauss(shift, 0.5) for one in first]
        gaps = [a - b for a, b in zip(first, second, strict=True)]
        found = downstream.paired_t(sum(gaps) / n, stats.sem(gaps), n)
        assert found == pytest.approx(stats.ttest_rel(first, second).pvalue, rel=1e-8)


def test_without_an_error_there_is_no_p_value() -> None:
    assert downstream.paired_t(0.0, 0.0, 5) == 1.0
    assert downstream.paired_t(0.5, 0.0, 5) is None
    assert downstream.paired_t(0.5, None, 1) is None


def test_five_documents_of_noise_are_no_difference(tmp_path: Path) -> None:
    """Differences with X scipy's test of five pairs; the normal distribution would say 0.02."""
    models = []
    for name, bits in (("a", [2.0, 2.6, 2.9, 2.2, 2.4]), ("b", [2.0, 2.0, 2.2, 2.1, 2.3])):
        folder = result(tmp_path / name, {"piqa": [1.0] * 5})
        records = [{"task": "piqa", "doc": n, "hash": str(n), "bits_per_byte": one} for n, one in enumerate(bits)]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "documents.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        models.append(downstream.read_judged(name, folder))
    (found,) = downstream.differences(models, ["piqa"])
    assert found.p == pytest.approx(stats.ttest_rel([2.0, 2.6, 2.9, 2.2, 2.4], [2.0, 2.0, 2.2, 2.1, 2.3]).pvalue)
    assert found.p > 0.05
    assert 2 * stats.norm.sf(found.value / found.stderr) < 0.05
    assert found.better == ""


def test_p_values_of_a_page_are_adjusted_together() -> None:
    given = [0.01, 0.04, 0.03, 0.005]
    made = [downstream.Difference(str(n), "acc", "a", "b", 1.0, 1.0, p, 10) for n, p in enumerate(given)]
    # By hand, Holm: 0.005 x 4, 0.01 x 3, 0.03 x 2, then the largest so far.
    assert [one.adjusted for one in downstream._holm(made)] == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_only_documents_that_both_were_asked_are_compared(tmp_path: Path) -> None:
    one = downstream.read_judged("a", result(tmp_path / "a", {"piqa": [1.0] * 30}))
    two = downstream.read_judged("b", result(tmp_path / "b", {"piqa": [0.0] * 10 + [1.0] * 5}))
    found = downstream.difference("piqa", "acc", one, two)
    assert found is not None
    assert (found.n, found.unlike, found.only_first, found.only_second) == (15, 15, 10, 0)
    assert found.value == pytest.approx(10 / 15)
    assert downstream.difference("piqa", "acc", one, downstream.Judged("c", {}, {})) is None


def test_same_accuracy_with_other_errors_is_no_difference(tmp_path: Path) -> None:
    one = downstream.read_judged("a", result(tmp_path / "a", {"piqa": [1.0, 0.0] * 50}))
    two = downstream.read_judged("b", result(tmp_path / "b", {"piqa": [0.0, 1.0] * 50}))
    found = downstream.differences([one, two], ["piqa"])
    assert [item.p for item in found if item.metric == "acc"] == [1.0]
    assert [item.better for item in found if item.metric == "acc"] == [""]


def test_lower_bits_are_better(tmp_path: Path) -> None:
    one = downstream.read_judged("a", result(tmp_path / "a", {"piqa": [1.0] * 60}, bits=1.0))
    two = downstream.read_judged("bb", result(tmp_path / "bb", {"piqa": [1.0] * 60}, bits=2.0))
    found = {item.metric: item for item in downstream.differences([one, two], ["piqa"])}
    assert found["bits_per_byte"].better == "a"
    assert found["acc"].better == ""


def test_broken_and_other_suites_are_not_compared(tmp_path: Path) -> None:
    one = downstream.read_judged("a", result(tmp_path / "a", {"piqa": [1.0] * 60}))
    two = downstream.read_judged("b", result(tmp_path / "b", {"piqa": [0.0] * 60}, degenerate=True))
    assert downstream.differences([one, two], ["piqa"]) == []
    three = downstream.Judged("c", one.scores, one.entries, one.records, suite="mini")
    assert downstream.differences([one, three], ["piqa"]) == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["runs/a/x", "runs/b/x"], ["a/x", "b/x"]),
        (["runs/a/x", "runs/a/y"], ["x", "y"]),
        (["x", "x"], ["x (1)", "x (2)"]),
        (["m"], ["m"]),
        (["runs/lion/20261123T174216Z-b70293fb", "runs/adamw/20261123T174057Z-d235fdae"], ["lion", "adamw"]),
        (
            ["runs/lion/20261123T174216Z-b70293fb", "runs/lion/20261123T174057Z-d235fdae", "my/model"],
            ["lion/20261123T174216Z-b70293fb", "lion/20261123T174057Z-d235fdae", "my/model"],
        ),
    ],
)
def test_labels_are_the_shortest_ends_that_differ(names: list[str], expected: list[str]) -> None:
    assert downstream.labels(names) == expected


def test_page_and_table_say_what_is_noise(tmp_path: Path) -> None:
    groups = {"lm-eval": {"stem": {"value": 0.5, "stderr": 0.1, "n": 40, "chance": 0.25, "majority": 0.3}}}
    good = result(tmp_path / "good", {"piqa": [1.0] * 80, "mmlu_anatomy": [1.0, 0.0] * 20}, bits=1.0, groups=groups)
    poor = result(tmp_path / "poor", {"piqa": [0.0] * 80, "mmlu_anatomy": [0.0, 1.0] * 20}, bits=1.0, groups=groups)
    write_scores(["x/good", "x/<poor>"], [good, poor], tmp_path / "out")
    text = (tmp_path / "out" / "scores.html").read_text()
    assert "good is better on PIQA" in text
    assert "inside the noise" in text
    assert "MMLU by lm-eval&#39;s groups" in text
    assert "<poor>" not in text
    assert "could not be drawn" not in text
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "scores.csv").read_text())))
    piqa = next(row for row in rows if row["kind"] == "difference" and row["task"] == "piqa" and row["metric"] == "acc")
    assert (piqa["better"], piqa["n"], piqa["only_first"], piqa["only_second"]) == ("good", "80", "80", "0")
    mmlu = next(row for row in rows if row["kind"] == "difference" and row["task"] == "mmlu" and row["metric"] == "acc")
    assert mmlu["better"] == ""
    assert {row["group"] for row in rows if row["kind"] == "group"} == {"lm-eval: stem"}
    assert [row["chance"] for row in rows if row["kind"] == "score" and row["metric"] == "acc"] == ["0.25"] * 4


def test_always_the_most_frequent_answer_is_no_better_than_chance() -> None:
    from lightning_opt.reports.scores import Score

    boolq = Score("boolq", "acc", 0.62, 0.0085, n=3270, chance=0.5, majority=0.622)
    assert boolq.judgement == "same"
    assert "always the most frequent answer" in boolq.words
    assert Score("boolq", "acc", 0.70, 0.0085, n=3270, chance=0.5, majority=0.622).judgement == "above"
    assert Score("piqa", "acc", 0.62, 0.0113, n=1838, chance=0.5, majority=0.505).judgement == "above"


def test_intervals_are_wider_where_documents_are_few() -> None:
    shown = [
        downstream_page._interval(downstream.Difference("t", "acc", "a", "b", 0.0, 1.0, 1.0, n), 1, 2)
        for n in (3, 9999)
    ]
    assert [line.split("[")[1] for line in shown] == ["\N{MINUS SIGN}4.30, +4.30]", "\N{MINUS SIGN}1.96, +1.96]"]
