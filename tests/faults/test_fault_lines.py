"""`pytest --faults` says the truth about every row: pytest runs it on small suites of our making."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest_plugins = "pytester"

SUITE = """
import pytest

@pytest.mark.fault(1, "one")
def test_good(): pass

@pytest.mark.slow
@pytest.mark.fault(1, "one")
def test_slow(): pass

@pytest.mark.fault(2, "two")
@pytest.mark.parametrize("bad", [False, True])
def test_half_bad(bad): assert not bad

@pytest.fixture
def broken():
    yield
    raise RuntimeError

@pytest.mark.fault(3, "three")
def test_bad_at_its_end(broken): pass

@pytest.mark.fault(4, "four")
@pytest.mark.skip(reason="no device")
def test_skipped(): pass

@pytest.mark.fault(6, "six")
@pytest.mark.fault(7, "seven")
def test_of_two_rows(): pass

@pytest.mark.fault(7, "seven")
def test_partly(): pytest.skip("too small")

@pytest.mark.fault(99, "of a later part")
def test_later(): pass

@pytest.mark.fault(98, "unraisable")
@pytest.mark.xfail(strict=True)
def test_wrongly_good(): pass

def test_none(): raise RuntimeError("is no fault test")
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text(encoding="utf-8"))
    pytester.makeini("[pytest]\nmarkers =\n  fault\n  slow")
    pytester.makepyfile(SUITE)
    return pytester


def rows(lines: list[str]) -> dict[int, tuple[int, str]]:
    """Number of tests and state by row."""
    found = [re.fullmatch(r" *(\d+)  .*?(\d+) tests? +(.*)", line) for line in lines]
    return {int(match[1]): (int(match[2]), match[3]) for match in found if match}


@pytest.mark.parametrize("processes", [(), pytest.param(("-n", "2"), marks=pytest.mark.slow)], ids=["alone", "xdist"])
def test_one_line_per_row(suite: pytest.Pytester, processes: tuple[str, ...]) -> None:
    result = suite.runpytest("--faults", *processes)
    told = rows(result.outlines)
    assert told[1] == (2, "PASSED")
    assert told[2] == (2, "FAILED: 1 of 2")
    assert told[3] == (1, "FAILED: 1 of 1")
    assert told[4] == (1, "skipped: no device")
    assert told[6] == (1, "PASSED")
    assert told[7] == (2, "PASSED, 1 skipped: too small")
    assert told[99] == (1, "PASSED")
    assert told[98] == (1, "FAILED: 1 of 1")
    assert told[10] == (0, "FAILED: no test")
    assert "row 10 has no test" in result.outlines
    assert "test_none" not in "\n".join(result.outlines)
    assert result.ret != 0


def test_a_row_without_a_test_fails_the_command(suite: pytest.Pytester) -> None:
    for old in suite.path.glob("test_*.py"):
        old.unlink()
    suite.makepyfile("import pytest\n@pytest.mark.fault(1, 'one')\ndef test_good(): pass")
    result = suite.runpytest("--faults")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "only 1 rows have a quick test, not 10" in result.outlines
    chosen = suite.runpytest("--faults", "-k", "good")
    assert chosen.ret == 0
    assert rows(chosen.outlines) == {1: (1, "PASSED")}


def test_what_did_not_run_did_not_pass(suite: pytest.Pytester) -> None:
    assert rows(suite.runpytest("--faults", "-k", "good", "--collect-only").outlines)[1] == (1, "not run: 1 of 1")


def test_without_the_option_nothing_changes(suite: pytest.Pytester) -> None:
    result = suite.runpytest("-k", "test_good or test_none")
    result.assert_outcomes(passed=1, failed=1)
    assert not rows(result.outlines)
