"""pass@k against counting all draws, and the real set's own solutions against its own tests."""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path
from typing import Any

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
def test_programs_run_ahead_score_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ran, run = [], sandbox.Rooms.run
    monkeypatch.setattr(sandbox.Rooms, "run", lambda self, some, *told: ran.append(len(some)) or run(self, some, *told))
    completions = [
        ["return 1", "return 2", "return 1"],
        ["x", "return 2", "x"],
        ["return 3", "return 3", "while True: 0"],
    ]
    problems = [
        {"prompt": "def f(): ", "test": f"def check(f): assert f() == {k}", "entry_point": "f"} for k in (1, 2, 3)
    ]

    def scores() -> list[dict[str, float]]:
        made = humaneval.build_predictions(completions, problems)
        tests = [f"{problem['test']}\ncheck(f)" for problem in problems]
        return [humaneval.pass_at_k([test], [some], [1, 3], 1.0) for test, some in zip(tests, made, strict=True)]

    one_by_one = scores()
    assert ran == [3, 3, 3]
    assert [found["pass@1"] for found in one_by_one] == pytest.approx([2 / 3, 1 / 3, 2 / 3])
    with humaneval.all_at_once(1.0):
        assert scores() == one_by_one
    assert ran == [3, 3, 3, 9]
    with humaneval.all_at_once(2.0):  # not what is asked for
        assert humaneval.pass_at_k(["check(f)"], [["def f(): 0\ndef check(f): 0"]], 1, 1.0) == {"pass@1": 1.0}
    assert ran[-1] == 1


# What a model might write instead of a solution, as the end of a function's body.
EVIL = {
    "endless": "    while True: pass\n",
    "forks": "    import os\n    while True:\n        try: os.fork()\n        except OSError: pass\n",
    "ten gigabytes": "    return [0] * (10 * 2**30 // 8)\n",
    "leaves": "    import os\n    os._exit(0)\n",
    "leaves politely": "    raise SystemExit(0)\n",
    "removes all": "    import shutil\n    shutil.rmtree('/', ignore_errors=True)\n",
    "opens a socket": "    import socket\n    socket.create_connection(('127.0.0.1', 9))\n",
    "reads a key": "    import os\n    return os.environ['HF_TOKEN']\n",
    "asks": "    return input()\n",
    "floods": "    import sys\n    while True: sys.stdout.write('x' * 2**20)\n",
    "kills": "    import os\n    os.kill(-1, 9)\n    os.kill(os.getppid(), 9)\n",
}


def problems_of(shared_data: Path) -> tuple[list[dict[str, Any]], list[str]]:
    problems = list(read_documents(find_file(shared_data / "eval", "humaneval.jsonl.gz")))
    assert len(problems) == 82
    return problems, [f"{item['test']}\ncheck({item['entry_point']})" for item in problems]


def share(problems: list[dict[str, Any]], tests: list[str], bodies: list[str], seconds: float = 5.0) -> float:
    programs = humaneval.build_predictions([[body] for body in bodies], problems)
    return humaneval.pass_at_k(tests, programs, [1], seconds=seconds)["pass@1"]


def broken(solution: str) -> str:
    """The set's own solution with every answer replaced by one that no test expects."""
    return re.sub(r"\breturn\b.*", "return object()", solution)


@pytest.mark.skipif(not ISOLATED, reason=WHY)
@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_real_solutions_pass_and_broken_ones_do_not(shared_data: Path, every: int) -> None:
    problems, tests = (part[::every] for part in problems_of(shared_data))
    solutions = [item["canonical_solution"] for item in problems]
    assert share(problems, tests, solutions) == 1.0
    assert share(problems, tests, [broken(solution) for solution in solutions]) == 0.0
    assert share(problems, tests, ["    pass\n" for _ in problems]) == 0.0
    assert share(problems, tests, ["" for _ in problems]) == 0.0


@pytest.mark.skipif(not ISOLATED, reason=WHY)
def test_evil_completions_of_a_real_problem_are_contained(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fails by itself, leaves no process behind, and the solution after it passes."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (problem, *_), (test, *_) = problems_of(shared_data)
    rooms = sandbox.shared(sandbox.Limits(seconds=1.0)).rooms
    for room in rooms:
        room.start()
    users = {room.user for room in rooms}
    for name, body in EVIL.items():
        assert share([problem], [test], [body], seconds=1.0) == 0.0, name
        left = [entry for entry in os.scandir("/proc") if entry.name.isdigit() and entry.stat().st_uid in users]
        assert left == [], name
        assert share([problem], [test], [problem["canonical_solution"]], seconds=1.0) == 1.0, name
    mixed = [problem["canonical_solution"], *EVIL.values()]
    programs = [[problem["prompt"] + body for body in mixed]]
    assert humaneval.pass_at_k([test], programs, [1], seconds=1.0) == {"pass@1": pytest.approx(1 / len(mixed))}
