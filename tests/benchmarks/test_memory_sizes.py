"""What optimizers hold by model size, against counts made by hand."""

from __future__ import annotations

import pytest

from benchmarks import memory_sizes

PICO = 1024 * 64 + 4 * (3 * 64 * 176 + 4 * 64 * 64) + 9 * 64  # embedding, layers, norms
HIDDEN = 4 * (3 * 64 * 176 + 4 * 64 * 64)


@pytest.fixture(scope="module")
def pico():
    return memory_sizes.on_meta("pico")


def test_state_bytes_are_those_of_each_role(pico) -> None:
    assert sum(p.numel() for p in pico.parameters()) == PICO
    assert memory_sizes.state_bytes(pico, "sgd", "float32") == 0
    assert memory_sizes.state_bytes(pico, "adamw", "float32") == 8 * PICO
    assert memory_sizes.state_bytes(pico, "lion", "bfloat16") == 2 * PICO
    assert memory_sizes.state_bytes(pico, "muon", "float32") == 4 * HIDDEN + 8 * (PICO - HIDDEN)
    assert memory_sizes.state_bytes(pico, "muon", "int8") is None
    assert memory_sizes.state_bytes(pico, "lion", "int8") == HIDDEN + 4 * HIDDEN // 256 + 4 * (PICO - HIDDEN)


def test_the_table_has_a_column_for_each_size() -> None:
    rows = memory_sizes.by_size(["pico", "nano"], ["lion"])
    assert [row["state"] for row in rows] == ["float32", "bfloat16", "int8"]
    assert rows[0]["pico (0.27M)"] == "4.00 (33%)"
    assert list(rows[0])[2:] == ["pico (0.27M)", "nano (1.07M)"]


def test_what_can_be_true_of_the_claim() -> None:
    saved = {row["what is kept"]: row["Lion less"] for row in memory_sizes.claims()}
    assert saved["weights, gradients and states in float32"] == "25%"
    assert saved["bfloat16 weights, gradients released, float32 states"] == "40%"
    assert saved["the states alone"] == "50%"
