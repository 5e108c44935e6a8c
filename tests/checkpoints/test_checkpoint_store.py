"""What goes in comes out, the loop waits for the copy only, and the folder holds what it should."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model
from torch import nn

from lightning_opt import checkpoints
from lightning_opt.checkpoints import Store, store
from lightning_opt.checkpoints.contents import same
from lightning_opt.plan import ConfigError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def get_extra_state(self) -> dict[str, Any]:
        return {"seen": torch.tensor([3]), "name": "tied"}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.extra = state


def whole_tree() -> dict[str, Any]:
    return {
        "state_dict": Tied().state_dict(),
        "plain": [None, True, 2**70, -0.5, float("inf"), "ü\ud800", b"\0x", (1, (2,)), {3, 4}, 1 + 2j, torch.bfloat16],
        "keys": OrderedDict([(1, "one"), ("1", torch.ones(1)), ((2, "b"), 2), (None, 3)]),
        "tensors": {
            "scalar": torch.tensor(float("nan")),
            "empty": torch.empty(0, 3),
            "half": torch.randn(3).bfloat16(),
            "small": torch.randn(4).to(torch.float8_e4m3fn),
            "random state": torch.get_rng_state(),
            "transposed": torch.randn(3, 4).t(),
            "expanded": torch.randn(1).expand(3),
            "a view": torch.arange(100)[3:5],
            "learned": nn.Parameter(torch.randn(2)),
        },
    }


def save(root: Path, tree: dict[str, Any], step: int = 1, **options: Any) -> Path:
    writer = Store(root, **options)
    writer.save(tree, step=step, meta={"identity": {"seed": 1}, "metrics": {"val/loss": float("nan")}}, wait=True)
    assert writer.saved == [step]
    return root / f"step-{step:06d}"


def test_every_bit_comes_back(tmp_path: Path) -> None:
    tree = whole_tree()
    back = checkpoints.read(save(tmp_path, tree))
    assert same({**tree, "tensors": {**tree["tensors"], "learned": tree["tensors"]["learned"].detach()}}, back)
    assert list(back["state_dict"]) == list(tree["state_dict"])
    assert back["state_dict"]._metadata == tree["state_dict"]._metadata
    assert back["tensors"]["transposed"].stride() == tree["tensors"]["transposed"].stride()
    assert not back["tensors"]["learned"].requires_grad
    model = Tied()
    model.load_state_dict(back["state_dict"])
    assert model.extra["name"] == "tied"


@pytest.mark.parametrize("change", [("plain", 1, False), ("plain", 9, 1 + 3j), ("plain", 0, 0)])
def test_same_sees_a_difference(change: tuple[str, int, Any]) -> None:
    one, other = whole_tree(), whole_tree()
    assert not same(one, other)  # other random numbers
    other = {**one, "plain": list(one["plain"])}
    assert same(one, other)
    other[change[0]][change[1]] = change[2]
    assert not same(one, other)
    assert not same(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    assert not same({"a": 1, "b": 2}, {"b": 2, "a": 1})


def test_tied_weights_are_stored_once_as_safetensors_has_it(tmp_path: Path) -> None:
    tied = Tied()
    tied.get_extra_state = lambda: None
    tree = {"state_dict": {name: v for name, v in tied.state_dict().items() if name != "_extra_state"}}
    path = save(tmp_path, tree)
    assert (path / "model.safetensors").stat().st_size < 4 * (7 * 5 + 4 * 5 + 2) + 1000
    back = checkpoints.read(path)["state_dict"]
    assert back["head.weight"] is back["embedding.weight"]
    plain = nn.ModuleDict({"embedding": nn.Embedding(7, 5), "norm": nn.BatchNorm1d(5), "head": nn.Linear(5, 7, False)})
    plain["head"].weight = plain["embedding"].weight
    load_model(plain, path / "model.safetensors")  # the library's own reader
    assert torch.equal(plain["head"].weight, tied.head.weight)


def test_a_snapshot_is_of_its_moment_and_the_loop_does_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, real = threading.Event(), store.write

    def slow_write(*arguments: Any, **options: Any) -> Any:
        assert slow.wait(60)
        return real(*arguments, **options)

    monkeypatch.setattr(store, "write", slow_write)
    weights, inner = torch.zeros(1000), [1]
    writer = Store(tmp_path)
    writer.save({"state_dict": {"w": weights}, "inner": inner}, step=1, meta={})
    assert not checkpoints.find(tmp_path)
    weights.fill_(9)
    inner.append(2)
    later = threading.Thread(target=writer.save, args=({"state_dict": {"w": weights}},), kwargs={"step": 2, "meta": {}})
    later.start()
    time.sleep(0.05)
    assert later.is_alive()  # the second waits for the first, whose memory it will use
    slow.set()
    later.join(60)
    writer.close()
    first, second = checkpoints.read(tmp_path / "step-000001"), checkpoints.read(tmp_path / "step-000002")
    assert first["inner"] == [1]
    assert first["state_dict"]["w"].eq(0).all()
    assert second["state_dict"]["w"].eq(9).all()


def test_the_second_copy_allocates_nothing() -> None:
    from lightning_opt.checkpoints.staging import Staging

    staging, tree = Staging(), {"a": torch.zeros(3), "b": [torch.ones(2)]}
    one = staging.copy(tree)
    tree["a"].fill_(5)
    two = staging.copy(tree)
    assert two["a"] is one["a"]
    assert two["a"].eq(5).all()
    tree["b"][0] = torch.ones(4)
    assert staging.copy(tree)["b"][0].shape == (4,)


def test_what_is_read_back_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that keeps something else than it was given."""
    real = checkpoints.contents.torch.save

    def worse(tree: Any, path: Path) -> None:
        real(tree, path)
        content = bytearray(path.read_bytes())
        content[content.index(b"\0\0\x80?" * 8)] ^= 1  # a number of the tensor of ones
        path.write_bytes(content)

    monkeypatch.setattr(checkpoints.contents.torch, "save", worse)
    told: list[dict[str, Any]] = []
    writer = Store(tmp_path, on_event=lambda kind, **fields: told.append(fields))
    writer.save({"state_dict": {}, "moments": torch.ones(64)}, step=1, meta={}, wait=True)
    assert writer.failures == 1
    assert "something else than was written" in told[0]["reason"]
    assert os.listdir(tmp_path) == []


def test_the_manifest_says_what_it_is(tmp_path: Path) -> None:
    writer = Store(tmp_path)
    writer.save({"state_dict": {}}, step=12, meta={"identity": {"seed": 1}, "x": float("inf")}, metric=2.5, wait=True)
    [found] = checkpoints.find(tmp_path)
    assert (found.step, found.path.name) == (12, "step-000012")
    assert found.meta == {"identity": {"seed": 1}, "x": None}
    assert found.metric("val/loss") == 2.5
    assert found.metric("accuracy") is None
    assert found.manifest["versions"]["torch"] == torch.__version__
    assert found.bytes == (found.path / "state.pt").stat().st_size
    assert (found.path / "state.pt").stat().st_mode & 0o777 == 0o666 & (found.path.stat().st_mode)


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    for value in (1, 2):
        save(tmp_path, {"state_dict": {}, "value": value}, step=5)
    assert checkpoints.read(tmp_path / "step-000005")["value"] == 2
    assert os.listdir(tmp_path) == ["step-000005"]


def test_old_ones_go_and_another_future_is_left_alone(tmp_path: Path) -> None:
    writer = Store(tmp_path, keep_last=2, keep_best=1, keep_every_n_steps=4)
    for step, loss in enumerate([5, 1, 4, 3, float("nan"), None, 2, 6], start=1):
        writer.save({"state_dict": {}}, step=step, meta={}, metric=loss)
    writer.close()
    assert [c.step for c in checkpoints.find(tmp_path)] == [8, 7, 4, 2]
    writer = Store(tmp_path, keep_last=1, keep_best=0)
    writer.save({"state_dict": {}}, step=5, meta={}, wait=True)
    assert [c.step for c in checkpoints.find(tmp_path)] == [8, 7, 5]


def test_a_delete_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("not yours")

    writer = Store(tmp_path, keep_last=1)
    writer.save({"state_dict": {}}, step=1, meta={}, wait=True)
    monkeypatch.setattr(checkpoints.writing.shutil, "rmtree", lambda path, **options: options or refuse())
    writer.save({"state_dict": {}}, step=2, meta={}, wait=True)
    assert writer.saved == [1, 2]
    assert writer.failures == 0
    assert "step-000001 could not be deleted: not yours" in caplog.text
    assert [c.step for c in checkpoints.find(tmp_path)] == [2]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    save(tmp_path, {"state_dict": {}}, step=1)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(60)
    living = subprocess.Popen(["sleep", "60"])
    try:
        time.sleep(0.05)
        for name in (f"{dead.pid}.part", f"{dead.pid}.gone", f"{living.pid}.part", f"{os.getpid()}.part"):
            (tmp_path / f".step-000002.{name}" / "inside").mkdir(parents=True)
        (tmp_path / "step-000001").rename(tmp_path / f".step-000001.{dead.pid}.old")
        (tmp_path / ".notes").mkdir()
        older = tmp_path / f".step-000003.{living.pid}.part"
        older.mkdir()
        os.utime(older, (1e9, 1e9))  # made before that process began: the number was another's then
        cleared = checkpoints.clear_leftovers(tmp_path)
    finally:
        living.kill()
        living.wait(60)
    assert len(cleared) == 5
    assert sorted(os.listdir(tmp_path)) == [".notes", f".step-000002.{living.pid}.part", "step-000001"]
    assert checkpoints.clear_leftovers(tmp_path / "nowhere") == []


def test_no_memory_is_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise MemoryError

    told: list[dict[str, Any]] = []
    writer = Store(tmp_path, on_event=lambda kind, **fields: told.append(fields))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.staging.torch, "empty_like", refuse)
        writer.save({"state_dict": {"w": torch.ones(1)}}, step=1, meta={})
    assert (writer.failures, told[0]["reason"]) == (1, "MemoryError:")
    writer.save({"state_dict": {"w": torch.ones(1)}}, step=2, meta={}, wait=True)
    assert writer.saved == [2]


def test_a_save_steps_back_behind_training_until_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not store._may_take_back():
        pytest.skip("only Linux's root may, and who is allowed to")
    behind, mine = threading.Event(), os.getpriority(os.PRIO_PROCESS, 0)

    def becomes(nice: int) -> bool:
        until = time.monotonic() + 20
        while (now := os.getpriority(os.PRIO_PROCESS, 0)) != nice and time.monotonic() < until:
            time.sleep(0.001)
        return now == nice

    def write(*_: Any, step: int, **__: Any) -> None:
        if step == 1:
            assert becomes(min(19, mine + 10))
            behind.set()
        assert becomes(mine)

    monkeypatch.setattr(store, "write", write)
    writer = Store(tmp_path)
    writer.save({"state_dict": {}}, step=1, meta={})
    assert behind.wait(30)
    writer.wait()
    writer.save({"state_dict": {}}, step=2, meta={}, wait=True)
    assert writer.saved == [1, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no thread steps back")
def test_who_could_not_come_forward_again_never_steps_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for users who are not root: what is saved last, and waited for, must not crawl behind other processes."""
    nice = {}  # of each thread but for the first, by the number that the kernel knows it by

    def set_priority(which: int, thread: int, value: int) -> None:
        thread = thread or threading.get_native_id()
        if value < nice.get(thread, mine):
            raise PermissionError(13, "Permission denied")
        nice[thread] = value

    mine, seen = os.getpriority(os.PRIO_PROCESS, 0), []
    monkeypatch.setattr(os, "setpriority", set_priority)
    monkeypatch.setattr(
        store, "write", lambda *_, **__: (time.sleep(0.1), seen.append(nice.get(threading.get_native_id(), mine)))
    )
    store._may_take_back.cache_clear()
    writer = Store(tmp_path)
    writer.save({"state_dict": {}}, step=1, meta={})
    writer.wait()
    store._may_take_back.cache_clear()
    assert seen == [mine]
    assert threading.main_thread().native_id not in nice


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_event_that_cannot_be_recorded_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "checkpoints").write_text("in the way")
    writer = Store(tmp_path / "checkpoints", on_event=full)
    writer.save({"state_dict": {}}, step=1, meta={}, wait=True)
    assert writer.failures == 1
    assert "checkpoint of step 1 was not saved: FileExistsError" in caplog.text
    assert "could not be recorded: [Errno 28]" in caplog.text


def test_damaged_travels_between_processes(tmp_path: Path) -> None:
    with pytest.raises(checkpoints.Damaged) as raised:
        checkpoints.verify(tmp_path / "step-000001")
    back = pickle.loads(pickle.dumps(raised.value))
    assert str(back) == f"{tmp_path}/step-000001: MANIFEST.json is missing: the checkpoint is not complete"


def test_what_cannot_be_kept_about_it_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="PosixPath"):
        Store(tmp_path).save({"state_dict": {}}, step=1, meta={"path": tmp_path})


@pytest.mark.parametrize("counts", [{"keep_last": 0}, {"keep_best": -1}, {"keep_every_n_steps": 0}])
def test_counts_are_checked(tmp_path: Path, counts: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(counts))):
        Store(tmp_path, **counts)


@pytest.mark.gpu
def test_a_gpus_tensors_are_copied_before_save_returns(tmp_path: Path) -> None:
    weights = torch.ones(50_000_000, device="cuda")
    writer = Store(tmp_path)
    for step in (1, 2):
        writer.save({"state_dict": {"w": weights}}, step=step, meta={})
        weights.add_(1)
    writer.close()
    for step in (1, 2):
        assert checkpoints.read(tmp_path / f"step-{step:06d}")["state_dict"]["w"].eq(step).all()
