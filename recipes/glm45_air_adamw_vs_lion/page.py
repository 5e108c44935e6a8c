"""The page: the article's tables from the run folders, mean ± standard deviation over seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_opt.reports import quantities as q
from lightning_opt.reports import sweep_figures
from lightning_opt.reports.jobs import Job, of_sweep
from lightning_opt.reports.page import Section, render
from lightning_opt.reports.ranking import Cell, edge, gap, pooled
from lightning_opt.reports.style import optimizer_colours
from lightning_opt.reports.sweep_figures import Response
from lightning_opt.reports.tables import Table
from recipes.glm45_air_adamw_vs_lion import claims as c
from recipes.glm45_air_adamw_vs_lion import measures as m
from recipes.glm45_air_adamw_vs_lion.plans import PARTS, ROWS, SCANNED, SIZES

Points = Mapping[str, Sequence[tuple[float, Cell]]]
Column = tuple[str, m.Measure]
_MIB = 1 / 2**20


@dataclass(frozen=True)
class Found:
    """What lies in the folder.

    Attributes:
        rows: jobs by ``experiment=``, in the order of `ROWS`.
        points: of the scan: optimizer to rate and cell.
    """

    rows: Mapping[str, Sequence[Job]]
    points: Points

    @property
    def edges(self) -> bool | None:
        """Whether a best rate lies at the end of the scan; None where fewer than three rates have a result."""
        sides = [edge(points).side for points in self.points.values() if sum(cell.n > 0 for _, cell in points) > 2]
        return any(sides) if len(sides) == len(SCANNED) else None


def write(folder: Path, place: str, epochs: int) -> tuple[Path, str]:
    """Writes ``index.html`` from the sweeps in the folder, whatever is there.

    Returns:
        The page's path, and the check-list as text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = _read(folder)
    checks = c.checklist(found.rows, found.edges)
    size = f"--model_size {place} --epochs {epochs}" if place != "quick" else "--quick"
    finished = sum(job.state == "FINISHED" for jobs in found.rows.values() for job in jobs)
    content = {
        "title": "GLM-4.5-Air: AdamW against Lion",
        "state": f"{finished} runs with a result",
        "tone": "muted",
        "subtitle": f"an article's comparison done again, at {place}",
        "source": "runs of train.py in this folder",
        "reading": "How to read these tables",
        "alarm_tone": "warn",
        "alarm": "",
        "verdict": (_verdict(found.rows),),
        "cards": (),
        "notes": _NOTES,
        "sections": [part for make in _SECTIONS if (part := make(found, folder, checks))],
        "commands": (("All of this again, or what is missing:", f"./run_optimizer_benchmark.sh {size}"),),
        "missing": tuple(name for name in PARTS if not (folder / name).is_dir()),
    }
    page = folder / "index.html"
    page.write_text(render("report.html.j2", content), encoding="utf-8")
    ticks = "\n".join(f"{check.mark} {check.text} ({check.measured})" for check in checks)
    return page, f"{content['verdict'][0]}\n{ticks}"


_NOTES = (
    "Mean ± sample standard deviation over the seeds of a row; n = 1 tells no spread. Equal texts, tokens and schedule "
    "in all rows; what was not measured says so.",
    "Beside every accuracy stand the chance level and a loss: models of this size are at chance in MMLU and at 0 in "
    "HumanEval (Pythia 70M to 410M: MMLU 0.244 to 0.258 after 300B tokens), so a difference there is none. What tells "
    "optimizers apart is the validation loss, and its bits per byte.",
    "CV: standard deviation over mean of the tokens per expert; lower is better. Balance here is 1 / (1 + CV²).",
    "Each row has the article's rate. Who is better at its own best rate is the scan's question, not the table's.",
)


def _read(folder: Path) -> Found:
    rows: dict[str, list[Job]] = {name: [] for name in ROWS}
    scan: dict[str, list[Job]] = {name: [] for name in SCANNED}
    for part in PARTS:
        for job in of_sweep(folder / part).jobs if (folder / part).is_dir() else ():
            name = dict(word.partition("=")[::2] for word in job.overrides).get("experiment", "")
            if part == "rows" and name in rows:
                rows[name].append(job)
            if name in scan:
                scan[name].append(job)
    points = {cells[0].best.optimizer: _points(cells) for jobs in scan.values() if (cells := _cells(jobs))}
    return Found(rows, points)


def _cells(jobs: Sequence[Job]) -> list[Cell]:
    """Settings that were tried, seeds together."""
    by_identity: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        by_identity[job.identity].append(job)
    return [cell for same in by_identity.values() if (cell := Cell(tuple(same))).n or cell.diverged]


def _points(cells: Sequence[Cell]) -> list[tuple[float, Cell]]:
    return sorted(((rate, cell) for cell in cells if (rate := cell.rate) is not None), key=lambda point: point[0])


def _verdict(rows: Mapping[str, Sequence[Job]]) -> str:
    cells = {name: Cell(tuple(jobs)) for name, jobs in rows.items() if jobs}
    adamw, lion = (cells.get(name) for name in SCANNED)
    if not (adamw and lion and adamw.n and lion.n):
        return "AdamW and Lion in the common configuration have not both come to an end."
    test = gap(adamw, lion, pooled(cells.values()))
    judged = {"inside": "inside the noise between seeds", "beyond": "beyond the noise between seeds"}
    side = "above" if test.value > 0 else "below"
    return (
        f"At the article's equal rate Lion ended {abs(test.value):.3f} nats {side} AdamW, "
        f"{judged.get(test.judgement, 'with too few seeds to tell noise')} ({lion.n} and {adamw.n} seeds)."
    )


def _table(key: str, title: str, rows: Mapping[str, Sequence[Job]], columns: Sequence[Column], note: str = "") -> Table:
    header = ("row", "n", *(name for name, _ in columns))
    body = tuple(
        (ROWS[name], str(sum(job.state == "FINISHED" for job in jobs)), *(m.spread(jobs, read) for _, read in columns))
        for name, jobs in rows.items()
    )
    return Table(key, title, header, body, frozenset(range(1, len(header))), note=note)


def _matrix(found: Found, folder: Path, checks: Sequence[c.Check]) -> Section:
    def settled(jobs: Sequence[Job], show: Callable[[Job], object]) -> str:
        return next((q.trimmed(show(job)) for job in jobs if job.run.config), q.NOT_MEASURED)

    body = tuple(
        (
            ROWS[name],
            f"experiment={name}",
            settled(jobs, lambda job: Cell((job,)).rate),
            settled(jobs, lambda job: job.run.asked("optimizer.weight_decay")),
            settled(jobs, lambda job: job.run.plan.get("global_batch_size")),
            m.spread(jobs, m.of("val_loss")),
        )
        for name, jobs in found.rows.items()
    )
    header = ("row", "command", "peak rate", "decay", "batch", "validation loss, nats")
    return Section(
        "matrix",
        "Decision matrix",
        "One row each; equal tokens, three seeds. Rates are the article's times optimizer.lr_scale.",
        tables=(Table("matrix", "", header, body, frozenset({2, 3, 4, 5})),),
    )


def _quality(found: Found, folder: Path, checks: Sequence[c.Check]) -> Section:
    mmlu = (
        ("average", m.score("mmlu")),
        *((group, m.subjects(group)) for group in ("science", "humanities", "technology")),
        ("chance", m.score("mmlu", "chance")),
        ("gold answers, bits per byte", m.score("mmlu", "bits_per_byte")),
    )
    humaneval = (
        ("pass@1", m.score("humaneval")),
        *((topic, m.problems(topic)) for topic in m.mapped(m.PROBLEMS)),
        ("chance", m.score("humaneval", "chance")),
        ("gold answers, bits per byte", m.score("humaneval", "bits_per_byte")),
    )
    text = (("perplexity", m.of("val_perplexity")), ("bits per byte", m.of("val_bits_per_byte")))
    tables = (
        _table(
            "mmlu",
            "MMLU",
            found.rows,
            mmlu,
            "Groups by article_subjects.json, each document counted once; 18 subjects are in none of the three, so the "
            "average is not theirs. The mini suite has other subjects: its average alone is shown.",
        ),
        _table(
            "humaneval",
            "HumanEval",
            found.rows,
            humaneval,
            "Topics by problems.json, of the real set alone: the mini suite has other problems.",
        ),
        _table("text", "Held-out text", found.rows, text),
    )
    return Section("quality", "Quality", "", tables=tables)


def _efficiency(found: Found, folder: Path, checks: Sequence[c.Check]) -> Section:
    columns = (
        ("tokens/s per device", m.of("tokens_per_s_per_device")),
        ("step, ms", m.of("step_ms")),
        ("update latency, ms", m.of("optimizer_ms")),
        ("of a step, %", m.scaled(m.of("optimizer_share"), 100)),
        ("peak memory, MiB", m.scaled(m.of("peak_memory_bytes"), _MIB)),
        ("states, MiB", m.scaled(m.of("optimizer_state_bytes"), _MIB)),
    )
    intro = "Two jobs at a time share a CPU: speeds here compare rows, not machines."
    return Section("efficiency", "Efficiency", intro, tables=(_table("efficiency", "", found.rows, columns),))


def _stability(found: Found, folder: Path, checks: Sequence[c.Check]) -> Section:
    whole = (
        ("expert-load CV", m.of("expert_load_cv")),
        ("balance", m.balance),
        ("dead experts", m.of("expert_load_dead")),
        ("gradient-norm change", m.of("grad_norm_change")),
        ("loss volatility", m.of("loss_volatility")),
    )
    thirds = tuple((name, m.third(place)) for place, name in enumerate(("first third", "second third", "last third")))
    tables = (
        _table("stability", "", found.rows, whole),
        _table("thirds", "Loss volatility by third of the run", found.rows, thirds, "Rolling std / mean of the loss."),
    )
    return Section("stability", "Stability", "", tables=tables)


def _memory(found: Found, folder: Path, checks: Sequence[c.Check]) -> Section:
    """Measured in this folder and in those of other sizes beside it; larger models by arithmetic."""
    header = ("model", "parameters", "optimizer", "states, MiB", "bytes per weight", "peak, MiB", "origin")
    body: list[tuple[str, ...]] = []
    beside = [other for size in SIZES if (other := folder.parent / size) != folder]
    for place in (folder, *beside):
        for name, jobs in _read(place).rows.items():
            size = m.mean(jobs, m.of("params_total"))
            if name in SCANNED and size:
                states = m.mean(jobs, m.of("optimizer_state_bytes"))
                body.append(
                    (
                        next((str(job.run.summary["model"]) for job in jobs if job.run.summary.get("model")), "?"),
                        q.short(size),
                        jobs[0].optimizer,
                        m.spread(jobs, m.scaled(m.of("optimizer_state_bytes"), _MIB)),
                        q.number(None if states is None else states / size, 3),
                        m.spread(jobs, m.scaled(m.of("peak_memory_bytes"), _MIB)),
                        "measured",
                    )
                )
    for model, size in (("glm_mini", 1.00e9), ("glm45_air", 106.85e9)):
        for name, each in (("AdamW", 8), ("Lion", 4)):
            states = q.integer(size * each * _MIB)
            body.append((model, q.short(size), name, states, str(each), q.NOT_MEASURED, "computed, float32 states"))
    table = Table("memory", "", header, tuple(body), frozenset({1, 3, 4, 5}))
    return Section("memory", "Memory over model size", "", tables=(table,))


def _rates(found: Found, folder: Path, checks: Sequence[c.Check]) -> Section | None:
    if not any(found.points.values()):
        return None
    what = Response("rates", "Final loss by rate", "peak learning rate", found.points, True, "rate", False)
    intro = "The article's 1e-5, 2.5e-5, 5e-5 and 1e-4, times optimizer.lr_scale, for both alike."
    return Section("rates", "Rate scan", intro, (sweep_figures.response(what, optimizer_colours(found.points)),))


def _claims(found: Found, folder: Path, checks: Sequence[c.Check]) -> Section:
    table = Table("claims", "", ("subject", "the article", "measured, or known"), c.claims(found.rows))
    intro = "Statements of blog.csdn.net/gitblog_00403, article 151599122, that we have in writing; no other."
    return Section("claims", "Claims beside measurements", intro, tables=(table,))


def _checklist(found: Found, folder: Path, checks: Sequence[c.Check]) -> Section:
    rows = tuple((check.mark, check.text, check.measured) for check in checks)
    intro = "Ticks are measured in the runs above: [x] holds, [ ] does not, [?] was not measured. The wording is ours."
    return Section("checklist", "Check-list", intro, tables=(Table("checklist", "", ("", "point", "measured"), rows),))


def _not_reproduced(found: Found, folder: Path, checks: Sequence[c.Check]) -> Section:
    rows = tuple((text,) for text in c.NOT_REPRODUCED)
    return Section("not", "What was not reproduced, and why", "", tables=(Table("not", "", ("",), rows),))


_SECTIONS = (
    _matrix,
    _quality,
    _efficiency,
    _stability,
    _memory,
    _rates,
    _claims,
    _checklist,
    _not_reproduced,
)
