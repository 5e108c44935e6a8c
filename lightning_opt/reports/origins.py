"""Where the values that nobody asked for come from: tuned ones, and of which source, or the optimizer's own YAML."""

from __future__ import annotations

from lightning_opt.reports import quantities as q
from lightning_opt.reports.ranking import Group
from lightning_opt.reports.reading import Run
from lightning_opt.reports.scores import listed

TUNED, DEFAULTS, UNKNOWN = "tuned values", "its YAML's own defaults", "not known"
_MEASURED = {"ours": "measured by this project", "published": "published", "no": "a first guess"}


def origin(run: Run) -> str:
    """`TUNED`, `DEFAULTS` or `UNKNOWN`."""
    if run.part("plan", "tuned"):
        return TUNED
    return DEFAULTS if "tuned" in run.plan and run.plan["tuned"] is None else UNKNOWN


def row(run: Run) -> tuple[str, str, str]:
    """Origin, source and names of the values, in words."""
    kind, record = origin(run), run.part("plan", "tuned")
    if kind != TUNED:
        return kind, "–", "–"
    words, values = _MEASURED.get(str(record.get("measured"))), record.get("values")
    names = [str(key).removeprefix("optimizer.") for key in values] if isinstance(values, dict) else []
    return f"{kind}, {words}" if words else kind, q.text(record.get("source")), ", ".join(names) or "–"


def note(group: Group) -> list[str]:
    """Says it where some optimizers of a ranking ran tuned values and others had none."""
    kinds = {one.optimizer: {origin(job.run) for job in one.jobs} for one in group.standings}
    tuned = [name for name, found in kinds.items() if TUNED in found]
    plain = [name for name, found in kinds.items() if found == {DEFAULTS}]
    if not tuned or not plain:
        return []
    own = DEFAULTS if len(plain) == 1 else "their YAMLs' own defaults"
    return [f"{listed(tuned)} ran tuned values, {listed(plain)} {own}: a gap between them may be that alone."]
