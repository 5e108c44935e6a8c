"""Fixtures of the callbacks' tests."""

from __future__ import annotations

import pytest
from foreign_project import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    """Seconds that pass only when told."""
    return FakeClock()
