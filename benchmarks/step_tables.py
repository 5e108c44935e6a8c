"""What the rounds of `benchmarks.optimizer_step` say: a row per rule, a row per contender, a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import record
from benchmarks.step_contenders import YARDSTICK, Contender

if TYPE_CHECKING:
    from benchmarks.optimizer_step import Family

Row = dict[str, Any]
EACH = "each rule"


def tables_of(title: str, families: Sequence[Family], width: int, busy: str, absent: str) -> list[record.Table]:
    """The tables of one set in one dtype.

    Args:
        title: of the set.
        families: its rules.
        width: bytes of a weight.
        busy: ``cpu`` or ``gpu``.
        absent: who was left out.
    """
    moved = [family for family in families if not family.operations]
    matrix = [family for family in families if family.operations]
    found = []
    if moved:
        rivals = ", ".join(f"{rival.name} for {kind}" for kind, rival in sorted(fastest_peers(moved).items()))
        note = f"Of each rule our fastest way and the fastest peer. {speeds(moved, width)} Fastest peers: {rivals}."
        rows = [summary(family, kind, width, busy) for family in moved for kind in kinds(family)]
        found.append(record.Table(f"{title}: {EACH}", rows, note))
        every = [row for family in moved for row in rows_of(family, width, busy)]
        found.append(record.Table(f"{title}: every contender", every, absent.strip()))
    if matrix:
        rows = [row for family in matrix for row in matrix_rows(family, busy)]
        note = f"The hidden matrices alone. {arithmetic(matrix)}" + ("" if moved else absent)
        found.append(record.Table(f"{title}: rules of whole matrices", rows, note))
    return found


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """10 %, 50 % and 90 % of the values."""
    ordered = sorted(values)
    at = lambda share: ordered[min(len(ordered) - 1, math.floor(share * len(ordered)))]  # noqa: E731
    return at(0.1), statistics.median(ordered), at(0.9)


def kinds(family: Family) -> list[str]:
    """The rule, and its int8 form apart, where ours is there."""
    return list(dict.fromkeys(c.kind for c in family.contenders if c.ours))


def fastest_peers(families: Iterable[Family]) -> dict[str, Contender]:
    """The peer of the shortest step by the clock, for each rule and storage; the yardstick is a peer of AdamW alone."""
    peers = [c for family in families for c in family.contenders if not c.ours and c.rule == family.rule]
    return {c.kind: c for c in sorted(peers, key=lambda c: c.wall, reverse=True)}  # the last, the fastest, stays


def to_floor(contender: Contender, k: int, width: int) -> tuple[float, float, float]:
    """The step over its floor with its spread; `k`: 0 busy, 1 wall; `width`: bytes of a weight."""
    pairs = zip(contender.own, contender.floor, strict=True)
    return spread(own[k] / floor[k] * 3 * width / contender.traffic for own, floor in pairs)


def against(contender: Contender, rival: Contender | None, k: int) -> str | None:
    """Ours over the rival in the same rounds, with its spread; `k`: 0 busy, 1 wall. None for a peer, or without one."""
    if rival is None or not contender.ours:
        return None
    low, middle, high = spread(a[k] / b[k] for a, b in zip(contender.own, rival.own, strict=True))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def summary(family: Family, kind: str, width: int, busy: str) -> Row:
    """Our fastest way of one rule."""
    mine = [c for c in family.contenders if c.ours and c.kind == kind]
    best, rival = min(mine, key=lambda c: c.wall), fastest_peers([family]).get(kind)
    full = min((c for c in family.contenders if c.ours and c.storage == "float32"), key=lambda c: c.wall)
    return {
        "rule": kind,
        "ours": best.name.removeprefix(f"ours {best.rule} "),
        f"{busy} / floor": to_floor(best, 0, width)[1],
        "wall / floor": to_floor(best, 1, width)[1],
        "fastest peer": rival and rival.name,
        "peer wall / floor": rival and to_floor(rival, 1, width)[1],
        f"{busy} / peer": against(best, rival, 0),
        "wall / peer": against(best, rival, 1),
        "wall / float32 state": None if best.storage == "float32" else against(best, full, 1),
        "first step s": best.first_s,
        "floor bytes": round(best.traffic, 2),
        "state bytes": round(best.state, 2),
    }


def rows_of(family: Family, width: int, busy: str) -> list[Row]:
    """One row per contender, fastest first. `width`: bytes of a weight."""
    fused = next(c for c in family.contenders if c.name == YARDSTICK)
    rivals = fastest_peers([family])
    rows = []
    for c in family.contenders:
        if c.rule != family.rule:
            continue
        parts = [to_floor(c, k, width) for k in (0, 1)]
        pairs = [own[1] / flat[1] * 3 * width / c.traffic for own, flat in zip(c.own, family.flats, strict=True)]
        rows.append({
            "optimizer": c.name,
            f"{busy} / floor": parts[0][1],
            f"{busy} 10-90 %": f"{parts[0][0]:.2f} to {parts[0][2]:.2f}",
            "wall / floor": parts[1][1],
            "wall 10-90 %": f"{parts[1][0]:.2f} to {parts[1][2]:.2f}",
            "wall / flat": statistics.median(pairs),
            "wall / fused": statistics.median(a[1] / b[1] for a, b in zip(c.own, fused.own, strict=True)),
            f"{busy} / peer": against(c, rivals.get(c.kind), 0),
            "wall / peer": against(c, rivals.get(c.kind), 1),
            "wall ms": 1e3 * c.wall,
            "first step s": c.first_s,
            "floor bytes": round(c.traffic, 2),
            "state bytes": round(c.state, 2),
        })  # fmt: skip
    return sorted(rows, key=lambda row: row["wall ms"])


def matrix_rows(family: Family, busy: str) -> list[Row]:
    """One row per contender of a rule of whole matrices, fastest first."""
    rivals = fastest_peers([family])
    rows = []
    for c in family.contenders:
        if c.rule != family.rule:
            continue
        shares = [spread(floor[k] / own[k] * family.operations / family.product
                         for own, floor in zip(c.own, c.floor, strict=True)) for k in (0, 1)]  # fmt: skip
        rows.append({
            "optimizer": c.name,
            "steps timed as one": c.period,
            "wall ms of a step": 1e3 * c.wall,
            f"{busy} ms": 1e3 * statistics.median(own[0] for own in c.own),
            "Gflop of a step": family.operations / 1e9,
            f"of the product's rate, {busy}": shares[0][1],
            "of the product's rate, wall": shares[1][1],
            f"{busy} / peer": against(c, rivals.get(c.kind), 0),
            "wall / peer": against(c, rivals.get(c.kind), 1),
            "first step s": c.first_s,
            "state bytes": round(c.state, 2),
        })  # fmt: skip
    return sorted(rows, key=lambda row: row["wall ms of a step"])


def speeds(families: Sequence[Family], width: int) -> str:
    """How fast the two yardsticks of memory were."""
    size = families[0].size
    floors = statistics.median(wall for family in families for c in family.contenders for _, wall in c.floor)
    flats = statistics.median(wall for family in families for _, wall in family.flats)
    moved = 3 * width * size / 1e9
    return (
        f"The stream over the same tensors ran at {moved / floors:.1f} GB/s, over one flat tensor at "
        f"{moved / flats:.1f} GB/s (wall)."
    )


def arithmetic(families: Sequence[Family]) -> str:
    """How fast the yardstick of arithmetic was, and who the fastest peers."""
    walls = [wall for family in families for c in family.contenders for _, wall in c.floor]
    rate = families[0].product / statistics.median(walls) / 1e9
    rivals = ", ".join(f"{rival.name} for {kind}" for kind, rival in sorted(fastest_peers(families).items()))
    return f"The float32 matrix product ran at {rate:.0f} Gflop/s (wall). Fastest peers: {rivals}."


def draw(tables: Sequence[record.Table], path: Path) -> None:
    """For each rule two bars, ours and the fastest peer: wall time over the floor."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = [table for table in tables if table.title.endswith(EACH)]
    figure, axes = pyplot.subplots(
        len(shown), 1, figsize=(9, sum(0.36 * len(t.rows) + 1 for t in shown)), squeeze=False,
        height_ratios=[len(t.rows) + 3 for t in shown], layout="constrained",
    )  # fmt: skip
    for axis, table in zip(axes[:, 0], shown, strict=True):
        rows = sorted(table.rows, key=lambda row: row["wall / floor"], reverse=True)
        places = range(len(rows))
        axis.barh([y + 0.2 for y in places], [row["wall / floor"] for row in rows], 0.4, color="#1f6f8b", label="ours")
        peers = [row["peer wall / floor"] or 0 for row in rows]
        axis.barh([y - 0.2 for y in places], peers, 0.4, color="#b0b7bd", label="fastest peer")
        for y, row in zip(places, rows, strict=True):
            if row["fastest peer"]:
                axis.text(row["peer wall / floor"], y - 0.2, f" {row['fastest peer']}", va="center", fontsize=7)
        axis.set_yticks(list(places), [row["rule"] for row in rows])
        axis.axvline(1.0, color="#c0392b", linewidth=1)
        axis.set_title(table.title, loc="left", fontsize=10)
        axis.set_xlabel("wall time / floor of the same tensors (1 = the memory's speed)")
        axis.tick_params(labelsize=8)
        axis.legend(loc="lower right")
        axis.margins(x=0.2, y=0.01)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
