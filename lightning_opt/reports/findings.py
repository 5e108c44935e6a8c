"""The run in words: the verdict, the key figures, and what they can and cannot show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_opt.optim.catalogue import OPTIMIZERS
from lightning_opt.reports import quantities as q
from lightning_opt.reports.reading import Run
from lightning_opt.reports.scores import Score, comparability, listed
from lightning_opt.run_folder import starts_elsewhere


@dataclass(frozen=True)
class Card:
    """A key figure.

    Attributes:
        label: what it is.
        value: the figure with its unit.
        detail: what belongs to it.
        tone: a colour name of `style`, or empty.
    """

    label: str
    value: str
    detail: str = ""
    tone: str = ""


def optimizer_name(run: Run) -> str:
    """The optimizer as it is usually spelled."""
    return spelled(str(_plain(run.summary.get("optimizer")) or run.asked("optimizer.name") or "an unnamed optimizer"))


def spelled(name: str) -> str:
    """An optimizer's configuration name as its authors write it."""
    return OPTIMIZERS.get(name, name)


def model_name(run: Run) -> str:
    """The model's name."""
    return str(_plain(run.summary.get("model")) or run.asked("model.name") or "an unnamed model")


def data_name(run: Run) -> str:
    """The data's name."""
    return str(_plain(run.summary.get("data")) or run.asked("data.name") or "unnamed data")


def alarm(run: Run, entries: Sequence[Score]) -> str:
    """What must be said first: that and why the run did not end as planned, or that a score is none. Else empty."""
    broken = [entry.title for entry in entries if entry.judgement == "broken"]
    said = [_ending(run)]
    if broken:
        said.append(
            f"{listed(broken)}: every choice of every item got the same likelihood, so the model or the scorer is "
            "broken and the number is no score."
        )
    return " ".join(filter(None, said))


def _ending(run: Run) -> str:
    step = run.status.get("step") or run.summary.get("steps")
    planned = run.plan.get("max_steps")
    where = ""
    if step is not None:
        where = f" at step {q.integer(step)}" + (f" of {q.integer(planned)}" if planned else "")
    reason = str(run.status.get("reason") or "").strip()
    because = f": {reason}" if reason else " (no reason was recorded)"
    words = {
        "FINISHED": "",
        "RUNNING": f"Not finished when this was written{where.replace(' at step', ': step')}.",
        "DIVERGED": f"Diverged{where}{because}",
        "PREEMPTED": f"Preempted{where}{because}",
        "FAILED": f"Failed{where}{because}",
    }
    text = words.get(run.state, f"How this run ended is not known (state {run.state}).")
    return text if not text or text.endswith(".") else f"{text}."


def verdict(run: Run, entries: Sequence[Score]) -> str:
    """The run in one sentence with its figures, and one more with the scores."""
    summary = run.summary
    loss = q.finite(summary.get("val_loss"))
    size = q.finite(summary.get("params_total"))
    until = "Until then " if run.state in ("DIVERGED", "FAILED", "PREEMPTED") else ""
    trained = f"{until}{optimizer_name(run)} trained {model_name(run)}"
    trained += f" ({q.short(size)} parameters)" if size else ""
    tokens = q.finite(summary.get("tokens"))
    if tokens is None:
        return f"{trained}: no training step was logged."
    sentence = f"{trained} on {q.short(tokens)} tokens"
    if loss is None:
        sentence += "; validation loss was not measured"
    else:
        sentence += f" to {q.number(loss, 3)} nats per token on held-out text{_against_unigram(run)}"
    speed, share = q.finite(summary.get("tokens_per_s_per_device")), q.finite(summary.get("optimizer_share"))
    if speed is not None:
        sentence += f", at {q.short(speed)} tokens per second per device"
    if share is not None:
        sentence += f"{' with' if speed is not None else ','} {q.percent(share)} of each step spent in the optimizer"
    scored = [_score_words(entry) for entry in entries if entry.counts]
    return f"{sentence}." + (f" {'; '.join(scored)}." if scored else "")


def _score_words(entry: Score) -> str:
    chance = "" if entry.chance is None else f" (chance {q.trimmed(entry.chance, 3)})"
    return f"{entry.label} {entry.measured}{chance}"


def _against_unigram(run: Run) -> str:
    """How the loss of each corpus stands to that corpus's unigram entropy, in a clause."""
    below, compared = _below_unigram(run)
    if not compared:
        return ""
    if len(below) == len(compared):
        return ", below the unigram entropy of every corpus" if len(compared) > 1 else ", below its unigram entropy"
    if not below:
        return ", not below the unigram entropy of any corpus"
    return f", below the unigram entropy of {len(below)} of {len(compared)} corpora"


def _below_unigram(run: Run) -> tuple[list[str], list[str]]:
    losses = run.part("summary", "val_loss_by_corpus")
    entropy = {str(row.get("name")): q.finite(row.get("unigram_entropy")) for row in run.rows("plan", "corpora")}
    compared = [name for name in run.corpora() if q.finite(losses.get(name)) is not None and entropy.get(name)]
    return [name for name in compared if losses[name] < (entropy[name] or 0)], compared


def cards(run: Run, entries: Sequence[Score]) -> tuple[Card, ...]:
    """The key figures of the header."""
    summary = run.summary
    perplexity, bits = summary.get("val_perplexity"), summary.get("val_bits_per_byte")
    state = summary.get("optimizer_state_bytes")
    shown = [
        Card(
            "validation loss",
            q.number(summary.get("val_loss"), 4),
            _joined(("perplexity", q.number(perplexity, 3)), ("", f"{q.number(bits, 3)} bits per byte"))
            if q.finite(summary.get("val_loss")) is not None
            else "",
        ),
        Card(
            "tokens/s per device",
            q.short(summary.get("tokens_per_s_per_device")),
            f"step {q.milliseconds(summary.get('step_ms'))}" if q.finite(summary.get("step_ms")) is not None else "",
        ),
        Card(
            "optimizer",
            q.percent(summary.get("optimizer_share")),
            f"{q.milliseconds(summary.get('optimizer_ms'))} of each step"
            if q.finite(summary.get("optimizer_ms")) is not None
            else "share of each step",
        ),
        Card(
            "peak memory",
            q.size(summary.get("peak_memory_bytes")),
            f"optimizer state {q.size(state)}" if q.finite(state) is not None else "",
        ),
        Card(
            "tokens trained on",
            q.short(summary.get("tokens")),
            _joined(("", f"{q.integer(summary.get('steps'))} steps"), ("", q.duration(summary.get("seconds")))),
        ),
    ]
    scored = [_score_card(entry) for entry in entries if entry.counts]
    return (*shown, *(scored or [Card("scores", q.NOT_MEASURED, "no task was scored")]))


def _score_card(entry: Score) -> Card:
    value, _, error = entry.measured.partition(" ± ")
    chance = "" if entry.chance is None else f", chance {q.trimmed(entry.chance, 3)}"
    tone = {"above": "good", "below": "bad"}.get(entry.judgement, "")
    return Card(entry.label, value, (f"± {error}" if error else "no standard error") + chance, tone)


def notes(run: Run, entries: Sequence[Score]) -> tuple[str, ...]:
    """What the figures show, and what they do not."""
    found = []
    below, compared = _below_unigram(run)
    if compared and len(below) < len(compared):
        others = listed([name for name in compared if name not in below])
        found.append(
            f"On {others} the loss did not fall below the unigram entropy: nothing beyond token frequency is shown."
        )
    same = [entry.title for entry in entries if entry.judgement == "same"]
    if same:
        found.append(f"{listed(same)}: no difference from chance, so no ability is shown.")
    worse = [entry.title for entry in entries if entry.judgement == "below"]
    if worse:
        found.append(
            f"{listed(worse)}: below chance by more than two standard errors; look at the answers before the model."
        )
    if any(entry.counts and not entry.comparable for entry in entries):
        found.append(comparability(entries))
    found.append(
        "One run with one seed (n = 1): it has no spread, so a small difference from another run means nothing."
    )
    train, val = q.finite(run.summary.get("train_loss")), q.finite(run.summary.get("val_loss"))
    if train is not None and val is not None and val - train > 0.3:
        gap = q.number(val - train, 2)
        found.append(f"Validation loss ended {gap} nats above training loss: a sign of overfitting or of easier data.")
    found += survived(run)
    if run.env.get("git_dirty") is True:
        found.append("The code had uncommitted changes: the commit alone does not reproduce this run.")
    return tuple(found)


def survived(run: Run) -> list[str]:
    """What went wrong on the way and was got over, a sentence each; empty for a calm run."""
    resumed, found = run.summary.get("resumed_from"), []
    if start := started_elsewhere(run):
        found.append(f"Started from another run's checkpoint: {start}. Tokens and steps count what was done there too.")
        resumed = resumed[1:] if isinstance(resumed, list) else resumed
    if isinstance(resumed, list) and resumed:
        steps = f"step{'s' * (len(resumed) > 1)} {listed([q.integer(step) for step in resumed])}"
        found.append(f"Interrupted and resumed {_times(len(resumed))}, from {steps}.")
    counts = {name: q.finite(run.summary.get(name)) or 0 for name in ("skipped_steps", "rewinds", "failed_saves")}
    if skipped := int(counts["skipped_steps"]):
        found.append(
            f"{skipped} step{'s' * (skipped > 1)} skipped because loss or gradient norm leapt: see the events."
        )
    if rewinds := int(counts["rewinds"]):
        found.append(f"Rewound {_times(rewinds)} to a checkpoint and led past the data that it broke at.")
    if failed := int(counts["failed_saves"]):
        found.append(
            f"{failed} checkpoint{'s' * (failed > 1)} could not be saved: a kill then would have lost more steps."
        )
    return found


def started_elsewhere(run: Run) -> str | None:
    """The checkpoint or run of another folder that this one started from."""
    start = run.asked("resume")
    return start if isinstance(start, str) and starts_elsewhere(start) else None


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _joined(*pairs: tuple[str, str]) -> str:
    words = [f"{name} {value}".strip() for name, value in pairs if q.NOT_MEASURED not in value]
    return " · ".join(words)


def _plain(value: object) -> object:
    """A name that may have been saved as its whole table."""
    return value.get("name") if isinstance(value, dict) else value
