"""The moving line of a terminal, drawn by rich; without rich there is none and plain lines serve."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from lightning_opt.callbacks.plain_lines import number
from lightning_opt.plan import duration

BAR_WIDTH = 12
ORDER = ("step", "percent", "loss", "val", "lr", "grad", "speed", "eta")


class LiveBar:
    """One bar: step, loss, validation loss, rate, tokens/s, ETA. It redraws only when told, in the caller's thread.

    Args:
        display: a `rich.progress.Progress`.
        total: optimizer steps of the run; ``None`` if unknown.
        step: those already done.
    """

    def __init__(self, display: Any, total: int | None, step: int) -> None:
        self._display, self._total, self._fields, self._note = display, total, {}, ""
        self._task = display.add_task("", total=total, completed=step, text="")
        with self._while_seen():
            display.start()

    @classmethod
    def on(cls, stream: TextIO, total: int | None, step: int) -> LiveBar | None:
        """A bar on this stream, or ``None`` where plain lines are right: no terminal, a dumb one, or no rich."""
        if not getattr(stream, "isatty", lambda: False)() or os.environ.get("TERM") == "dumb":
            return None
        try:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Display
            from rich.table import Column
        except ImportError:
            return None
        text = TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True, overflow="crop"))
        console = Console(file=stream)
        console.on_broken_pipe = lambda: setattr(console, "quiet", True)  # type: ignore[method-assign]  # rich would exit
        display = Display(BarColumn(BAR_WIDTH), text, console=console, auto_refresh=False)
        return cls(display, total, step)

    def update(
        self,
        step: int,
        *,
        eta: float | None = None,
        fields: dict[str, str] | None = None,
        val: float | None = None,
        note: str | None = None,
    ) -> None:
        """Redraws.

        Args:
            step: optimizer steps done.
            eta: seconds left.
            fields: the texts of the last line, by name; kept until the next.
            val: validation loss.
            note: what happens instead of training; kept until replaced.
        """
        self._fields = dict(fields) if fields is not None else self._fields
        self._fields["step"] = f"step {step}/{self._total}" if self._total else f"step {step}"
        if self._total:
            self._fields["percent"] = f"{100 * step // self._total}%"
        if eta is not None:
            self._fields["eta"] = f"ETA {duration(eta)}"
        if val is not None:
            self._fields["val"] = f"val {number(val)}"
        self._note = self._note if note is None else note
        self._display.update(self._task, completed=step, text=self._fit(self._display.console.width - BAR_WIDTH - 2))
        with self._while_seen():
            self._display.refresh()

    def _fit(self, width: int) -> str:
        names = [name for name in ORDER if name in self._fields]
        for unneeded in (None, "lr", "percent", "grad", "speed", "val"):
            names = [name for name in names if name != unneeded]
            text = "  ".join([self._fields[name] for name in names] + [self._note] * bool(self._note))
            if len(text) <= width:
                break
        return text

    def close(self) -> None:
        """Draws for the last time and gives the terminal back."""
        with self._while_seen():
            self._display.stop()

    @contextmanager
    def _while_seen(self) -> Iterator[None]:
        """A terminal that is gone ends the drawing, not the run."""
        try:
            yield
        except OSError:
            self._display.console.quiet = True
