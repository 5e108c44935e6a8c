"""Article 4's picture: our optimizers' paths against plain numpy written for this test, and the page with all of it."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

from lightning_opt.reports.canvas import Figure
from recipes.rosenbrock_paths import page, problems
from recipes.rosenbrock_paths.__main__ import RATES, main

STEPS = 200


def slope(point):
    x, y = point
    return np.array([2 * (x - 1) - 400 * x * (y - x * x), 200 * (y - x * x)])


def descent(point, rate):
    while True:
        point = point - rate * slope(point)
        yield point


def adamw(point, rate, beta1=0.9, beta2=0.999, eps=1e-8):
    mean, square, t = np.zeros(2), np.zeros(2), 0
    while True:
        g, t = slope(point), t + 1
        mean, square = beta1 * mean + (1 - beta1) * g, beta2 * square + (1 - beta2) * g * g
        point = point - rate * (mean / (1 - beta1**t)) / (np.sqrt(square / (1 - beta2**t)) + eps)
        yield point


def muon(point, rate, mu=0.95):
    """Of a 1 x 2 matrix only its length is left to Newton-Schulz: five times a quintic polynomial of it."""
    total = np.zeros(2)  # the sum instead of the mean: a factor that the length forgets
    while True:
        g = slope(point)
        total = mu * total + g
        ahead = g + mu * total
        norm = np.hypot(*ahead)
        length = norm / (norm + 1e-7 / (1 - mu))
        for _ in range(5):
            length = 3.4445 * length - 4.7750 * length**3 + 2.0315 * length**5
        point = point - rate * length * ahead / norm
        yield point


WRITTEN_ANEW = {"sgd": descent, "adamw": adamw, "muon": muon}


@pytest.mark.parametrize("rule", WRITTEN_ANEW)
def test_the_path_is_that_of_plain_numpy(rule):
    problem = problems.comparison(RATES)
    (contestant,) = [one for one in problem.contestants if one.rule == rule]
    ours = problems.walk(problem, contestant, RATES[rule]).points
    numbers = WRITTEN_ANEW[rule](np.array([-1.5, 2.5]), RATES[rule])
    theirs = np.stack([np.array([-1.5, 2.5]), *(next(numbers) for _ in range(STEPS))])
    assert ours.shape == (STEPS + 1, 2)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
    assert np.abs(theirs[-1] - theirs[0]).max() > 0.1  # it went somewhere


def test_each_idea_shows_its_worth():
    """At the rates that the page found best; a factor of room, for other machines' rounding."""
    last = {}
    for problem in problems.others():
        for contestant in problem.contestants:
            if (problem.key, contestant.rule) in RATE:
                path = problems.walk(problem, contestant, RATE[problem.key, contestant.rule])
                last[problem.key, contestant.rule] = path.scores[-1] - problem.floor
    for better, worse in WORTH:
        assert last[better] < 0.7 * last[worse], (better, worse)


RATE = {
    ("ravine", "sgd"): 10 ** (-5 / 3),
    ("ravine", "momentum"): 0.01,
    ("ravine", "adamw"): 10 ** (1 / 3),
    ("ravine", "soap"): 1.0,
    ("saddle", "sgd"): 0.1,
    ("saddle", "adamw"): 10 ** (-1 / 3),
    ("saddle", "lion"): 10 ** (-1 / 3),
    ("rare_words", "sgd"): 10 ** (1 / 3),
    ("rare_words", "adagrad"): 10 ** (-1 / 3),
    ("matrix", "adamw"): 10 ** (-2 / 3),
    ("matrix", "muon"): 10 ** (-1 / 3),
    ("matrix", "soap"): 10 ** (-1 / 3),
}
WORTH = [
    (("ravine", "momentum"), ("ravine", "sgd")),
    (("ravine", "soap"), ("ravine", "adamw")),
    (("saddle", "adamw"), ("saddle", "sgd")),
    (("saddle", "lion"), ("saddle", "sgd")),
    (("rare_words", "adagrad"), ("rare_words", "sgd")),
    (("matrix", "muon"), ("matrix", "adamw")),
    (("matrix", "soap"), ("matrix", "adamw")),
]


def test_no_two_optimizers_of_the_page_share_a_colour(monkeypatch, tmp_path):
    seen = {}

    def note(key, title, caption, *rest, **_):
        seen[key] = rest[4] if key.endswith("paths") else rest[2]
        return Figure(key, title, "<svg></svg>", caption)

    monkeypatch.setattr(page.landscapes, "paths", note)
    monkeypatch.setattr(page.landscapes, "scores", note)
    monkeypatch.setattr(
        page.problems, "best_walk", lambda problem, one: problems.Path(one, 1.0, np.zeros((1, 2)), [1.0])
    )
    page.write(tmp_path, RATES)
    assert len(seen) == 8
    colours = seen["ravine-paths"]
    assert all(one == colours for one in seen.values())
    contestants = [problems.comparison(RATES), *problems.others()]
    labels = {one.label for problem in contestants for one in problem.contestants}
    assert len({colours[label] for label in labels}) == len(labels) == 8


def test_the_page_and_the_picture(tmp_path, capsys):
    assert main(["--quick", "--out", str(tmp_path / "new" / "folder")]) == 0
    written = tmp_path / "new" / "folder" / "index.html"
    assert capsys.readouterr().out.strip() == str(written)
    text = written.read_text()
    assert text.count("<svg") == 2
    for name in ("SGD", "AdamW", "Muon"):
        assert name in text
    assert not re.search(r"(?:src|href)=\"http", text)
    assert (written.parent / "optimizer_comparison.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("sgdd=1", "did you mean sgd?"),
        ("sgd", "NAME=RATE"),
        ("sgd=-1", "must be a number > 0"),
    ],
)
def test_a_wrong_rate_is_refused_in_one_line(given, said, capsys, tmp_path):
    assert main(["--rates", given, "--out", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert not (tmp_path / "none").exists()


def test_help_needs_no_torch(repository):
    code = """
import sys
from recipes.rosenbrock_paths.__main__ import main
try:
    main(["--help"])
except SystemExit:
    print("torch" in sys.modules, "matplotlib" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False False")
