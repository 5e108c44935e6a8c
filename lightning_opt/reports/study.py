"""The page of a comparison study: ``report.html``, ``report.md`` and ``verdict.csv``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_opt.reports import quantities as q
from lightning_opt.reports import study_csv, study_duels, study_pictures, study_tables, study_verdict
from lightning_opt.reports.page import BROKEN, Section, guarded, render
from lightning_opt.reports.study_material import BY, Material, name_of
from lightning_opt.reports.study_matrix import matrix
from lightning_opt.run_folder.records import write_text

if TYPE_CHECKING:
    from lightning_opt.study.results import Cell, Results
    from lightning_opt.study.speedups import SpeedUp


def write(
    folder: Path,
    results: Results,
    speedups: Sequence[SpeedUp] = (),
    laws: Sequence[Mapping[str, Any]] = (),
    descents: Mapping[Cell, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> tuple[Path, Path, Path]:
    """Writes the study's page, the same as Markdown, and its verdict as a table.

    Everything in ``facts`` may be left out; what is not there is not shown, or shown as not measured.

    Args:
        folder: where the three files go; made where it is missing.
        results: losses, tuning runs, scores, costs.
        speedups: over the baseline, for each cell and each of tokens, time and memory; one that could not be had is in
            the list too, with a value that is not finite and a note that says why.
        laws: the rows of ``laws.csv`` as mappings: optimizer, params, fit_points, alpha, exponent, floor.
        descents: cell to the runs that tuned it: pairs of configuration and loss (inf = diverged), or an object that
            has them as ``tried``.
        facts: plain values.

            title, subtitle: words at the top.
            state: what the study has come to, in a few words; ``tone``: good, warn, bad or muted.
            source: what was read, for the foot of the page: ``run folders of NAME``, ``FILE.csv``.
            baseline: plain name of the baseline optimizer, ``adamw``.
            sigma: standard deviation of a final loss between seeds; ``sigma_origin``: where it comes from, in words;
            freedom: degrees of freedom of a pooled sigma, absent for a given one.
            paired: False where the n-th losses of two cells need not be of the same seed.
            level: of the intervals, 0.9. threshold: of the descent, nats.
            fit: the words for the ratios of the baseline's fit, ``1x to 8x``.
            refit: such words to the speed-ups with that fit instead, for what adding 16x changes.
            hyper_laws: laws of tuned hyperparameters, as `lightning_opt.study.tuned_laws` gives them.
            seeds: mapping of ``tuning`` and ``reporting`` to the seeds; validation: words on its two parts.
            centre: cell to the configuration around which ``results.tuning`` was recorded.
            curves: cell to ``tokens`` or ``time`` to a pair of lists, x (tokens, seconds) and loss, of its best run.
            cost: optimizer to runs, tokens, seconds (None where not known), diverged, capped (list of cells or words);
            cost_note: what is counted, in words.
            failures: mappings of optimizer, params, chinchilla, setting, state, reason.
            measures: cell to name to a tuple of values, one a seed, for the decision matrix: optimizer_ms,
            optimizer_state_bytes, loss_volatility, grad_norm_change, expert_load_cv.
            insensitive, sensitive: optimizer to mapping of hyperparameter to values, from `study.sensitivity`.
            commands: pairs of what it does and the command. notes: sentences. alarm: what must be said first.

    Returns:
        Paths of ``report.html``, ``report.md`` and ``verdict.csv``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = Material(results, tuple(speedups), tuple(laws), _tried(descents or {}), dict(facts or {}))
    content = report(about, folder)
    files = (folder / "report.html", folder / "report.md", folder / "verdict.csv")
    for path, text in zip(
        files,
        (render("report.html.j2", content), render("report.md.j2", content), study_csv.as_csv(about)),
        strict=True,
    ):
        write_text(path, text)
    return files


def _tried(descents: Mapping[Cell, Any]) -> dict[Cell, tuple[tuple[Mapping[str, Any], float], ...]]:
    found = {cell: getattr(record, "tried", record) for cell, record in descents.items()}
    return {cell: tuple(pairs) for cell, pairs in found.items() if isinstance(pairs, list | tuple)}


def report(about: Material, folder: Path) -> dict[str, Any]:
    """Everything the templates show of a study, as plain data."""
    facts = about.facts
    sections = [guarded(key, make, Section(key, title, BROKEN)) for key, title, make in _parts(about)]
    return {
        "title": str(facts.get("title") or _title(about)),
        "state": str(facts.get("state") or "a study"),
        "tone": str(facts.get("tone") or "muted"),
        "subtitle": str(facts.get("subtitle") or f"against {name_of(about.baseline)}"),
        "folder": folder.resolve().name,
        "source": str(facts.get("source") or about.results.source or "results handed over"),
        "reading": "How to read this verdict",
        "alarm_tone": "warn",
        "alarm": str(facts.get("alarm") or ""),
        "verdict": guarded("verdict", lambda: study_verdict.verdict(about), ("No verdict could be drawn.",)),
        "cards": guarded("cards", lambda: study_verdict.cards(about), ()),
        "notes": (*_notes(about), *map(str, facts.get("notes") or ())),
        "sections": [section for section in sections if section is not None],
        "commands": tuple((str(what), str(line)) for what, line in facts.get("commands") or ()),
        "missing": (),
    }


def _title(about: Material) -> str:
    others = [name_of(name) for name in about.optimizers if name != about.baseline]
    whom = ", ".join(others) if 0 < len(others) < 4 else f"{len(others)} optimizers"
    return f"{whom} against {name_of(about.baseline)}"


def _notes(about: Material) -> tuple[str, ...]:
    facts = about.facts
    seeds = facts.get("seeds")
    said = ["Only ends of schedules are compared: on the way, rates are still high and the order means little."]
    if isinstance(seeds, Mapping):
        used = "; ".join(f"{what} {q.text(list(found))}" for what, found in seeds.items())
        said.append(f"Seeds: {used}. The runs that are reported took no part in choosing the settings.")
    if facts.get("validation"):
        said.append(str(facts["validation"]))
    if facts.get("fit"):
        said.append(
            f"The baseline's law is fitted to its {facts['fit']} cells. "
            + (
                "Fitted to others, as with or without 16x, the speed-ups change: both are below."
                if facts.get("refit")
                else "Adding 16x to the fit would change the speed-ups: these results have no such cell."
            )
        )
    if facts.get("threshold") is not None:
        said.append(
            f"While tuning, a change was accepted that lowered the loss by {q.trimmed(facts['threshold'])} nats."
        )
    return tuple(said)


_Part = tuple[str, str, Callable[[], Section | None]]


def _parts(about: Material) -> tuple[_Part, ...]:
    return (
        ("losses", "Loss of every cell", lambda: _losses(about)),
        ("significance", "What is beyond noise, and what is not", lambda: _significance(about)),
        ("scores", "Scores", lambda: _scores(about)),
        ("speedups", "Speed-up over the baseline", lambda: _speedups(about)),
        ("curves", "Curves that cross", lambda: _curves(about)),
        ("sensitivity", "What the rate does", lambda: _sensitivity(about)),
        ("hyper-laws", "Laws of the tuned hyperparameters", lambda: _hyper_laws(about)),
        ("cost", "What the tuning cost", lambda: _cost(about)),
        ("failures", "Failed and diverged", lambda: _failures(about)),
        ("matrix", "Article 1's decision matrix", lambda: _matrix(about)),
    )


def _losses(about: Material) -> Section:
    intro = "" if about.places else "No cell has a final loss yet."
    return Section("losses", "Loss of every cell", intro, study_pictures.losses(about), (study_tables.losses(about),))


def _significance(about: Material) -> Section:
    title = "What is beyond noise, and what is not"
    found = study_duels.fronts(about)
    tables = (study_duels.lowest(about, found),) if found else ()
    gaps = study_duels.against_baseline(about)
    intro = "" if found else "Nothing to test: no place has two optimizers."
    return Section("significance", title, intro, tables=tables + ((gaps,) if gaps else ()))


def _scores(about: Material) -> Section:
    tasks = list(dict.fromkeys(task for found in about.results.scores.values() for task in found))
    tasks.sort(key=lambda task: not task.startswith("hellaswag"))
    if not tasks:
        return Section("scores", "Scores", f"HellaSwag and other tasks: {q.NOT_MEASURED}.")
    intro = "One run's accuracy is uncertain by its documents alone, and more by its seed: small gaps mean nothing."
    tables = tuple(study_tables.scores(about, task) for task in tasks)
    return Section("scores", "Scores", intro, study_pictures.scores(about, tasks[0]), tables)


def _speedups(about: Material) -> Section:
    title = "Speed-up over the baseline"
    measured = [by for by in BY if any(one.by == by for one in about.speedups)]
    missing = [BY[by] for by in BY if by not in measured]
    intro = f"By {' and by '.join(missing)}: {q.NOT_MEASURED} in these results." if missing else ""
    tables = [table for by in measured for table in study_tables.speedups(about, by)]
    laws = study_tables.laws(about)
    tables += [*study_tables.refits(about), *([laws] if laws else [])]
    return Section("speedups", title, intro, study_pictures.speedups(about), tuple(tables))


def _curves(about: Material) -> Section:
    drawn, table = study_pictures.crossing(about)
    if not drawn:
        return Section("curves", "Curves that cross", f"Loss on the way: {q.NOT_MEASURED} in these results.")
    intro = (
        "Who leads in the middle of a run need not lead at its end: a schedule's last part lowers some losses more "
        "than others. That is why only ends are compared."
    )
    return Section("curves", "Curves that cross", intro, drawn, (table,) if table else ())


def _sensitivity(about: Material) -> Section:
    drawn = study_pictures.rates(about)
    table = study_tables.steady(about)
    intro = "" if drawn else f"Loss over the rate: {q.NOT_MEASURED}; no cell has runs at two rates."
    if drawn and not about.tried and not about.facts.get("centre"):
        intro = (
            "Recorded changes of each tuned configuration. The table does not say which rate was the tuned one, so the "
            "lowest point of a curve is missing where it lay between the others."
        )
    return Section("sensitivity", "What the rate does", intro, drawn, (table,) if table else ())


def _hyper_laws(about: Material) -> Section:
    table = study_tables.hyper_laws(about)
    intro = (
        "h = A·N^B·C^c + D, of non-embedding parameters N and the data ratio C. The first and the last setting are "
        "left out of the fit and the last held against it. Tuned values sit on short grids, so that many of these laws "
        "hang on one or two changes of value: read what they miss before you believe one."
    )
    if table is None:
        intro = (
            "No law: one needs tuned configurations of six settings, of two sizes and two ratios at least. A replay "
            "takes them from tuned=FILE."
        )
    return Section("hyper-laws", "Laws of the tuned hyperparameters", intro, tables=(table,) if table else ())


def _cost(about: Material) -> Section:
    table = study_tables.cost(about)
    intro = "" if table else f"Runs, tokens and time of the tuning: {q.NOT_MEASURED} in these results."
    return Section("cost", "What the tuning cost", intro, tables=(table,) if table else ())


def _failures(about: Material) -> Section:
    table = study_tables.failures(about)
    known = about.facts.get("failures") is not None
    intro = "" if table else "None." if known else f"Failed runs: {q.NOT_MEASURED} in these results."
    return Section("failures", "Failed and diverged", intro, tables=(table,) if table else ())


def _matrix(about: Material) -> Section:
    intro = (
        "What GLM-4.5-Air's article weighs AdamW and Lion by, for every optimizer of this study, from measured cells "
        f"only; the rest is “{q.NOT_MEASURED}”."
    )
    return Section("matrix", "Article 1's decision matrix", intro, tables=(matrix(about),))
