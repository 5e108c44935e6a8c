"""Checkpoints against real kills, a disk that is full, damaged bytes and hostile pickles (rows 6, 7, 8, 21, 22)."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import pickle
import pickletools
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from lightning_opt import checkpoints
from lightning_opt.checkpoints import Damaged, Store
from lightning_opt.checkpoints.manifest import manifest_text, read_manifest
from lightning_opt.job.resuming import choose
from lightning_opt.plan import ConfigError
from lightning_opt.run_folder import RunFolder, append_event, late_events, read_events

FORK = multiprocessing.get_context("fork")  # a writer's life is then too short for another import of torch
META = {"identity": {"seed": 1}}
NUMBERS = 60_000


def tree(step: int) -> dict[str, Any]:
    """A checkpoint that tells its step in every number."""
    weights = torch.full((NUMBERS,), float(step))
    return {
        "state_dict": {"weight": weights, "tied": weights},
        "optimizer_states": [{"state": {0: {"step": step, "exp_avg": torch.full((2 * NUMBERS,), -float(step))}}}],
        "global_step": step,
    }


def holds(path: Path, step: int) -> bool:
    """Whether it is `tree` of that step."""
    found = checkpoints.read(path)
    moments = found["optimizer_states"][0]["state"][0]
    return (
        found["global_step"] == moments["step"] == step
        and bool((found["state_dict"]["weight"] == step).all())
        and found["state_dict"]["tied"] is found["state_dict"]["weight"]
        and bool((moments["exp_avg"] == -step).all())
    )


def never_bad(damage: Damaged) -> None:
    pytest.fail(str(damage))


def alone(work: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)  # the other threads of this process's torch do not live on in a fork
    work(*arguments)


def forked(work: Callable[..., None], *arguments: Any) -> Any:
    process = FORK.Process(target=alone, args=(work, *arguments), daemon=True)
    process.start()
    return process


def save_on_and_on(root: Path, told: Connection) -> None:
    newest = checkpoints.newest_good(root, never_bad)
    store = Store(root, keep_last=1, keep_best=0)
    for step in itertools.count(newest.step + 1 if newest else 1):
        store.save(tree(step), step=step, meta=META)
        if store.saved:
            told.send(store.saved[-1])


@pytest.mark.fault(
    6, "50 kill -9 at random instants of writing: the last good checkpoint always loads, nothing left over"
)
def test_fifty_kills_of_a_writing_process(tmp_path: Path) -> None:
    root, chance, before = tmp_path / "checkpoints", random.Random(0), 0
    torn = 0
    for _ in range(50):
        ours, theirs = FORK.Pipe(duplex=False)
        process = forked(save_on_and_on, root, theirs)
        theirs.close()
        assert ours.poll(60), "the writer got nowhere"
        time.sleep(chance.uniform(0, 0.025))
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        while ours.poll():
            try:
                before = max(before, ours.recv())
            except EOFError:
                break
        torn += any(name.startswith(".") for name in os.listdir(root))
        newest = checkpoints.newest_good(root, never_bad)
        assert newest is not None
        assert newest.step >= before
        assert holds(newest.path, newest.step)
        before = newest.step
    assert torn > 5, "no kill hit a write: this test proves nothing"
    Store(root)
    assert set(os.listdir(root)) == {checkpoint.path.name for checkpoint in checkpoints.find(root)}


def save_and_die(root: Path, steps: list[int], at: int) -> None:
    """Saves, and is killed before its `at`-th look at or change of the disk."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event != "os.kill" and event.startswith(("open", "os.", "shutil.")):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    store = Store(root, keep_last=1, keep_best=0)
    sys.addaudithook(hook)
    for step in steps:
        store.save(tree(step), step=step, meta=META, wait=True)
    os._exit(0 if store.saved == steps else 1)


@pytest.mark.fault(6, "kill -9 before each single operation of a save: the old checkpoint or the new one, whole")
@pytest.mark.parametrize("steps", [[8], [7]], ids=["next step", "the same step again"])
def test_a_kill_at_every_operation(tmp_path: Path, steps: list[int]) -> None:
    Store(tmp_path / "before").save(tree(7), step=7, meta=META, wait=True)
    found = set()
    for at in itertools.count(1):
        root = tmp_path / str(at)
        shutil.copytree(tmp_path / "before", root)
        process = forked(save_and_die, root, steps, at)
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        checkpoints.clear_leftovers(root)
        newest = checkpoints.newest_good(root, never_bad)
        assert newest is not None
        assert newest.step in (7, *steps)
        assert holds(newest.path, newest.step)
        found.add(newest.step)
        for path in root.iterdir():
            checkpoints.verify(path)
        if process.exitcode == 0:
            break
    assert at > 25, "few operations were seen: this test proves little"
    assert found == {7, *steps}


def _flip(path: Path, position: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 2),
    "half of it": lambda path: os.truncate(path, path.stat().st_size // 2),
    "0 bytes": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"}"),
    "first byte": lambda path: _flip(path, 0.0),
    "a byte in the middle": lambda path: _flip(path, 0.55),
    "last byte but a few": lambda path: _flip(path, 0.99),
}


@pytest.mark.fault(
    7, "truncated, a bit flipped, 0 bytes or missing: the one before is used and the bad one named; read raises"
)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["model.safetensors", "state.pt", "MANIFEST.json"])
def test_a_damaged_file(tmp_path: Path, file: str, damage: str) -> None:
    store = Store(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        store.save(tree(step), step=step, meta=META, wait=True)
    bad = tmp_path / "step-000003"
    DAMAGES[damage](bad / file)
    told: list[Damaged] = []
    newest = checkpoints.newest_good(tmp_path, told.append)
    assert newest is not None
    assert newest.step == 2
    assert holds(newest.path, 2)
    [found] = told
    path, reason = found.path, found.reason
    assert path == bad
    assert file in reason
    assert not found.unreadable
    if file != "MANIFEST.json":
        lengths = ("truncated", "half of it", "0 bytes", "longer")
        assert ("bytes long" if damage in lengths else "cannot be read" if damage == "missing" else "sha256") in reason
    with pytest.raises(Damaged, match=file) as refused:
        checkpoints.read(bad)
    assert str(bad) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert bad.is_dir()


@pytest.mark.fault(7, "a damaged checkpoint of one's own is set aside, and pushes no good one out")
def test_a_damaged_checkpoint_does_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path)
    store = Store(folder.checkpoints, keep_best=0)
    for step in (2, 4):
        store.save(tree(step), step=step, meta={}, wait=True)
    for step, file in ((4, "state.pt"), (6, "MANIFEST.json"), (8, "state.pt")):
        bad = folder.checkpoints / f"step-00000{step}"
        if step > 4:
            shutil.copytree(folder.checkpoints / "step-000002", bad)
        DAMAGES["missing"](bad / file)
    start = choose(folder, {"resume": "auto", "resume_allow": []}, {"length": {"max_steps": 20}})
    assert start is not None
    assert start.step == 2
    assert f"it is kept as {folder.checkpoints}/.step-000006.bad" in caplog.text
    assert [event["checkpoint"][-1] for event in read_events(folder.events) if event["kind"] == "checkpoint_bad"] == [
        *"864"
    ]
    assert sorted(os.listdir(folder.checkpoints)) == [*(f".step-00000{n}.bad" for n in (4, 6, 8)), "step-000002"]
    store = Store(folder.checkpoints, keep_best=0)
    store.save(tree(9), step=9, meta={}, wait=True)  # two good ones at most: with the damaged, 2 would go now
    assert sorted(os.listdir(folder.checkpoints)) == [
        ".step-000006.bad",
        ".step-000008.bad",
        "step-000002",
        "step-000009",
    ]


def _other_format(path: Path) -> None:
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))


UNREADABLE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "an error of the disk": ("MANIFEST.json", lambda path: _link(path, "/proc/self/mem"), "Input/output error"),
    "a link in a circle": ("state.pt", lambda path: _link(path, path), "symbolic links"),
    "of another version": ("MANIFEST.json", _other_format, "has format 2; this version reads 1"),
}


def _link(path: Path, to: Any) -> None:
    path.unlink()
    path.symlink_to(to)


@pytest.mark.fault(
    7, "a checkpoint that cannot be read today, or by this version: never set aside, never step 0 instead"
)
@pytest.mark.parametrize("why", UNREADABLE)
def test_what_cannot_be_read_stays_where_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture, why: str) -> None:
    file, spoil, words = UNREADABLE[why]
    folder, names = RunFolder(tmp_path), ["step-000002", "step-000004"]
    config, now = {"resume": "auto", "resume_allow": []}, {"length": {"max_steps": 20}}
    store = Store(folder.checkpoints)
    for step in (2, 4):
        store.save(tree(step), step=step, meta={}, wait=True)
    shutil.copytree(folder.checkpoints, tmp_path / "whole")
    spoil(folder.checkpoints / names[1] / file)
    start = choose(folder, config, now)
    assert start is not None
    assert start.step == 2
    assert "step-000004 cannot be used and passed over" in caplog.text
    spoil(folder.checkpoints / names[0] / file)
    for _ in range(2):  # the same command again is no way around it
        with pytest.raises(ConfigError) as refused:
            choose(folder, config, now)
        assert refused.value.field == "resume"
        assert all(f"{name}: {file}" in str(refused.value) for name in names)
        assert str(refused.value).count(words) == 2
        assert str(refused.value).endswith("to start anew: resume=never")
    assert sorted(os.listdir(folder.checkpoints)) == names
    shutil.rmtree(folder.checkpoints)
    (tmp_path / "whole").rename(folder.checkpoints)
    start = choose(folder, config, now)  # it can be read again
    assert start is not None
    assert start.step == 4


@pytest.mark.fault(7, "all checkpoints damaged: none is used, each is named")
def test_nothing_good_is_left(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in (1, 2):
        store.save(tree(step), step=step, meta=META, wait=True)
        (tmp_path / f"step-00000{step}" / "MANIFEST.json").unlink()
    told: list[Damaged] = []
    assert checkpoints.newest_good(tmp_path, told.append) is None
    assert [damage.path.name for damage in told] == ["step-000002", "step-000001"]
    assert checkpoints.find(tmp_path) == []


@pytest.mark.fault(7, "a bit flipped in any byte of the manifest: noticed, or without meaning")
def test_every_byte_of_the_manifest(tmp_path: Path) -> None:
    Store(tmp_path).save(tree(1), step=1, meta=META, metric=2.5, wait=True)
    path = tmp_path / "step-000001"
    whole, content = read_manifest(path), (path / "MANIFEST.json").read_bytes()
    noticed = 0
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        (path / "MANIFEST.json").write_bytes(changed)
        try:
            assert read_manifest(path) == whole
        except Damaged:
            noticed += 1
    assert noticed > 0.8 * len(content)


def in_a_small_disk(place: Path, megabytes: int) -> bool:
    """Gives this (forked) process a file system of its own at `place`, visible to nobody else."""
    new_user, new_mounts, uid, gid = 0x10000000, 0x00020000, os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(new_user | new_mounts):
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(place)]
    return subprocess.run(mount, capture_output=True).returncode == 0


def save_on_a_full_disk(disk: Path, told: Connection) -> None:
    try:
        small = in_a_small_disk(disk, megabytes=4)
    except OSError:
        small = False
    if not small:
        told.send(None)
        return
    events, root = disk / "events.jsonl", disk / "run" / "checkpoints"
    store = Store(root, on_event=lambda kind, **fields: append_event(events, kind, **fields))
    store.save(tree(1), step=1, meta=META, wait=True)
    tries = []
    for step, free in enumerate((0, 4096, 100_000, 300_000, 600_000, 720_000), start=2):
        filler = disk / "filler"
        with filler.open("wb") as file:
            room = os.statvfs(disk)
            file.write(bytes(room.f_bavail * room.f_frsize - free))
        store.save(tree(step), step=step, meta=META, wait=True)
        good = [c.step for c in checkpoints.find(root) if holds(c.path, c.step)]
        tries.append((store.failures, good, sorted(os.listdir(root))))
        filler.unlink()
    store.save(tree(9), step=9, meta=META, wait=True)
    store.close()
    late_events()
    told.send((tries, store.saved, read_events(events), holds(root / "step-000009", 9)))


@pytest.mark.fault(
    8, "a real file system runs full while saving: event, older checkpoint whole, nothing left over, next try works"
)
def test_a_full_disk(tmp_path: Path) -> None:
    ours, theirs = FORK.Pipe(duplex=False)
    process = forked(save_on_a_full_disk, tmp_path, theirs)
    theirs.close()
    assert ours.poll(120)
    answer = ours.recv()
    process.join(60)
    if answer is None:
        pytest.skip("needs the right to mount a tmpfs (user namespaces)")
    tries, saved, events, works_again = answer
    for number, (failures, good, names) in enumerate(tries, start=1):
        assert failures == number
        assert good == [1]
        assert names == ["step-000001"]
    assert saved == [1, 9]
    assert works_again
    assert [(event["kind"], event["step"]) for event in events] == [("checkpoint_failed", step) for step in range(2, 8)]
    assert any("No space left on device" in event["reason"] for event in events)


@pytest.mark.fault(
    8, "the folder cannot be written any more: an event each time, training goes on, older checkpoint whole"
)
def test_a_folder_that_is_gone_for_writing(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    store = Store(tmp_path / "checkpoints", on_event=lambda kind, **fields: told.append({"kind": kind, **fields}))
    store.save(tree(1), step=1, meta=META, wait=True)
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoints").write_text("a file stands where the folder was")
    store.save(tree(2), step=2, meta=META, wait=True)
    store.save(tree(3), step=3, meta=META)
    store.close()
    assert [(event["kind"], event["step"]) for event in told] == [("checkpoint_failed", 2), ("checkpoint_failed", 3)]
    assert store.failures == 2
    assert holds(tmp_path / "elsewhere" / "step-000001", 1)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def _sign(path: Path) -> None:
    """An attacker can make a manifest too."""
    made = read_manifest(path).manifest
    files = {
        name: {"bytes": (path / name).stat().st_size, "sha256": checkpoints.manifest.digest(path / name)}
        for name in made["files"]
    }
    rest = {key: made[key] for key in ("step", "created", "versions", "metric", "meta")}
    (path / "MANIFEST.json").write_text(manifest_text(files=files, **rest))
    checkpoints.verify(path)


@pytest.mark.fault(21, "a checkpoint with code in its pickle and a right manifest: refused, the code never runs")
@pytest.mark.parametrize("file", ["state.pt", "model.safetensors"])
@pytest.mark.parametrize("form", ["torch.save", "old torch.save", "plain pickle"])
def test_a_hostile_pickle(tmp_path: Path, file: str, form: str) -> None:
    Store(tmp_path).save(tree(1), step=1, meta=META, wait=True)
    path, canary = tmp_path / "step-000001", tmp_path / "canary"
    hostile = {**tree(1), "callbacks": {"innocent": Hostile(canary)}}
    if form == "plain pickle":
        (path / file).write_bytes(pickle.dumps(hostile))
    else:
        torch.save(hostile, path / file, _use_new_zipfile_serialization=form == "torch.save")
    _sign(path)
    with pytest.raises(Damaged) as refused:
        checkpoints.read(path)
    assert "\n" not in str(refused.value)
    assert not canary.exists()
    if file == "state.pt" and form == "plain pickle":  # the canary is a real one
        pickle.loads((path / file).read_bytes())
        assert canary.exists()


class Keeps(TorchCheckpointIO):
    """Lightning's own checkpoint dict, as the trainer hands it over."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.kept = checkpoint


class Small(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"lr": 0.1, "betas": (0.9, 0.99)})
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.body(batch).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), amsgrad=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def lightnings_checkpoint(folder: Path) -> dict[str, Any]:
    plugin = Keeps()
    trainer = pl.Trainer(
        max_steps=3, accelerator="cpu", plugins=[plugin], callbacks=[EMAWeightAveraging(decay=0.5)], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Small(), DataLoader(torch.randn(16, 4), batch_size=4))
    trainer.save_checkpoint(folder / "unused")
    return plugin.kept


@pytest.mark.fault(
    22,
    "a whole Lightning checkpoint: torch.load(weights_only=True) and safetensors read it, no class of anybody's inside",
)
def test_what_we_write_is_tensors_and_plain_types(tmp_path: Path) -> None:
    checkpoint = lightnings_checkpoint(tmp_path)
    store = Store(tmp_path / "checkpoints")
    store.save(checkpoint, step=3, meta=META, wait=True)
    assert store.saved == [3]
    path = tmp_path / "checkpoints" / "step-000003"
    weights = load_file(path / "model.safetensors")
    assert weights.keys() == checkpoint["state_dict"].keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in checkpoint["state_dict"].items())
    state = torch.load(path / "state.pt", weights_only=True)
    moments = checkpoint["optimizer_states"][0]["state"]
    assert all(torch.equal(state["optimizer_states"][0]["state"][i]["exp_avg"], moments[i]["exp_avg"]) for i in moments)
    with zipfile.ZipFile(path / "state.pt") as archive:
        [pickled] = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    classes = {str(argument) for opcode, argument, _ in pickletools.genops(pickled) if opcode.name == "GLOBAL"}
    assert classes <= {
        "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch LongStorage",
    }  # fmt: skip
    assert {"torch._utils _rebuild_tensor_v2", "torch FloatStorage"} <= classes


@pytest.mark.fault(22, "OmegaConf, numpy, paths and other objects in a checkpoint: refused with their place in it")
@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (OmegaConf.create({"lr": 1}), "omegaconf.dictconfig.DictConfig"),
        (Path("/"), "PosixPath"),
        (torch.tensor([1.0]).numpy(), "numpy.ndarray"),
        (torch.ones(2).to_sparse(), "torch.sparse_coo"),
        (lambda: 0, "function"),
        (torch.optim.SGD, "type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_objects_are_refused(tmp_path: Path, value: Any, kind: str) -> None:
    store = Store(tmp_path / "checkpoints")
    with pytest.raises(TypeError, match=r"checkpoint\['hyper_parameters'\]\[1\]\['x'\] is a .*" + kind):
        store.save({"state_dict": {}, "hyper_parameters": [0, {"x": value}]}, step=1, meta=META)
    store.close()
    assert not (tmp_path / "checkpoints").exists()
