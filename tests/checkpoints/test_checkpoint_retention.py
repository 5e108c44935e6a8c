"""Which checkpoints stay, decided by manifests; and what needs no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_opt.checkpoints import Checkpoint, Retention, Store, bytes_needed, find


def made(step: int, value: float | None, name: str = "val/loss") -> Checkpoint:
    return Checkpoint(Path(f"step-{step:06d}"), step, {"metric": {"name": name, "value": value}})


def test_last_best_and_every_n() -> None:
    losses = {10: 3.0, 20: 1.0, 30: None, 40: 1.0, 50: 2.0, 60: 5.0}
    checkpoints = [made(step, loss) for step, loss in losses.items()]
    assert Retention(1, 0).kept(checkpoints) == {60}
    assert Retention(2, 1).kept(checkpoints) == {60, 50, 40}
    assert Retention(2, 2).kept(checkpoints) == {60, 50, 40, 20}
    assert Retention(1, 0, 20).kept(checkpoints) == {60, 40, 20}
    assert Retention(1, 9).kept(checkpoints) == {10, 20, 40, 50, 60}
    assert Retention(1, 1, None, "accuracy").kept(checkpoints) == {60}
    assert Retention().kept([]) == set()


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(1, 60), st.none() | st.integers(0, 5).map(float), max_size=40),
    st.integers(1, 4),
    st.integers(0, 3),
    st.none() | st.integers(1, 20),
)
def test_never_more_than_was_said_and_the_newest_always(losses: dict, last: int, best: int, every: int | None) -> None:
    retention, present = Retention(last, best, every), {}
    for step in sorted(losses):  # as a run goes: each save thins out what is there
        present[step] = made(step, losses[step])
        kept = retention.kept(list(present.values()))
        assert step in kept
        assert retention.kept([present[k] for k in kept]) == kept
        assert len(kept) <= retention.most(step)
        present = {k: present[k] for k in kept}
    known = [loss for loss in losses.values() if loss is not None]
    if best and known:
        assert min(known) in {c.metric("val/loss") for c in present.values()}


def test_the_estimate_covers_a_real_one(tmp_path: Path) -> None:
    weights = {f"layer.{i}": torch.randn(100) for i in range(200)}
    moments = {i: {"step": 3, "exp_avg": torch.randn(100), "exp_avg_sq": torch.randn(100)} for i in range(200)}
    store = Store(tmp_path, keep_last=2, keep_best=0)
    tree: dict[str, Any] = {"state_dict": weights, "optimizer_states": [{"state": moments}]}
    for step in range(1, 6):
        store.save(tree, step=step, meta={}, wait=True)
    used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    one = find(tmp_path)[0].bytes
    assert used >= 2 * one
    assert used + one <= bytes_needed(4 * 100 * 200, 8 * 100 * 200, Retention(2, 0).most(5))
    assert bytes_needed(4 * 10**9, 8 * 10**9, 3) < 1.01 * 48e9


def test_finding_and_checking_needs_no_torch(tmp_path: Path, repository: Path) -> None:
    Store(tmp_path).save({"state_dict": {"w": torch.ones(3)}}, step=4, meta={"identity": {}}, wait=True)
    code = f"""
import sys
from lightning_opt.checkpoints import Damaged, Retention, bytes_needed, find, newest_good, verify
assert [c.step for c in find({str(tmp_path)!r})] == [4]
assert verify({str(tmp_path / "step-000004")!r}) == newest_good({str(tmp_path)!r}, print)
print(sorted({{"torch", "safetensors", "lightning"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
