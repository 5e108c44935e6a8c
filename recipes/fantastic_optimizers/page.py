"""The page: article 2's figures drawn again, from published data, from runs, or from both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import join
from typing import Any

from lightning_opt.reports.commands import shown_path
from lightning_opt.reports.page import Section, guarded, render
from lightning_opt.reports.study_duels import formula, fronts, lowest
from lightning_opt.reports.study_material import Material
from lightning_opt.reports.study_verdict import cards, verdict
from lightning_opt.reports.tables import Table
from lightning_opt.run_folder.records import write_text
from lightning_opt.study.replay import analyse, phase_two
from lightning_opt.study.results import read_results
from lightning_opt.study.significance import pooled
from lightning_opt.study.tuned import read_tuned
from recipes.fantastic_optimizers import curves as published_curves
from recipes.fantastic_optimizers import runs as own_runs
from recipes.fantastic_optimizers.figures import FIGURES, Source
from recipes.fantastic_optimizers.plans import planned

SIGMA = 3e-3
"""Standard deviation of a final loss between seeds, nats, where every cell was run once: the study's threshold."""


def published(results: Path, tuned: Path | None, curves: Path | None, out: Path) -> Source:
    """The published tables as a source of figures; ``speedups.csv`` and ``laws.csv`` go into ``out``.

    Raises:
        ConfigError: a file is not what it should be.
    """
    table = read_results(results)
    ways, twice = published_curves.read(curves) if curves else ({}, [])
    found = analyse(table, out, sigma=SIGMA)
    facts: dict[str, Any] = dict(found.facts)
    facts |= phase_two(table, read_tuned(tuned)) if tuned else {}
    facts["curves"] = {cell: {"tokens": curve} for cell, curve in ways.items()}
    if twice:
        cells = ", ".join(f"{cell.optimizer} {cell.params} {cell.chinchilla:g}x" for cell in twice)
        facts["notes"] = [
            *facts["notes"],
            f"{curves.name if curves else ''} holds two runs of {cells}: the lower is drawn.",
        ]
    return Source("published", "published", Material(table, tuple(found.speedups), tuple(found.laws), {}, facts))


def from_runs(paths: Sequence[Path], out: Path) -> tuple[Source, tuple[str, ...]]:
    """Run folders as a source of figures, and what of them belongs to no cell.

    Raises:
        FileNotFoundError: one of them is no folder.
        ConfigError: no run of the baseline is among them.
    """
    read = own_runs.read(paths)
    facts: dict[str, Any] = {"curves": read.curves, "paired": False}  # each run has the seeds that somebody gave it
    speedups: Sequence[Any] = ()
    laws: Sequence[Any] = ()
    if "adamw" in read.results.optimizers:
        noise = pooled(read.results.losses.values())
        found = analyse(read.results, out, sigma=noise or SIGMA)
        facts, speedups, laws = found.facts | facts, found.speedups, found.laws
    material = Material(read.results, tuple(speedups), tuple(laws), read.tried, facts)
    return Source("runs", "these runs", material), read.left_out


def write(out: Path, sources: Sequence[Source], command: Sequence[str], left_out: Sequence[str] = ()) -> Path:
    """Writes ``index.html`` and ``index.md``.

    Args:
        out: folder; made where it is missing.
        sources: where figures are drawn from.
        command: the words that draw this page again.
        left_out: runs that belong to no cell.

    Returns:
        The page's path.
    """
    out.mkdir(parents=True, exist_ok=True)
    sections = [_section(make, source) for make in FIGURES for source in sources]
    told = [verdict(source.material) for source in sources]
    named = [
        (f"{source.title.capitalize()}: {words[0]}", *words[1:]) for source, words in zip(sources, told, strict=True)
    ]
    content = {
        "title": "Fantastic pretraining optimizers, drawn again",
        "state": " and ".join(source.title for source in sources),
        "tone": "muted",
        "subtitle": "arXiv 2509.02046: each figure from the data at hand",
        "folder": out.resolve().name,
        "source": "files and folders named in the commands below",
        "reading": "How to read these figures",
        "alarm_tone": "warn",
        "alarm": "",
        "verdict": tuple(words for one in named for words in one),
        "cards": cards(sources[0].material),
        "notes": (*_NOTES, *(str(note) for source in sources for note in source.material.facts.get("notes") or ())),
        "sections": [*(_tests(source) for source in sources), *sections, _left(left_out), _missing(), _origin()],
        "commands": (("Draw all of this again", join(command)), *_commands()),
        "missing": (),
    }
    for name, template in (("index.html", "report.html.j2"), ("index.md", "report.md.j2")):
        write_text(out / name, render(template, content))
    return out / "index.html"


def _section(make: Callable[[Source], Section], source: Source) -> Section:
    one = replace(source, figure=make.__name__)
    title = f"{make.__name__} ({source.title})"
    return guarded(title, lambda: make(one), Section(f"{make.__name__}-{source.name}", title, "Could not be drawn."))


def _tests(source: Source) -> Section:
    about = replace(source.material, suffix=f"-{source.name}")
    found = fronts(about)
    tables = (lowest(about, found),) if found else ()
    intro = "" if found else f"No place has two optimizers. {formula(about)}"
    return Section(f"tests-{source.name}", f"What is beyond noise ({source.title})", intro, tables=tables)


_NOTES = (
    "Published losses are of C4 (English) at the end of training, one run for each cell: the spread between seeds is "
    f"not published, so sigma = {SIGMA:g} nats is an input, the threshold with which the study accepted a change.",
    "The study tuned every optimizer by itself, batch size among the rest, and matched tokens only; its wall times and "
    "memory are not published.",
    "HellaSwag's 10,042 questions leave a standard error of about 0.005 on every accuracy.",
)
_NOT_DRAWN = (
    (
        "AdamW at GPT-3's 6e-4",
        "its run is not in the published tables; the claim (tuned AdamW takes half the steps) is",
    ),
    (
        "520M and 1.2B",
        "drawn wherever the table given with --results has them; tables that hold 130M and 300M alone do not",
    ),
    ("Kron, Lion, Mars, Scion, Cautious, Adam-mini at 1.2B", "never run by the study"),
    ("Sophia at 300M and 520M beyond 1x", "grids are published, results are not"),
    ("SOAP's task scores at 1.2B", "not published"),
    ("speed-ups by wall time and memory", "not published; drawn from runs, which measure both"),
    ("the spread between seeds", "one run each was published; runs with several seeds replace the input sigma"),
    ("the paper's own fit coefficients and speed-up tables", "not at hand: all are fitted anew from the losses"),
    ("hyperparameter laws (appendix B.1)", "python -m recipes.study fits them anew; the printed ones are not at hand"),
)


def _missing() -> Section:
    rows = tuple(_NOT_DRAWN)
    return Section(
        "missing", "What cannot be drawn again, and why", "", tables=(Table("missing", "", ("what", "why"), rows),)
    )


def _left(left_out: Sequence[str]) -> Section:
    rows = tuple((text,) for text in left_out)
    intro = "" if rows else "Every run that was given has its place."
    return Section("left", "Runs left out", intro, tables=(Table("left", "", ("run",), rows),) if rows else ())


def _origin() -> Section:
    rows = (
        (
            "--results",
            "results.csv",
            "source, optimizer, params, chinchilla, metric, value: the study's result.json files",
        ),
        ("--tuned", "tuned_hparams.yaml", "optimizers: NAME: settings: 130m/1x: best: the tuned values of every cell"),
        (
            "--curves",
            "loss_curves.csv",
            "optimizer, params, chinchilla, step, tokens, c4en_loss: losses every 1000 steps",
        ),
    )
    intro = (
        "The three files are not part of this package. They are made from what the study published: the branch "
        "kaiyue/optimizers of github.com/marin-community/marin, commit 97cfef35 (experiments/optimizer_sweep/Analysis: "
        "Results, Phase tables; losses_all.pkl at commit 794a90cc for curves and task scores). A study of your own "
        "(python -m recipes.study) leaves a results.csv of the same columns."
    )
    table = Table("origin", "", ("option", "file", "what it holds"), rows)
    return Section("origin", "Where the files come from", intro, tables=(table,))


def _commands() -> tuple[tuple[str, str], ...]:
    besides = [one for one in planned() if one.why != "cells"]
    words = {"under_tuned": "AdamW at GPT-3's rate", "shared_decay": "at the decay of AdamW"}
    return (
        ("Tokenise the study's data once", "python -m recipes.prepare_data data=dclm_starcoder_proofpile"),
        ("The command of every cell", "python -m recipes.fantastic_optimizers --commands all"),
        ("The first cell, tuned as published", next(planned()).command),
        *((f"{one.cell.optimizer} {words[one.why]}, {one.cell.chinchilla:g}x", one.command) for one in besides),
        ("All of it from those runs", "python -m recipes.fantastic_optimizers --runs runs/*/*"),
        ("The fair comparison on a model of your own", "python -m recipes.study --help"),
    )


def again(options: dict[str, Any]) -> list[str]:
    """The words that draw the page again, paths as a command names them."""
    words = ["python", "-m", "recipes.fantastic_optimizers"]
    for name, value in options.items():
        if value:
            words += [f"--{name}", *(shown_path(Path(one)) for one in (value if isinstance(value, list) else [value]))]
    return words
