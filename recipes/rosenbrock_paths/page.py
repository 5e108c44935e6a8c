"""One page with all pictures."""

from __future__ import annotations

from pathlib import Path

from lightning_opt.reports import landscapes
from lightning_opt.reports.canvas import Figure
from lightning_opt.reports.page import Section, render
from lightning_opt.reports.style import optimizer_colours
from recipes.rosenbrock_paths import problems
from recipes.rosenbrock_paths.problems import Problem

PICTURE = "optimizer_comparison.png"


def write(out: Path, rates: dict[str, float], *, quick: bool = False) -> Path:
    """Runs everything and writes ``optimizer_comparison.png`` and ``index.html``.

    Args:
        out: the folder; made where it is missing.
        rates: peak rate of each optimizer in the comparison.
        quick: the comparison alone.

    Returns:
        the page's path.
    """
    out.mkdir(parents=True, exist_ok=True)
    first, rest = problems.comparison(rates), problems.others()
    colours = optimizer_colours(one.label for problem in (first, *rest) for one in problem.contestants)
    sections = [_section(first, colours, out / PICTURE)]
    sections += [] if quick else [_section(problem, colours) for problem in rest]
    command = "python -m recipes.rosenbrock_paths"
    content = {
        "title": "Optimizers on small problems",
        "state": f"{len(sections)} problems" if len(sections) > 1 else "1 problem",
        "tone": "muted",
        "subtitle": "our optimizers themselves, in float64",
        "source": "paths that this command just walked",
        "reading": "How to read these pictures",
        "alarm_tone": "warn",
        "alarm": "",
        "verdict": (_VERDICT,),
        "cards": (),
        "notes": _NOTES,
        "sections": sections,
        "commands": (("All of this again:", command), ("At other rates:", f"{command} --rates sgd=0.001 muon=0.1")),
        "missing": (),
    }
    page = out / "index.html"
    page.write_text(render("report.html.j2", content), encoding="utf-8")
    return page


_VERDICT = "Each problem shows one difficulty at a time, and with it what one idea is good for."
_NOTES = (
    "A square marks the start, a star a minimum, a dot where a path ends; contours are spaced evenly by logarithm.",
    f"Rosenbrock's function is walked at fixed rates. On the others everybody has the best of the same "
    f"{len(problems.RATES)} rates, {problems.RATES[0]:.1g} to {problems.RATES[-1]:.0f}, by the score at the end, and "
    "the rate falls linearly to 0, but for the rare words, where it is constant.",
    "Two numbers or a thousand are no language model: what wins here need not win there; see the benchmarks for text.",
)


def _section(problem: Problem, colours: landscapes.Colours, png: Path | None = None) -> Section:
    walked = [problems.best_walk(problem, contestant) for contestant in problem.contestants]
    named = {walk.contestant.label: walk for walk in walked}
    drawn: list[Figure] = []
    if problem.height is not None:
        title = f"{problem.title}, {problem.steps} steps"
        points = {name: walk.points for name, walk in named.items()}
        surface, box, goals = problem.height, problem.box, problem.goals
        key = f"{problem.key}-paths"
        drawn.append(landscapes.paths(key, title, "", surface, box, points, goals, colours, png=png))
    ranked = sorted(named, key=lambda name: named[name].scores[-1])
    caption = f"Lowest at the end: {', then '.join(ranked)}."
    curves = {name: (walk.rate, walk.scores) for name, walk in named.items()}
    key, title = f"{problem.key}-scores", "Score by step"
    drawn.append(landscapes.scores(key, title, caption, "score", curves, colours, problem.floor))
    return Section(problem.key, problem.title, problem.idea, tuple(drawn))
