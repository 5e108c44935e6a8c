"""What the article says, held against what was measured here, and what was not done again.

Source: "GLM-4.5-Air: AdamW vs Lion" (blog.csdn.net/gitblog_00403, article 151599122). Only its statements that we have
in writing stand here; where our copy lacks a figure or the words, that is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_opt.reports import quantities as q
from lightning_opt.reports.jobs import Job
from recipes.glm45_air_adamw_vs_lion import measures as m

Rows = Mapping[str, Sequence[Job]]
ADAMW, LION = "glm45_air_adamw", "glm45_air_lion"
CV_LIMIT = 0.8


@dataclass(frozen=True)
class Check:
    """A point of the check-list.

    Attributes:
        text: what must hold.
        holds: whether it was measured to; None where it was not measured.
        measured: the figure behind it.
    """

    text: str
    holds: bool | None
    measured: str

    @property
    def mark(self) -> str:
        """``[x]`` holds, ``[ ]`` does not, ``[?]`` not measured."""
        return {True: "[x]", False: "[ ]", None: "[?]"}[self.holds]


def saved(rows: Rows, key: str) -> float | None:
    """By which share Lion's mean lies under AdamW's; None where one of them is not known."""
    adamw, lion = (m.mean(rows.get(row, ()), m.of(key)) for row in (ADAMW, LION))
    return 1 - lion / adamw if adamw and lion is not None else None


def claims(rows: Rows) -> tuple[tuple[str, str, str], ...]:
    """Subject, what the article says, and what was measured or is known."""

    def both(measure: m.Measure, unit: str = "") -> str:
        pairs = (("AdamW", ADAMW), ("Lion", LION))
        return "; ".join(f"{name} {m.spread(rows.get(row, ()), measure)}{unit}" for name, row in pairs)

    return (
        (
            "Memory",
            "Lion needs 37 % and 42 % less, and the more so the larger the model",
            f"by how much Lion's peak is less: {q.percent(saved(rows, 'peak_memory_bytes'))} (on a CPU the whole "
            f"process's); its states alone: {q.percent(saved(rows, 'optimizer_state_bytes'))}. In float32 throughout a "
            "quarter of the step is the most that can go, 16 bytes per weight becoming 12: benchmarks/results/ "
            "has the peak of a step over model sizes",
        ),
        (
            "Speed of the update",
            "O(n) for both: squares for AdamW, signs alone for Lion",
            both(m.of("optimizer_ms"), " ms"),
        ),
        (
            "Convergence",
            "Lion converges fast; AdamW is steadier where gradients are complex",
            f"final validation loss: {both(m.of('val_loss'))}; loss volatility: {both(m.of('loss_volatility'))}",
        ),
        (
            "Expert balance",
            "std / mean of the load, over 0.8",
            f"std / mean (CV) is better the lower: {both(m.of('expert_load_cv'))}; read as 1 / (1 + CV²), where over "
            f"0.8 is good (docs/experts.md): {both(m.balance)}",
        ),
        (
            "The rule of Lion",
            "m is an average of sign(g)",
            "not Lion, whose sign comes after the average (arXiv 2302.06675); kept as optimizer=lion_sign_first, which "
            "steps after the median of the gradients. Lion here is the paper's",
        ),
        (
            "The model",
            "96 layers, 96 heads, hidden 5120",
            "GLM-4.5-Air has 46 layers, 96 heads and hidden 4096 (arXiv 2508.06471, table 1); 5120 is GLM-4.5's",
        ),
        (
            "The machine",
            "8 GPUs of 80 GB",
            "computed: AdamW's two float32 states of 106.85B weights are 855 GB, more than the 640 GB there; Lion's "
            "one is 427 GB, and bfloat16 weights are 214 GB",
        ),
        (
            "Activation checkpointing",
            "20 % (of what, our copy does not say)",
            f"not measured in these runs, which all have activation_checkpointing={_checkpointing(rows)}; "
            "README has moe_nano with and without it, in float32 and bfloat16",
        ),
    )


def _checkpointing(rows: Rows) -> str:
    asked = {
        str(value)
        for jobs in rows.values()
        for job in jobs
        if (value := job.run.asked("model.activation_checkpointing"))
    }
    return " or ".join(sorted(asked)) or q.NOT_MEASURED


def checklist(rows: Rows, at_edge: bool | None) -> tuple[Check, ...]:
    """Five points with measured ticks.

    Args:
        rows: jobs by ``experiment=``.
        at_edge: whether the best rate of one of both lies at the end of the scan; None without a scan.
    """
    jobs = [job for found in rows.values() for job in found]
    ended = [job for job in jobs if job.state not in ("NOT STARTED", "RUNNING", "STOPPED")]
    done = sum(job.state == "FINISHED" for job in ended)
    cvs = [value for job in jobs if (value := m.of("expert_load_cv")(job)) is not None]
    dead = [value for job in jobs if (value := m.of("expert_load_dead")(job)) is not None]
    share = saved(rows, "peak_memory_bytes")
    peaks = [[value for job in rows.get(row, ()) if (value := m.of("peak_memory_bytes")(job))] for row in (LION, ADAMW)]
    late = [
        last <= first
        for job in jobs
        if (first := m.third(0)(job)) is not None and (last := m.third(2)(job)) is not None
    ]
    return (
        Check(
            "every Lion run's peak memory is below every AdamW run's",
            max(peaks[0]) < min(peaks[1]) if all(peaks) else None,
            q.NOT_MEASURED if share is None else f"{q.percent(share)} less",
        ),
        Check(
            f"expert load uneven by less than the alarm, and no expert dead: CV < {CV_LIMIT}",
            None if not cvs else max(cvs) < CV_LIMIT and not any(dead),
            f"largest CV at the end of a run: {q.number(max(cvs, default=None))}",
        ),
        Check(
            "the loss is calmer in the last third of every run than in the first",
            all(late) if late else None,
            f"in {sum(late)} of {len(late)} runs" if late else q.NOT_MEASURED,
        ),
        Check(
            "both have their best rate inside the scan, not at its end",
            None if at_edge is None else not at_edge,
            q.NOT_MEASURED if at_edge is None else "at an end" if at_edge else "inside",
        ),
        Check(
            "every run came to its end",
            done == len(ended) if ended else None,
            f"{done} of {len(ended)}" if ended else q.NOT_MEASURED,
        ),
    )


NOT_REPRODUCED = (
    "slime: the article's framework is for reinforcement learning after training (Megatron, SGLang and a data buffer), "
    "not for what it compares; its GLM-4.5-Air script freezes the balance of the experts. These are runs of train.py.",
    "The article's line of code for Lion, the average of signs: it is not Lion. See the claims.",
    "Its texts: not named in our copy. The embedded corpora at nano, data.path=FOLDER at the larger sizes.",
    "Its weights: nano and mini start from fresh ones, and all rates are multiplied alike (40 and 10), since 2.5e-5 "
    "suits a model that has learned. model=hf model.path=FOLDER goes on from GLM-4.5-Air's own.",
    "A model of 120B: none exists. --model_size 120b is GLM-4.5-Air, 106B with 12B active.",
    "Its steps 30 000 and 80 000 of the staged row: 0.3 and 0.8 of the run, which here is shorter.",
    "Its five-point check-list in its own words, the names of its decision matrix, and its groups of subjects and "
    "problems: not in our copy. The five points, the rows' names, article_subjects.json and problems.json are ours.",
    "TAU-bench: a model trained here from nothing has no chat or tool format and would score 0.",
)
