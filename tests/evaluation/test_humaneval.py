"""pass@k against counting all draws, and the real set's own solutions against its own tests."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from lightning_opt.evaluation import humaneval, sandbox
from lightning_opt.evaluation.suites import find_file, read_documents

ISOLATED, WHY = sandbox.available()


@pytest.mark.parametrize(("samples", "correct"), [(1, 0), (1, 1), (5, 0), (5, 2), (6, 3), (7, 6), (4, 4)])
def test_estimate_is_the_share_of_draws_with_a_right_program(samples: int, correct: int) -> None:
    programs = [index < correct for index in range(samples)]
    for k in range(1, samples + 1):
        draws = list(itertools.combinations(programs, k))
        assert humaneval.estimate_pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(("samples", "correct", "k"), [(1, 2, 1), (1, 0, 2), (3, -1, 1), (3, 1, 0)])
def test_impossible_counts_are_refused(samples: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        humaneval.estimate_pass_at_k(samples, correct, k)


def test_predictions_are_prompt_and_completion() -> None:
    made = humaneval.build_predictions([["a", "b"], ["c"]], [{"prompt": "1"}, {"prompt": "2"}])
    assert made == [["1a", "1b"], ["2c"]]


@pytest.mark.skipif(not ISOLATED, reason=WHY)
def test_pass_at_k_counts_programs() -> None:
    found = humaneval.pass_at_k(
        ["assert f() == 1", "assert f() == 1"], [["def f(): return 1", "x"], ["x", "y"]], [1, 2, 3]
    )
    assert found == {"pass@1": 0.25, "pass@2": 0.5}


@pytest.mark.skipif(not ISOLATED, reason=WHY)
def test_real_canonical_solutions_all_pass(shared_data: Path) -> None:
    problems = list(read_documents(find_file(shared_data / "eval", "humaneval.jsonl.gz")))
    assert len(problems) == 82
    tests = [f"{item['test']}\ncheck({item['entry_point']})" for item in problems]
    solved = humaneval.build_predictions([[item["canonical_solution"]] for item in problems], problems)
    assert humaneval.pass_at_k(tests, solved, [1]) == {"pass@1": 1.0}
    empty = humaneval.build_predictions([["    pass\n"] for _ in problems], problems)
    assert humaneval.pass_at_k(tests, empty, [1]) == {"pass@1": 0.0}
