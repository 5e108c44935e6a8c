"""`pytest --faults` tells how each fault row stands, one line a row: see `make faults`.

A fault test is one marked ``fault(ROW, "the fault and what must hold")``, wherever it is. The rows are those of our
list of faults that training runs meet; numbers that are missing here come in later parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pytest

ROWS = {
    1: "2N steps, or N, a stop and N more: the same bits",
    2: "resume inside an epoch and at its end: no sample repeated or lost",
    3: "stop within an accumulation window: saved at step boundaries only, exact",
    4: "0, 1 or 4 loader workers: one order of samples",
    6: "kill -9 while a checkpoint is written: the last good one loads",
    7: "a damaged checkpoint: the one before it is used, a named one refused",
    8: "the disk is full: earlier checkpoints stay, the next interval tries again",
    9: "a folder that cannot be written: refused at start, never silent success",
    10: "SIGTERM: the step ends, a checkpoint, exit 143, the same command goes on",
    11: "SIGUSR1, a second signal, signals to workers: one save, no harm",
    12: "Ctrl-C: a checkpoint, the summary so far, the resume command, exit 130",
    13: "a loss that is not finite: no update, all named, exit 3",
    14: "an infinite gradient on one rank: all ranks decide alike",
    15: "a spike skipped: weights and states untouched, counted, remembered",
    16: "spikes in a row: back to a good checkpoint, past the batches, n times at most",
    19: "resume with another seed, data, batch or length: refused by name",
    20: "resume with another optimizer: a clear refusal",
    21: "a malicious pickle as checkpoint: refused, nothing runs",
    22: "every file we write loads as tensors and plain types",
    30: "max_steps=N with accumulation: exactly N steps",
    34: "secrets by override, environment, resolver: in no file, log or page",
}
"""Rows that must have a test."""

QUICK_ROWS = 10
"""Rows that must have a test in the fast tier."""


@dataclass
class Row:
    """What is known of one fault.

    Attributes:
        line: the fault and what must hold.
        tests: how many there are.
        quick: how many of them belong to the fast tier.
        outcomes: of those that ran.
        reasons: why some were skipped.
    """

    line: str
    tests: int = 0
    quick: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: set[str] = field(default_factory=set)

    @property
    def state(self) -> str:
        """``PASSED``, ``FAILED`` or ``skipped``, with what there is to say about it."""
        if not self.tests:
            return "FAILED: no test"
        if self.outcomes["failed"]:
            return f"FAILED: {self.outcomes['failed']} of {self.tests}"
        if left := self.tests - self.outcomes.total():
            return f"not run: {left} of {self.tests}"
        reasons, passed = f"skipped: {'; '.join(sorted(self.reasons))}", self.outcomes["passed"]
        if not self.outcomes["skipped"]:
            return "PASSED"
        return f"PASSED, {self.outcomes['skipped']} {reasons}" if passed else reasons


class FaultLines:
    """Runs only fault tests and ends with one line per row.

    Args:
        whole: whether every row must have a test; else only the rows that were chosen are told.
    """

    def __init__(self, whole: bool) -> None:
        self._whole = whole
        self.rows = {number: Row(line) for number, line in ROWS.items()} if whole else {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leaves out what is no fault test."""
        config.hook.pytest_deselected(items=[item for item in items if not item.get_closest_marker("fault")])
        items[:] = [item for item in items if item.get_closest_marker("fault")]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Counts the tests of each row."""
        for item in session.items:
            for number, line in _faults(item):
                row = self.rows.setdefault(number, Row(ROWS.get(number, line)))
                row.tests += 1
                row.quick += item.get_closest_marker("slow") is None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        """Writes the rows on the report: where tests run in other processes, this is all that comes from there."""
        report = yield
        rows = ((number, self.rows[number]) for number, _ in _faults(item))
        report.faults = [(number, row.line, row.tests, row.quick) for number, row in rows]
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test passed when its call did and neither set-up nor tear-down failed."""
        outcome = "failed" if report.failed else report.outcome if report.when == "call" or report.skipped else None
        for number, line, tests, quick in getattr(report, "faults", ()) if outcome else ():
            row = self.rows.setdefault(number, Row(line))
            row.tests, row.quick = tests, quick
            if report.when == "teardown":  # only a failed one comes here: its call was counted as passed
                row.outcomes["passed"] -= 1
            row.outcomes[outcome] += 1
            if report.skipped:
                row.reasons.add(_reason(report))

    @property
    def missing(self) -> list[str]:
        """What the whole list lacks."""
        if not self._whole:
            return []
        lacking = [f"row {number} has no test" for number, row in self.rows.items() if not row.tests]
        quick = sum(bool(row.quick) for row in self.rows.values())
        return lacking + ([f"only {quick} rows have a quick test, not {QUICK_ROWS}"] if quick < QUICK_ROWS else [])

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A row without a test is a failure."""
        if self.missing and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """One line per row."""
        terminalreporter.section("faults")
        for line in table(self.rows):
            terminalreporter.line(line)
        for line in self.missing:
            terminalreporter.line(line, red=True)


def table(rows: dict[int, Row]) -> Iterable[str]:
    """Number, what, how many tests, and how it went."""
    width = max((len(row.line) for row in rows.values()), default=0)
    for number, row in sorted(rows.items()):
        yield f"{number:3}  {row.line:{width}}  {row.tests:3} test{'s' if row.tests != 1 else ' '}  {row.state}"


def _faults(item: pytest.Item) -> list[tuple[int, str]]:
    """Row and line of every ``fault`` mark of a test, each row once."""
    marks = (mark.args for mark in item.iter_markers("fault"))
    return list({number: (number, line) for number, line in marks}.values())


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return getattr(report, "wasxfail", "") or str(report.longrepr)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", action="store_true", help="run the fault tests and tell how each row stands")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--faults", default=False):
        whole = not (config.option.keyword or config.option.markexpr) and not any("::" in arg for arg in config.args)
        config.pluginmanager.register(FaultLines(whole), "fault-lines")
