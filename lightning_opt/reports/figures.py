"""The figures: small functions from plain data to a `Figure`. None reads a file, so other reports can use them too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lightning_opt.reports.canvas import Figure, Legend, Sheet, sheet, tick
from lightning_opt.reports.quantities import integer, milliseconds, number, percent, short, size, trimmed
from lightning_opt.reports.reading import Series
from lightning_opt.reports.scores import Score, comparability, listed
from lightning_opt.reports.series import smooth, sparkline, thin
from lightning_opt.reports.style import STEP_PARTS, corpus_colour, hexadecimal, role_colour

CURVE_HEADER = ("series", "points", "first", "lowest", "highest", "last", "shape")


def curve_rows(curves: Mapping[str, Series], show: Callable[[float], str] = number) -> tuple[tuple[str, ...], ...]:
    """One row for each curve: what a reader takes from it without seeing it."""
    return tuple(
        (name, integer(len(ys)), show(ys[0]), show(min(ys)), show(max(ys)), show(ys[-1]), sparkline(ys))
        for name, (_, ys) in curves.items()
        if ys
    )


def loss(key: str, title: str, x_label: str, train: Series, val: Series, caption: str) -> Figure:
    """Training loss, raw and smoothed, and validation loss.

    Args:
        key: identifier.
        title: heading.
        x_label: what the x values are, with unit.
        train: training loss in nats per token.
        val: validation loss in nats per token.
        caption: what to read.
    """
    with sheet(key) as page:
        axes = page.axes
        legend = []
        if train[0]:
            axes.plot(*thin(train), color=hexadecimal("faint"), linewidth=0.8)
            axes.plot(*thin(smooth(train), 300), color=hexadecimal("blue"), linewidth=2.2)
            legend = [Legend("training, each logged step", "faint"), Legend("training, rolling mean", "blue")]
        if val[0]:
            axes.plot(*val, color=hexadecimal("orange"), linewidth=1.4, marker="o", markersize=5)
            legend.append(Legend("validation", "orange", "dot"))
        _loss_range(axes, [train, val])
        _finish(page, x_label, "loss, nats per token")
        rows = curve_rows({"training loss": train, "validation loss": val})
        return Figure(key, title, page.svg(f"{title}. {caption}"), caption, tuple(legend), CURVE_HEADER, rows)


def corpora(key: str, curves: Mapping[str, Series], entropy: Mapping[str, float], names: Sequence[str]) -> Figure:
    """Validation loss of each corpus beside that corpus's unigram entropy.

    Args:
        key: identifier.
        curves: corpus to validation loss over steps, nats per token.
        entropy: corpus to the entropy of its token frequencies, nats per token.
        names: all corpora of the mixture, in its order (their colours follow it).
    """
    caption = (
        "Dashed: what always guessing by token frequency would cost on that corpus. Only below its dashed line has the "
        "model learned more than how often tokens occur."
    )
    with sheet(key) as page:
        legend = []
        for name in curves:
            colour = corpus_colour(list(names).index(name) if name in names else len(names))
            page.axes.plot(*thin(curves[name], 300), color=hexadecimal(colour), marker="o", markersize=4)
            if name in entropy:
                page.axes.axhline(entropy[name], color=hexadecimal(colour), linewidth=1.2, linestyle=(0, (5, 4)))
            legend.append(Legend(name, colour, "dot"))
        if entropy:
            legend.append(Legend("unigram entropy, same colour", "muted", "dashed"))
        _finish(page, "step", "validation loss, nats per token")
        title = "Validation loss by corpus"
        rows = curve_rows(curves)
        return Figure(key, title, page.svg(f"{title}. {caption}"), caption, tuple(legend), CURVE_HEADER, rows)


def rates(key: str, curves: Mapping[str, Series], warmup: float | None) -> Figure:
    """Learning rate of each role; roles whose curves are equal share one.

    Args:
        key: identifier.
        curves: role to rate over steps.
        warmup: last step of the warm-up, marked when known.
    """
    groups: dict[tuple[tuple[float, ...], tuple[float, ...]], list[str]] = {}
    for role, (xs, ys) in curves.items():
        groups.setdefault((tuple(xs), tuple(ys)), []).append(role)
    merged = {" · ".join(roles): curves[roles[0]] for roles in groups.values()}
    with sheet(key) as page:
        legend = []
        for label, series in merged.items():
            colour = role_colour(label.split(" · ")[0])
            page.axes.plot(*thin(series, 300), color=hexadecimal(colour), linewidth=2)
            legend.append(Legend(label, colour))
        if warmup:
            page.axes.axvline(warmup, color=hexadecimal("faint"), linewidth=1.2, linestyle=(0, (2, 3)))
            legend.append(Legend("end of warm-up", "faint", "dashed"))
        page.axes.set_ylim(bottom=0)
        _finish(page, "step", "learning rate")
        caption = "The rate each role was given; roles with the same rate share a line."
        rows = curve_rows(merged, trimmed)
        title = "Learning rate by role"
        return Figure(key, title, page.svg(f"{title}. {caption}"), caption, tuple(legend), CURVE_HEADER, rows)


def throughput(key: str, speed: Series, middle: float | None) -> Figure:
    """Tokens per second per device over the run, with its median."""
    with sheet(key) as page:
        page.axes.plot(*thin(speed), color=hexadecimal("blue"), linewidth=1.4)
        legend = [Legend("mean since the last logged step", "blue")]
        if middle is not None:
            page.axes.axhline(middle, color=hexadecimal("muted"), linewidth=1.2, linestyle=(0, (5, 4)))
            legend.append(Legend(f"median {short(middle)}", "muted", "dashed"))
        page.axes.set_ylim(0, 1.12 * max(speed[1]))
        _finish(page, "step", "tokens per second per device")
        caption = (
            "A flat line is a healthy run; dips are slow steps or a busy machine. Validation and saving do not count."
        )
        rows = curve_rows({"tokens/s per device": speed}, short)
        title = "Speed"
        return Figure(key, title, page.svg(f"{title}. {caption}"), caption, tuple(legend), CURVE_HEADER, rows)


def step_split(key: str, steps: Sequence[float], parts: Mapping[str, Sequence[float]]) -> Figure:
    """Where a step's time goes, stacked over the run.

    Args:
        key: identifier.
        steps: step numbers.
        parts: part of the step (names of `style.STEP_PARTS`) to milliseconds at these steps.
    """
    total = [sum(values) for values in zip(*parts.values(), strict=True)]
    kept = range(len(steps))
    if len(steps) > 160:  # each shown point is the mean of its stretch
        stretches = [range(i * len(steps) // 160, (i + 1) * len(steps) // 160) for i in range(160)]
    else:
        stretches = [range(i, i + 1) for i in kept]
    xs = [steps[stretch[-1]] for stretch in stretches]
    means = {name: [sum(ms[i] for i in span) / len(span) for span in stretches] for name, ms in parts.items()}
    with sheet(key) as page:
        colours = [hexadecimal(STEP_PARTS[name]) for name in means]
        page.axes.stackplot(xs, *means.values(), colors=colours, linewidth=0)
        page.axes.set_ylim(0, 1.08 * max(sum(values) for values in zip(*means.values(), strict=True)))
        _finish(page, "step", "time of a step, ms")
        rows = []
        for name, values in parts.items():
            share = sum(values) / sum(total) if sum(total) else 0.0
            rows.append((name, milliseconds(_median(values)), f"{100 * share:.1f} %", sparkline(list(values))))
        shares = {row[0]: row[2] for row in rows}
        caption = "Share of the time: " + ", ".join(f"{name} {share}" for name, share in shares.items()) + "."
        legend = tuple(Legend(name, STEP_PARTS[name], "area") for name in reversed(list(parts)))
        title = "Where a step's time goes"
        header = ("part", "median", "share of time", "shape")
        return Figure(key, title, page.svg(f"{title}. {caption}"), caption, legend, header, tuple(rows))


def memory_over_time(key: str, curves: Mapping[str, Series], colours: Mapping[str, str]) -> Figure:
    """Memory over the run, in the binary unit that suits its height.

    Args:
        key: identifier.
        curves: what is measured to bytes over steps.
        colours: the same keys to colour names.
    """
    top = max(max(ys) for _, ys in curves.values())
    unit, divisor = ("GiB", 2**30) if top >= 2**30 else ("MiB", 2**20)
    with sheet(key) as page:
        for name, (xs, ys) in curves.items():
            page.axes.plot(*thin((xs, [y / divisor for y in ys]), 300), color=hexadecimal(colours[name]))
        page.axes.set_ylim(0, 1.12 * top / divisor or 1)
        _finish(page, "step", f"memory on one device, {unit}")
        caption = "Flat is healthy; a steady climb is a leak."
        legend = tuple(Legend(name, colours[name]) for name in curves)
        title = "Memory over the run"
        rows = curve_rows(curves, size)
        return Figure(key, title, page.svg(f"{title}. {caption}"), caption, legend, CURVE_HEADER, rows)


def memory(key: str, bars: Mapping[str, float], colours: Mapping[str, str]) -> Figure:
    """Memory as bars with their values.

    Args:
        key: identifier.
        bars: what is measured to bytes.
        colours: the same keys to colour names.
    """
    with sheet(key, left=142, right=84) as page:
        axes = page.axes
        places = range(len(bars))
        axes.barh(list(places), list(bars.values()), height=0.56, color=[hexadecimal(colours[name]) for name in bars])
        axes.set_yticks(list(places), list(bars))
        axes.tick_params(axis="y", labelcolor=hexadecimal("ink"))
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks([])
        axes.set_ylim(max(len(bars), 3) - 0.4, -0.6)
        top = max(bars.values()) or 1.0
        axes.set_xlim(0, top)
        for place, value in zip(places, bars.values(), strict=True):
            axes.text(value + 0.02 * top, place, size(value), va="center", color=hexadecimal("ink"))
        page.label("", "bytes on one device")
        caption = "Peak is the highest moment of the run; the optimizer's state is part of what is allocated."
        rows = tuple((name, size(value), integer(value)) for name, value in bars.items())
        title = "Memory"
        header = ("measure", "size", "bytes")
        return Figure(key, title, page.svg(f"{title}. {caption}"), caption, (), header, rows)


def gradient_norm(key: str, norm: Series, limit: float | None) -> Figure:
    """Gradient norm over all parameters before clipping, on a logarithmic scale.

    Args:
        key: identifier.
        norm: the norm over steps.
        limit: the clipping limit, marked when there is one.
    """
    with sheet(key) as page:
        norm = _positive(norm)
        page.axes.plot(*thin(norm), color=hexadecimal("faint"), linewidth=0.8)
        page.axes.plot(*thin(smooth(norm), 300), color=hexadecimal("ink"), linewidth=1.8)
        legend = [Legend("each logged step", "faint"), Legend("rolling mean", "ink")]
        caption = "Steady or slowly falling is healthy; a rise over many steps or tall spikes announce trouble."
        if limit:
            page.axes.axhline(limit, color=hexadecimal("bad"), linewidth=1.2, linestyle=(0, (5, 4)))
            legend.append(Legend(f"clipping limit {trimmed(limit)}", "bad", "dashed"))
            clipped = sum(value > limit for value in norm[1])
            caption += f" Above the limit in {percent(clipped / max(1, len(norm[1])))} of the logged steps."
        _log_axis(page.axes)
        _finish(page, "step", "gradient norm before clipping")
        rows = curve_rows({"all parameters": norm})
        title = "Gradient norm"
        return Figure(key, title, page.svg(f"{title}. {caption}"), caption, tuple(legend), CURVE_HEADER, rows)


def norms_by_role(key: str, title: str, y_label: str, caption: str, curves: Mapping[str, Series]) -> Figure:
    """A norm of each role (of gradients or of updates), smoothed, on a logarithmic scale."""
    with sheet(key) as page:
        for role, series in curves.items():
            smoothed = smooth(_positive(series))
            page.axes.plot(*thin(smoothed, 300), color=hexadecimal(role_colour(role)))
        _log_axis(page.axes)
        _finish(page, "step", y_label)
        legend = tuple(Legend(role, role_colour(role)) for role in curves)
        return Figure(key, title, page.svg(f"{title}. {caption}"), caption, legend, CURVE_HEADER, curve_rows(curves))


def by_third(
    key: str, title: str, series: Series, means: Sequence[float | None], end: float, y_label: str, caption: str
) -> Figure:
    """A measure of stability over the run with its mean in each third.

    Args:
        key: identifier.
        title: heading.
        series: the measure over steps.
        means: its mean in the first, second and last third.
        end: last step of the run.
        y_label: the measure with its unit.
        caption: what to read.
    """
    with sheet(key) as page:
        axes = page.axes
        axes.plot(*thin(series), color=hexadecimal("faint"), linewidth=0.9)
        for i, mean in enumerate(means):
            if mean is not None:
                axes.plot([end * i / 3, end * (i + 1) / 3], [mean, mean], color=hexadecimal("pink"), linewidth=2.6)
        _robust_top(axes, series[1], [mean for mean in means if mean is not None])
        _finish(page, "step", y_label)
        rows = curve_rows({title.lower(): series})
        thirds = ", ".join(number(mean, 3) for mean in means)
        legend = (Legend("each logged step", "faint"), Legend("mean of each third of the run", "pink"))
        caption = f"{caption} By third of the run: {thirds}."
        return Figure(key, title, page.svg(f"{title}. {caption}"), caption, legend, CURVE_HEADER, rows)


def scores(key: str, entries: Sequence[Score]) -> Figure:
    """Scores as dots with two standard errors each way, and chance as a tick."""
    shown = [entry for entry in entries if entry.counts]
    colours = {"above": "good", "below": "bad", "same": "muted", "unknown": "muted"}
    with sheet(key, left=108, right=72) as page:
        axes = page.axes
        for place, entry in enumerate(shown):
            colour = hexadecimal(colours[entry.judgement])
            value = entry.value or 0.0
            if entry.chance is not None:
                axes.plot([entry.chance] * 2, [place - 0.3, place + 0.3], color=hexadecimal("ink"), linewidth=2)
            if entry.stderr:
                low, high = max(0.0, value - 2 * entry.stderr), min(1.0, value + 2 * entry.stderr)
                axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot([value], [place], color=colour, marker="o", markersize=8, clip_on=False)
            axes.text(1.03, place, entry.measured.split(" ±")[0], va="center", transform=axes.get_yaxis_transform())
        axes.set_yticks(range(len(shown)), [entry.title for entry in shown])
        axes.tick_params(axis="y", labelcolor=hexadecimal("ink"), pad=9)  # a dot at 0 must not touch the name
        axes.set_ylim(max(len(shown), 3) - 0.4, -0.6)
        top = max([min(1.0, (e.value or 0) + 2 * (e.stderr or 0)) for e in shown] + [e.chance or 0 for e in shown])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
        axes.set_xlim(0, min(1.0, max(0.5, 0.1 * (int(10 * top) + 1))))
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        page.label("score", "")
        caption = "Bars reach two standard errors each way. A bar that touches its tick cannot be told from guessing"
        certain = [entry.title for entry in shown if entry.chance == 0]
        caption += f", but for {listed(certain)}: guessing scores exactly 0 there." if certain else "."
        caption = f"{caption} {comparability(shown)}"
        legend = (Legend("better than chance", "good", "dot"), Legend("no difference shown", "muted", "dot"))
        if any(entry.judgement == "below" for entry in shown):
            legend = (*legend, Legend("worse than chance", "bad", "dot"))
        rows = tuple(
            (e.title, e.measured, "not stated" if e.chance is None else trimmed(e.chance, 3), e.words) for e in shown
        )
        header = ("task", "score", "chance", "difference")
        legend = (*legend, Legend("chance", "ink", "tick"))
        return Figure(key, "Scores against chance", page.svg(caption), caption, legend, header, rows)


_UNITS = {"time, hours": 3600.0, "time, minutes": 60.0, "time, seconds": 1.0}
_FLOPS = {"TFLOP": 1e12, "PFLOP": 1e15, "EFLOP": 1e18, "ZFLOP": 1e21}
_UNITS |= {f"training compute, {unit}": size for unit, size in _FLOPS.items()}


def time_label(seconds: Sequence[float]) -> str:
    """Axis label with the unit that suits a run of this length."""
    last = max(seconds, default=0.0)
    return "time, hours" if last >= 3 * 3600 else "time, minutes" if last >= 180 else "time, seconds"


def flops_label(operations: Sequence[float]) -> str:
    """Axis label with the unit that suits so many floating-point operations."""
    last = max(operations, default=0.0)
    unit = max((name for name, size in _FLOPS.items() if last >= size), key=_FLOPS.__getitem__, default="TFLOP")
    return f"training compute, {unit}"


def unit_of(label: str) -> float:
    """Seconds, or operations, in the unit of a `time_label` or a `flops_label`."""
    return _UNITS[label]


def in_unit(series: Series, label: str) -> Series:
    """A curve over seconds or operations as one over the unit of such a label."""
    return [x / _UNITS[label] for x in series[0]], series[1]


def _finish(page: Sheet, x: str, y: str) -> None:
    page.axes.margins(x=0.01)
    page.ticks()
    page.label(x, y)


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high / max(low, 1e-300) < 300 else (1,), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())


def _loss_range(axes: Axes, curves: Sequence[Series]) -> None:
    """Shows the curve, not one spike: the top is the highest of the first tenth or of the 98th percentile."""
    values = sorted(y for _, ys in curves for y in ys)
    firsts = [y for _, ys in curves for y in ys[: max(1, len(ys) // 10)]]
    if values:
        top = max([values[int(0.98 * (len(values) - 1))], *firsts])
        axes.set_ylim(values[0] - 0.06 * (top - values[0] or 1), top + 0.06 * (top - values[0] or 1))


def _robust_top(axes: Axes, values: Sequence[float], means: Sequence[float]) -> None:
    """Cuts at the 98th percentile, so that the first steps do not flatten the rest."""
    ordered = sorted(values)
    top = max([ordered[int(0.98 * (len(ordered) - 1))], *means, 1e-12])
    axes.set_ylim(min(0.0, ordered[0]), 1.1 * top)


def _positive(series: Series) -> Series:
    kept = [(x, y) for x, y in zip(*series, strict=True) if y > 0]
    return [x for x, _ in kept], [y for _, y in kept]


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
