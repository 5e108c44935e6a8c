"""Puts a run's report together and writes it: ``report.html``, ``report.md`` and ``MODEL_CARD.md``."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lightning_opt.reports import card, experts, figures, findings, markdown, settings, style, tables
from lightning_opt.reports import quantities as q
from lightning_opt.reports.canvas import Figure
from lightning_opt.reports.commands import next_commands
from lightning_opt.reports.reading import Run, read
from lightning_opt.reports.sampled import sampled_figures
from lightning_opt.reports.scores import Score, comparability, scores, suite
from lightning_opt.reports.tables import Table
from lightning_opt.run_folder import RunFolder
from lightning_opt.run_folder.records import write_text

log = logging.getLogger("lightning_opt.reports")

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        key: identifier in the page.
        title: heading.
        intro: one paragraph; empty for none.
        figures: drawn side by side, in this order.
        tables: below them.
        details: pairs of heading and preformatted text, folded in the page.
    """

    key: str
    title: str
    intro: str = ""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    details: tuple[tuple[str, str], ...] = ()


def write(folder: Path) -> None:
    """Writes the report of a run folder: ``report.html``, ``report.md`` and ``MODEL_CARD.md``.

    Only the folder is read; the same folder gives the same bytes. Missing files and empty measures are shown as such.

    Args:
        folder: a run folder.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(folder)
    run = read(folder)
    content = report(run)
    paths = RunFolder(folder)
    write_text(paths.report_html, render("report.html.j2", content))
    write_text(paths.report_md, render("report.md.j2", content))
    write_text(paths.model_card, render("card.md.j2", card.content(run, content["entries"])))


def report(run: Run) -> dict[str, Any]:
    """Everything the templates show of a run, as plain data."""
    entries = guarded("scores", lambda: scores(run), [])
    parts: list[tuple[str, Callable[[], Section]]] = [
        ("loss", lambda: _loss(run)),
        ("scores", lambda: _scores(run, entries)),
        ("speed", lambda: _speed(run)),
        ("stability", lambda: _stability(run)),
        *([("experts", lambda: _experts(run))] if _has_experts(run) else []),
        ("configuration", lambda: _configuration(run)),
        ("events", lambda: _events(run)),
        ("environment", lambda: Section("environment", "Environment", tables=(tables.environment(run),))),
    ]
    return {
        "title": run.name,
        "state": run.state,
        "tone": style.STATES.get(run.state, "muted"),
        "subtitle": f"{findings.optimizer_name(run)} · {findings.model_name(run)} · {findings.data_name(run)}",
        "folder": run.folder.resolve().name,
        "source": f"run folder {run.folder.resolve().name}",
        "reading": "How to read this run",
        "alarm_tone": style.STATES.get(run.state, "muted") if run.state != "FINISHED" else "bad",
        "alarm": findings.alarm(run, entries),
        "verdict": (guarded("verdict", lambda: findings.verdict(run, entries), "No verdict could be drawn."),),
        "cards": guarded("cards", lambda: findings.cards(run, entries), ()),
        "notes": guarded("notes", lambda: findings.notes(run, entries), ()),
        "sections": [guarded(key, make, Section(key, key.capitalize(), BROKEN)) for key, make in parts],
        "commands": guarded("commands", lambda: next_commands(run), ()),
        "missing": run.missing,
        "entries": entries,
    }


BROKEN = "This part could not be drawn from the files in the folder; the run's log says why."


def guarded(name: str, make: Callable[[], Any], otherwise: Any) -> Any:
    """What ``make`` returns; a part that a strange file breaks must not take the report, or the run, with it."""
    try:
        return make()
    except Exception:
        log.exception("the report's part %r could not be drawn", name)
        return otherwise


def render(template: str, content: dict[str, Any]) -> str:
    """Fills a template; everything from files is escaped for the format the template's name tells."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=lambda name: bool(name) and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"md": markdown.escape, "fence": markdown.fence, "quoted": json.dumps, "tight": tight}
    environment.globals |= {"markdown_table": markdown.table, "drawing": Markup, "not_measured": q.NOT_MEASURED}
    environment.globals |= {"light": style.css_variables(dark=False), "dark": style.css_variables(dark=True)}
    return environment.get_template(template).render(**content)


def tight(text: str) -> str:
    """The text with its units held to their numbers, so that no line breaks between them."""
    return re.sub(
        r"(?<=\d) (?=(?:ms|s|min|h|d|%|[KMG]iB|B)\b|%)|(?<=±) | (?=±)|(?<=\bn) (?==)|(?<=n =) ",
        "\N{NO-BREAK SPACE}",
        text,
    )


def _loss(run: Run) -> Section:
    train, val = run.series("train/loss"), run.series("val/loss")
    drawn = []
    if train[0] or val[0]:
        caption = "Training loss is one batch's, so it jumps; the rolling mean and the validation loss tell the trend."
        drawn.append(figures.loss("loss", "Loss", "step", train, val, caption))
    curves = run.family("val/loss")
    if curves:
        rows = run.rows("plan", "corpora")
        entropy = {str(row.get("name")): q.finite(row.get("unigram_entropy")) for row in rows}
        known = {name: value for name, value in entropy.items() if value is not None and name in curves}
        drawn.append(figures.corpora("corpora-loss", curves, known, run.corpora()))
    by_time = run.series("train/loss", "time_s"), run.series("val/loss", "time_s")
    if by_time[0][0] or by_time[1][0]:
        label = figures.time_label([*by_time[0][0], *by_time[1][0]])
        timed = [figures.in_unit(series, label) for series in by_time]
        caption = "The same loss by wall-clock time: what a faster or slower optimizer gains or loses is seen here."
        drawn.append(figures.loss("loss-time", "Loss by time", label, timed[0], timed[1], caption))
    by_role = run.family("lr")
    if by_role:
        drawn.append(figures.rates("rates", by_role, q.finite(run.plan.get("warmup_steps"))))
    intro = "" if drawn else f"Loss: {q.NOT_MEASURED}. No metrics were logged."
    shown = tuple(table for table in (tables.corpora(run), tables.validation(run)) if table.rows)
    return Section("loss", "Loss", intro, tuple(drawn), shown)


def _scores(run: Run, entries: list[Score]) -> Section:
    if suite(run) is None and not any(entry.value is not None for entry in entries):
        off = run.asked("evaluation.suite") == "none" or run.part("summary", "evaluation").get("suite") == "none"
        reason = "evaluation was turned off" if off else "no results in the folder"
        return Section("scores", "Scores", f"Scores: {q.NOT_MEASURED} ({reason}).", sampled_figures(run))
    drawn = (figures.scores("score-dots", entries),) if any(entry.counts for entry in entries) else ()
    drawn += sampled_figures(run)
    return Section("scores", "Scores", comparability(entries), drawn, (tables.scores(entries),))


def _speed(run: Run) -> Section:
    drawn = []
    speed = run.series("tokens_per_s_per_device")
    if speed[0]:
        drawn.append(figures.throughput("throughput", speed, q.finite(run.summary.get("tokens_per_s_per_device"))))
    split = _split(run)
    if split is not None:
        drawn.append(figures.step_split("step-split", *split))
    bars = tables.memory_bytes(run)
    if bars:
        colours = {
            "allocated at the end": "blue",
            "reserved at the end": "sky",
            "peak": "indigo",
            "optimizer state": "orange",
        }
        drawn.append(figures.memory("memory-bars", bars, colours))
    colours = {"allocated": "blue", "reserved": "sky", "peak": "indigo"}
    curves = {name: run.series(f"memory_{name}_bytes") for name in colours}
    if any(series[0] for series in curves.values()):
        taken = {name: series for name, series in curves.items() if series[0]}
        drawn.append(figures.memory_over_time("memory-run", taken, colours))
    intro = "" if drawn else f"Speed and memory: {q.NOT_MEASURED}."
    return Section("speed", "Speed and memory", intro, tuple(drawn), (tables.speed(run), tables.memory(run)))


def _split(run: Run) -> tuple[list[float], dict[str, list[float]]] | None:
    """The parts of the step at the steps where they were measured; what is left of a step counts as other."""
    columns = {
        "step": "step_ms",
        "data": "data_ms",
        "optimizer": "optimizer_ms",
        "forward + backward": "forward_backward_ms",
    }
    points = {name: dict(zip(*run.series(column), strict=True)) for name, column in columns.items()}
    known = [name for name in points if points[name]]
    if not {"step", "optimizer"} <= set(known):
        return None
    steps = [step for step in points["step"] if all(step in points[name] for name in known)]
    if not steps:
        return None
    measured = [name for name in ("forward + backward", "optimizer", "data") if name in known]
    parts = {name: [points[name][step] for step in steps] for name in measured}
    rest = [max(0.0, points["step"][step] - sum(parts[name][i] for name in measured)) for i, step in enumerate(steps)]
    return steps, {**parts, "other" if "forward + backward" in known else "forward, backward and other": rest}


_VOLATILITY = (
    "How much the training loss wobbles, and falls: the rolling deviation holds the trend too, so where the loss falls "
    "fast, mostly in the first third, it overstates the wobble."
)


def _stability(run: Run) -> Section:
    drawn = []
    norm, by_role = run.series("grad_norm"), run.family("grad_norm")
    if norm[0]:
        drawn.append(figures.gradient_norm("gradient", norm, q.finite(run.asked("optimizer.max_grad_norm"))))
    if by_role:
        caption = "Each role's part of the norm, rolling mean. Roles that drift apart deserve a look at their rates."
        label = "gradient norm before clipping"
        drawn.append(figures.norms_by_role("gradient-roles", "Gradient norm by role", label, caption, by_role))
    shown = (
        ("grad_norm_change", "Change of the gradient norm", "relative change per step", "How much the norm jumps."),
        ("loss_volatility", "Loss volatility", "rolling std / mean of the loss", _VOLATILITY),
    )
    for column, title, label, caption in shown:
        series = run.series(column)
        if series[0]:
            means = tables.stability_thirds(run, column)
            end = q.finite(run.plan.get("max_steps")) or series[0][-1]
            drawn.append(figures.by_third(column, title, series, means, end, label, caption))
    updates = run.family("update_rms")
    if updates:
        caption = "How far one step moves a weight of each role, rolling mean."
        label = "root mean square of the update"
        drawn.append(figures.norms_by_role("updates", "Size of the updates by role", label, caption, updates))
    intro = "" if drawn else f"Stability: {q.NOT_MEASURED}."
    return Section("stability", "Stability", intro, tuple(drawn), (tables.stability(run),))


def _has_experts(run: Run) -> bool:
    return bool(run.series("expert_load/cv")[0]) or RunFolder(run.folder).expert_load.is_file()


def _experts(run: Run) -> Section:
    names = {"mean": "cv", "worst": "cv_worst", "chance": "noise_floor"}
    curves = {name: run.series(f"expert_load/{column}") for name, column in names.items()}
    curves = {name: series for name, series in curves.items() if series[0]}
    limit = q.finite(run.asked("callbacks.expert_load.cv_limit"))
    drawn = [experts.unevenness("expert-cv", curves, limit)] if curves else []
    shown: tuple[Table, ...] = ()
    history = experts.read_history(RunFolder(run.folder).expert_load)
    if history is not None:
        drawn.insert(0, experts.heat_map("expert-heat", history))
        shown = (experts.load_table(history),)
    intro = "A token counts once for each expert that it is sent to; padding is left out."
    return Section("experts", "Expert load", intro, tuple(drawn), shown)


def _configuration(run: Run) -> Section:
    tuned = settings.tuned(run)
    if run.overrides:
        asked = f"Asked on the command line: {', '.join(run.overrides)}."
    elif run.lacks("overrides.txt"):
        asked = "What was asked on the command line is not known."
    else:
        asked = "Nothing was asked beyond the defaults."
    shown = tuple(table for table in (tables.routing(run), settings.settings(run), tuned) if table.rows)
    if not run.config and not run.plan:
        return Section("configuration", "Configuration", f"Configuration: not in this folder. {asked}")
    text = settings.full_configuration(run)
    details = (("The whole configuration (config.yaml)", text),) if text else ()
    return Section("configuration", "Configuration", f"{asked} {settings.tuned_words(run)}", (), shown, details)


def _events(run: Run) -> Section:
    table = tables.events(run)
    if run.lacks("events.jsonl (unreadable)"):
        return Section("events", "Events", "Not known: events.jsonl cannot be read.")
    if not table.rows:
        return Section("events", "Events", "None: no step was skipped and no alarm was raised.")
    return Section("events", "Events", "", (), (table,))
