"""Run folders for the tests of this room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic_run import build_run


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    return build_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report written; tests only read it."""
    from lightning_opt import reports

    folder = build_run(tmp_path_factory.mktemp("runs") / "20260101T120000Z-1a2b3c4d")
    reports.write(folder)
    return folder
