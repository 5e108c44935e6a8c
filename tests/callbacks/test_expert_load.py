"""The load monitor against a recount from router outputs and against numpy's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from foreign_experts import EXPERTS, TOP_K, Batches, ForeignExperts, model_of
from foreign_project import Foreign, both_agree, fit
from torch.utils.data import DataLoader

from lightning_opt.anatomy import ExpertTraffic, find_expert_layers
from lightning_opt.callbacks import ExpertLoad, ExpertLoadMonitor, Memory, RouterLosses, load_measures
from lightning_opt.callbacks.expert_load import gradient_norms
from lightning_opt.job.pieces import columns


def run(
    folder: Path,
    monitor: ExpertLoadMonitor,
    *,
    family: str = "Glm4Moe",
    padded: bool = False,
    first: int = 0,
    **more: Any,
) -> tuple[ForeignExperts, Any]:
    module = more.pop("module", None) or ForeignExperts(model_of(family))
    callbacks = [monitor, *more.pop("callbacks", [])]
    rows = Batches(40, padded, first)
    return module, fit(folder, module, callbacks, rows=rows, batch_size=None, **more)


def by_numpy(counts: np.ndarray) -> dict[str, float]:
    """The figures of one layer, from their definitions."""
    loads = counts.astype(np.float64)
    shares = loads / loads.sum()
    entropy = -sum(p * np.log(p) for p in shares if p > 0)
    return {
        "cv": loads.std() / loads.mean(),
        "max_violation": (loads.max() - loads.mean()) / loads.mean(),
        "share_max": shares.max(),
        "coldest": loads.min() / loads.mean(),
        "dead": float((counts == 0).sum()),
        "entropy": np.exp(entropy) / len(loads),
        "jain": loads.sum() ** 2 / (len(loads) * (loads**2).sum()),
        "noise_floor": np.sqrt((len(loads) - TOP_K) / loads.sum()),
    }


def test_measures_are_those_of_their_definitions() -> None:
    counts = np.array([5, 0, 17, 3, 3, 12])
    told = load_measures(torch.tensor(counts), TOP_K)
    assert {name: float(value) for name, value in told.items()} == pytest.approx(by_numpy(counts), rel=1e-12)


def test_measures_at_their_ends() -> None:
    even, one = load_measures(torch.full((8,), 4), 2), load_measures(torch.tensor([9, 0, 0, 0]), 1)
    figures = [float(even[name]) for name in ("cv", "coldest", "entropy", "jain", "max_violation")]
    assert figures == pytest.approx([0, 1, 1, 1, 0])
    assert float(one["cv"]) == pytest.approx(np.sqrt(4 - 1))  # sqrt(E / k - 1), the most there is
    assert [float(one[name]) for name in ("dead", "entropy", "share_max")] == pytest.approx([3, 0.25, 1])
    assert all(value.isnan() for value in load_measures(torch.zeros(4), 1).values())


def test_the_noise_floor_is_the_cv_of_even_routing() -> None:
    generator = np.random.default_rng(0)
    cvs = []
    for _ in range(200):  # each token takes k different experts of E at random
        chosen = generator.random((512, 8)).argsort(axis=1)[:, :2]
        cvs.append(float(load_measures(torch.tensor(np.bincount(chosen.ravel(), minlength=8)), 2)["cv"]))
    told = float(load_measures(torch.full((8,), 128), 2)["noise_floor"])
    assert told == pytest.approx(0.0765, abs=1e-4)  # shared/reference: 8/2 with 512 tokens, 0.077
    assert np.sqrt(np.mean(np.square(cvs))) == pytest.approx(told, rel=0.08)


def test_the_metric_sums_updates_and_resets() -> None:
    metric = ExpertLoad([3, 2], [1, 1])
    metric.update([torch.tensor([1, 2, 3]), torch.tensor([4, 0])])
    metric.update([torch.tensor([0, 0, 3]), torch.tensor([1, 0])])
    assert metric.counts.tolist() == [[1, 2, 6], [5, 0, 0]]
    assert metric.compute()["cv"].tolist() == pytest.approx([by_numpy(np.array([1, 2, 6]))["cv"], 1.0])
    assert metric.compute()["dead"].tolist() == [0, 1]
    metric.reset()
    assert not metric.counts.any()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_what_is_logged_is_a_recount_of_the_whole_step(tmp_path: Path, padded: bool, checkpointing: bool) -> None:
    module = ForeignExperts(model_of("Glm4Moe"))
    if checkpointing:
        module.model.activation_checkpointing_enable({"use_reentrant": False})
    options = {"max_steps": 6, "accumulate_grad_batches": 3, "log_every_n_steps": 2, "val_rows": Batches(2)}
    options |= {"val_check_interval": 1, "module": module, "padded": padded}
    module, (_, logged) = run(tmp_path, ExpertLoadMonitor(), **options)
    steps = np.array(module.counted).reshape(6, 3, 2, EXPERTS).sum(1)[1::2]  # steps 2, 4 and 6
    saved = np.load(tmp_path / "expert_load.npz")
    assert saved["steps"].tolist() == [2, 4, 6]
    assert np.array_equal(saved["counts"], steps)
    assert (saved["experts"].tolist(), saved["top_k"].tolist()) == ([EXPERTS] * 2, [TOP_K] * 2)
    figures = [[by_numpy(layer) for layer in step] for step in steps]
    means = {name: [np.mean([layer[name] for layer in step]) for step in figures] for name in ("cv", "entropy", "jain")}
    for name, expected in means.items():
        assert logged.column(f"expert_load/{name}") == pytest.approx(expected)
    worst = [max(layer["cv"] for layer in step) for step in figures]
    assert logged.column("expert_load/cv_worst") == pytest.approx(worst)
    assert logged.column("expert_load/dead") == [sum(layer["dead"] for layer in step) for step in figures]


def test_keys_are_few_whatever_the_number_of_experts(tmp_path: Path) -> None:
    _, (_, brief) = run(tmp_path, ExpertLoadMonitor(), max_steps=1)
    _, (_, detailed) = run(tmp_path, ExpertLoadMonitor("detailed"), max_steps=1)
    names = [
        {name for _, row in logged.rows for name in row if name.startswith("expert")} for logged in (brief, detailed)
    ]
    assert len(names[0]) == 13
    assert len(names[1] - names[0]) == 5 * 2
    assert names[0] < names[1]


class Norms(pl.Callback):
    """Gradient norm of each expert, slice by slice, before clipping."""

    def __init__(self) -> None:
        self.steps: list[np.ndarray] = []

    def on_before_optimizer_step(self, _: Any, module: ForeignExperts, __: Any) -> None:
        grads = {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}
        rows = []
        for layer in (1, 2):
            stacks = [grads[f"model.layers.{layer}.mlp.experts.{part}_proj"] for part in ("gate_up", "down")]
            rows.append([np.sqrt(sum(float((g[e].double() ** 2).sum()) for g in stacks)) for e in range(EXPERTS)])
        self.steps.append(np.array(rows))


def test_gradient_norm_of_each_expert(tmp_path: Path) -> None:
    norms = Norms()
    options = {"max_steps": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 1e-3, "callbacks": [norms]}
    _, (_, logged) = run(tmp_path, ExpertLoadMonitor(), **options)
    assert np.load(tmp_path / "expert_load.npz")["grad_norm"] == pytest.approx(np.array(norms.steps), rel=1e-4)
    assert logged.column("expert_grad_norm/max") == pytest.approx([step.max() for step in norms.steps], rel=1e-4)
    assert logged.column("expert_grad_norm/min") == pytest.approx([step.min() for step in norms.steps], rel=1e-4)


def test_gradient_norms_of_listed_experts() -> None:
    model = model_of("Listed")
    layers = find_expert_layers(model)
    model(torch.arange(12).view(2, 6)).logits.square().sum().backward()
    told = gradient_norms(layers)
    for layer, expert in ((0, 2), (1, 5)):
        grads = [p.grad for p in model.layers[layer].experts[expert].parameters() if p.ndim == 2]
        expected = 0.0 if grads[0] is None else float(torch.cat([g.flatten() for g in grads]).norm())
        assert float(told[layer, expert]) == pytest.approx(expected, rel=1e-5)


def starve(model: Any, expert: int) -> None:
    """Nobody chooses this expert of the first layer any more."""
    next(layer for layer in find_expert_layers(model)).bias[expert] = -10.0


def test_alarm_for_an_expert_that_is_dead_for_so_many_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, told = ForeignExperts(model_of("Glm4Moe"), lr=0.0), []
    starve(module.model, 4)
    monitor = ExpertLoadMonitor(dead_steps=5, cv_limit=10.0)
    monitor.on_event = lambda kind, **fields: told.append((kind, fields))
    run(tmp_path, monitor, module=module, max_steps=9)
    assert told == [("expert_alarm", {"step": 5, "reason": "dead experts", "layers": [0], "value": 5.0})]
    assert "without a token for 5 steps" in caplog.text
    assert monitor.last["expert_load/idle_steps"] == 9


def test_alarm_for_an_uneven_load_once_until_it_is_well_again(tmp_path: Path) -> None:
    class Swings(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: ForeignExperts, *_: Any) -> None:
            layer = find_expert_layers(module.model)[1]
            bad = trainer.global_step in (2, 3, 6)
            layer.bias.copy_(torch.tensor([9.0, 9.0, 0, 0, 0, 0]) * bad)

    module, told = ForeignExperts(model_of("Glm4Moe"), lr=0.0), []
    monitor = ExpertLoadMonitor(dead_steps=99)
    monitor.on_event = lambda kind, **fields: told.append(fields)
    run(tmp_path, monitor, module=module, callbacks=[Swings()], max_steps=8)
    assert [(event["step"], event["layers"]) for event in told] == [(3, [1]), (7, [1])]
    assert {event["reason"] for event in told} == {"uneven load"}
    assert told[0]["value"] == pytest.approx(np.sqrt(EXPERTS / TOP_K - 1))


def test_too_few_tokens_raise_no_alarm(tmp_path: Path) -> None:
    module, told = ForeignExperts(model_of("Glm4Moe"), lr=0.0), []
    monitor = ExpertLoadMonitor()
    monitor.on_event = lambda kind, **fields: told.append(fields)
    fit(tmp_path, module, [monitor], rows=Batches(9, rows=1, length=4), batch_size=None, max_steps=6)
    assert max(monitor.last["expert_load/cv_worst"], 0) > 0  # four tokens to two of six experts each
    assert told == []


def test_history_is_thinned_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    def part(steps: int, name: str, ckpt: Path | None = None) -> Path:
        folder = tmp_path / name
        one = [Batches(1)[0]] * 40  # one batch again and again: the order is no matter
        module, monitor = ForeignExperts(model_of("Listed")), ExpertLoadMonitor(history=8)
        trainer, _ = fit(folder, module, [monitor], rows=one, batch_size=None, max_steps=steps, ckpt_path=ckpt)
        trainer.save_checkpoint(folder / "last.ckpt")
        return folder

    whole, half = part(30, "whole"), part(17, "half")
    again = part(30, "again", half / "last.ckpt")
    first, second = (np.load(folder / "expert_load.npz") for folder in (whole, again))
    assert first["steps"].tolist() == [1, 5, 9, 13, 17, 21, 25, 29, 30]
    for name in first.files:
        assert np.array_equal(first[name], second[name]), name
    state = torch.load(half / "last.ckpt", weights_only=True)["callbacks"]["ExpertLoadMonitor"]
    assert state["steps"][-1] == 17


def test_who_is_idle_and_what_was_raised_survives_a_stop(tmp_path: Path) -> None:
    """Stopped before the first look, and once more after the alarm."""

    def part(name: str, steps: int, ckpt: Path | None) -> tuple[Path, list[int], float | None]:
        module, told = ForeignExperts(model_of("Glm4Moe"), lr=0.0), []
        starve(module.model, 4)
        monitor = ExpertLoadMonitor(dead_steps=5, cv_limit=10.0)
        monitor.on_event = lambda kind, **fields: told.append(fields["step"])
        trainer, _ = run(tmp_path / name, monitor, module=module, max_steps=steps, ckpt_path=ckpt, log_every_n_steps=4)[
            1
        ]
        trainer.save_checkpoint(tmp_path / name / "last.ckpt")
        return tmp_path / name / "last.ckpt", told, monitor.last.get("expert_load/idle_steps")

    early, none, _ = part("early", 3, None)
    raised, once, idle = part("raised", 9, early)
    _, again, late = part("late", 12, raised)
    assert (none, once, again) == ([], [8], [])
    assert (idle, late) == (8, 12)


def test_a_dense_model_costs_nothing(tmp_path: Path) -> None:
    monitor = ExpertLoadMonitor()
    _, logged = fit(tmp_path, Foreign(), [monitor], max_steps=3)
    assert monitor.traffic is None
    assert not [name for _, row in logged.rows for name in row if name.startswith("expert")]
    assert not (tmp_path / "expert_load.npz").exists()
    assert monitor.state_dict() == {}


def test_hooks_are_gone_after_the_fit_and_after_an_exception(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("enough")

    module = ForeignExperts(model_of("Mixtral"))
    hooks = [len(m._forward_pre_hooks) for m in module.modules()]
    with pytest.raises(RuntimeError, match="enough"):
        run(tmp_path, ExpertLoadMonitor(), module=module, callbacks=[Stop()], max_steps=3)
    assert (tmp_path / "expert_load.npz").exists()
    assert [len(m._forward_pre_hooks) for m in module.modules()] == hooks


def test_a_model_in_evaluation_mode_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = ForeignExperts(model_of("Mixtral").eval())
    run(tmp_path, ExpertLoadMonitor(), module=module, max_steps=1)
    assert "must be in training mode" in caplog.text


def test_refuses_another_word() -> None:
    with pytest.raises(ValueError, match=r"expert_load\.keys = all: must be one of brief, detailed"):
        ExpertLoadMonitor("all")


TWO_PROCESSES = """
import sys, torch, numpy as np
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from foreign_experts import Batches, ForeignExperts, model_of
from foreign_project import fit
from lightning_opt.anatomy import find_expert_layers
from lightning_opt.callbacks import ExpertBalance, ExpertLoadMonitor, RouterLosses

if __name__ == "__main__":
    folder = Path(sys.argv[2])
    module = ForeignExperts(model_of("Glm4Moe"))
    module.model.activation_checkpointing_enable({"use_reentrant": False})
    find_expert_layers(module.model)[0].bias[4] = -10.0
    callbacks = [RouterLosses(1e-2, "global"), ExpertBalance(0.001), ExpertLoadMonitor()]
    options = {"max_steps": 4, "accumulate_grad_batches": 2, "devices": 2, "strategy": "ddp"}
    trainer, _ = fit(folder, module, callbacks, rows=Batches(40, padded=True), batch_size=None, **options)
    mine = torch.tensor(np.array(module.counted))
    everyone = trainer.strategy.all_gather(mine)
    assert not torch.equal(everyone[0], everyone[1])
    expected = everyone.sum(0).view(4, 2, *mine.shape[1:]).sum(1)
    biases = trainer.strategy.all_gather(torch.stack([x.bias for x in find_expert_layers(module.model)]))
    assert torch.equal(biases[0], biases[1])
    assert biases[0].abs().sum() > 0
    assert trainer.callback_metrics["expert_load/idle_steps"] == 4
    if trainer.global_rank == 0:
        saved = np.load(folder / "expert_load.npz")
        assert np.array_equal(saved["counts"], expected.numpy())
        moved = torch.sign(expected.double().mean(-1, keepdim=True) - expected).sum(0) * 0.001
        moved[0, 4] -= 10.0
        torch.testing.assert_close(biases[0].double(), moved, atol=1e-5, rtol=0)
    print("AGREED", flush=True)
"""


@pytest.mark.slow
def test_over_two_processes_counts_and_biases_are_of_both(tmp_path: Path) -> None:
    both_agree(TWO_PROCESSES, tmp_path)


def test_the_fit_of_a_loader_that_makes_batches_itself(tmp_path: Path) -> None:
    """Shares one count among two monitors, as several callbacks do."""
    module = ForeignExperts(model_of("Qwen3Moe"))
    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[first := ExpertLoadMonitor(path=tmp_path / "a.npz"), Second(path=tmp_path / "b.npz")],
    )
    trainer.fit(module, DataLoader(Batches(2), batch_size=None))
    one, two = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert np.array_equal(one["counts"], np.array(module.counted))
    assert np.array_equal(one["counts"], two["counts"])
    assert first.traffic is None
    assert isinstance(ExpertTraffic.of(module), ExpertTraffic)


class Second(ExpertLoadMonitor):
    """Lightning takes one callback of each kind."""


@pytest.mark.parametrize("keys", ["brief", "detailed"])
def test_columns_are_announced_as_they_are_logged(tmp_path: Path, keys: str) -> None:
    module, losses = ForeignExperts(model_of("Glm4Moe")), RouterLosses(0.1, z=0.1)
    callbacks = [ExpertLoadMonitor(keys), losses]
    announced = columns(["web"], {"matrix"}, [*callbacks, Memory()], module.model)
    _, logged = fit(tmp_path, module, callbacks, rows=Batches(2), batch_size=None, max_steps=2)
    told = {name for _, row in logged.rows for name in row if name.startswith(("expert_", "router_"))}
    assert told == {name for name in announced if name.startswith(("expert_", "router_"))}
    assert {"val/loss/web", "lr/matrix", "grad_norm/matrix"} < set(announced)
    assert columns([], set(), callbacks, torch.nn.Linear(2, 2)) == []
