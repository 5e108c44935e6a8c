"""The page of `benchmarks.mfu`: what ours is compared with."""

from __future__ import annotations

from benchmarks import mfu


def test_the_rival_is_the_faster_trainer_and_named() -> None:
    common = {"model": "nano", "flops_per_token": 1, "mfu": None, "peak_gib": None, "global_batch": 2, "micro_batch": 1}
    common |= {"step_ms": 1.0, "step_ms_p10": 1.0, "step_ms_p90": 1.0, "first_step_s": 1.0, "steps": 3}
    common |= {"optimizer": "fused", "length": 8, "device": "a GPU"}
    speeds = {"ours-adamw": 300.0, "trainer": 100.0, "trainer-compiled": 200.0}
    rows = {f"nano {name}": {**common, "contender": name, "tokens_per_s": speed} for name, speed in speeds.items()}
    shown = {row["contender"]: row["against the faster Trainer"] for row in mfu.page(rows).tables[0].rows}
    assert shown == {"ours-adamw": "1.50x (trainer-compiled)", "trainer": None, "trainer-compiled": None}
    del rows["nano trainer-compiled"]
    assert mfu.page(rows).tables[0].rows[0]["against the faster Trainer"] == "3.00x (trainer)"
