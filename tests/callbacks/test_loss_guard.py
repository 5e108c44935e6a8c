"""LossGuard in somebody else's project, against numpy on the losses and norms that the project recorded itself.

Each way of deciding is run: for an optimizer that is not ours, for ours on the host, and for ours as on a GPU, where
the device masks the update and the host looks one step later.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from foreign_project import Foreign, Rows, fit

from lightning_opt import optim
from lightning_opt.callbacks import LossGuard, Rewind, Stability, Throughput
from lightning_opt.kernels import Later
from lightning_opt.plan import ConfigError
from lightning_opt.run_folder import Diverged

WAYS = ("foreign", "host", "device")
WINDOW = 16


class Leaping(Foreign):
    """Its loss is multiplied in some steps; keeps the weights and the state from before each step."""

    def __init__(self, way: str, factors: dict[int, float], **kwargs: Any) -> None:
        super().__init__(torch.optim.AdamW if way == "foreign" else optim.AdamW, **kwargs)
        self.factors, self.weights, self.states = factors, [], []

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return super().loss(batch) * self.factors.get(self.trainer.global_step + 1, 1.0)

    def on_after_backward(self) -> None:
        self.norms.append(float(np.linalg.norm(torch.cat([p.grad.flatten() for p in self.parameters()]).numpy())))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        pass  # the gradients may be gone by then

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.keep()

    def on_train_end(self) -> None:
        self.keep()

    def keep(self) -> None:
        self.weights.append(torch.cat([p.detach().flatten() for p in self.parameters()]))
        states = self.trainer.optimizers[0].state_dict()["state"].values()
        self.states.append(
            torch.cat([torch.as_tensor(v).flatten() for state in states for v in state.values()] or [torch.empty(0)])
        )


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who decides; a device without one."""
    if request.param == "device":
        monkeypatch.setattr(LossGuard, "_masks", staticmethod(lambda device: True))
    return request.param


def unchanged(module: Leaping) -> list[int]:
    """Steps, from 1, that moved neither weights nor state."""
    steps = range(1, len(module.weights))
    return [
        step
        for step in steps
        if torch.equal(module.weights[step - 1], module.weights[step])
        and torch.equal(module.states[step - 1], module.states[step])
    ]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stops_before_the_weights_change(
    way: str, bad: float, accumulate: int, tmp_path: Path
) -> None:
    module = Leaping(way, {4: bad})
    with pytest.raises(Diverged) as caught:
        fit(tmp_path, module, [LossGuard()], accumulate_grad_batches=accumulate, log_every_n_steps=100)
    first = 3 * accumulate
    assert f"at step 4 (loss {bad}, lr 0.01, batches {first} to {first + accumulate - 1} of epoch 0)" in str(
        caught.value
    )
    assert str(caught.value).startswith("gradient norm nan")
    assert "\n" not in str(caught.value)
    now = torch.cat([p.detach().flatten() for p in module.parameters()])
    before = module.weights[first]
    assert now.isfinite().all()
    assert torch.equal(now, before)
    assert not torch.equal(before, module.weights[first - accumulate])


def test_an_infinite_loss_with_good_gradients_stops_too(way: str, tmp_path: Path) -> None:
    class Infinite(Leaping):
        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            return super().loss(batch) + (float("inf") if self.trainer.global_step == 3 else 0.0)

    with pytest.raises(Diverged, match=r"^loss inf at step 4 \(gradient norm \d"):
        fit(tmp_path, Infinite(way, {}), [LossGuard()])


@pytest.mark.parametrize("steps", [4, 6])
def test_the_last_step_and_an_unlogged_one_count(way: str, steps: int, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="at step 4 "):
        fit(tmp_path, Leaping(way, {4: float("nan")}), [LossGuard()], max_steps=steps, log_every_n_steps=100)


def test_nothing_of_a_bad_step_is_logged(way: str, tmp_path: Path) -> None:
    module = Leaping(way, {4: float("nan")})
    logged = []
    stability = Stability()
    with pytest.raises(Diverged):
        fit(tmp_path, module, [LossGuard(), stability, Throughput()], max_steps=9)
    assert all(np.isfinite(list(stability.last.values())))
    assert not logged


def by_numpy(losses: np.ndarray, norms: np.ndarray, sigma: float, window: int, warmup: int) -> list[int]:
    """Steps that a plain reading of the docstring skips."""
    kept: list[np.ndarray] = []
    skipped = []
    for step, value in enumerate(np.stack([losses, norms], axis=1), start=1):
        most = np.array([np.inf, np.inf])
        if len(kept) >= warmup:
            recent = np.array(kept[-window:])
            most = recent.mean(axis=0) + sigma * recent.std(axis=0, ddof=1)
        if (value > most).any():
            skipped.append(step)
        kept.append(np.minimum(value, most))
    return skipped


def test_spikes_are_those_of_numpy_and_leave_no_trace(way: str, tmp_path: Path) -> None:
    factors = {3: 5.0, 20: 4.0, 21: 1e6, 40: 1.02, 47: 0.01, 48: 2.0}
    module, guard = Leaping(way, factors), LossGuard("skip", sigma=3.0, window=WINDOW)
    told: list[tuple[str, dict[str, Any]]] = []
    guard.on_event = lambda kind, **fields: told.append((kind, fields))
    fit(tmp_path, module, [guard, Stability(), Throughput()], max_steps=60, log_every_n_steps=7)
    losses, norms = np.array(module.micro_losses), np.array(module.norms)
    wanted = by_numpy(losses, norms, 3.0, WINDOW, WINDOW // 2)
    assert {20, 21} <= set(wanted)
    assert 3 not in wanted
    assert guard.skipped == wanted
    assert unchanged(module) == wanted
    assert [(kind, fields["step"]) for kind, fields in told] == [("step_skipped", step) for step in wanted]
    assert told[0][1]["loss"] == pytest.approx(losses[wanted[0] - 1])
    assert told[0][1]["grad_norm"] == pytest.approx(norms[wanted[0] - 1], rel=1e-5)


def test_all_ways_of_deciding_train_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for masks in (False, True):
        monkeypatch.setattr(LossGuard, "_masks", staticmethod(lambda device, masks=masks: masks))
        module, guard = Leaping("ours", {20: 50.0, 31: 50.0}), LossGuard("skip", window=WINDOW)
        fit(tmp_path, module, [guard], max_steps=40)
        assert guard.skipped == [20, 31]
        ends.append((module.weights[-1], module.states[-1], guard._history))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_level_that_has_changed_for_good_is_accepted(tmp_path: Path) -> None:
    module, guard = Leaping("host", dict.fromkeys(range(30, 80), 10.0)), LossGuard("skip", window=WINDOW)
    fit(tmp_path, module, [guard], max_steps=79)
    assert guard.skipped[0] == 30
    assert len(guard.skipped) < WINDOW
    assert unchanged(module) == guard.skipped


def test_equal_losses_are_no_spikes(way: str, tmp_path: Path) -> None:
    rows = torch.zeros(400, 8, dtype=torch.int64)
    guard = LossGuard("skip", window=4, sigma=0.5)
    fit(tmp_path, Leaping(way, {}, lr=0.0), [guard], rows=rows, max_steps=40)
    assert guard.skipped == []


def test_the_history_survives_a_checkpoint(way: str, tmp_path: Path) -> None:
    """A spike right after a resume is known as one, and the window is bit for bit that of an unbroken run."""
    factors = {15: 40.0, 22: 40.0, 31: 40.0}
    rows = Rows(21 * 4).tokens.repeat(3, 1)  # the resumed run's loader starts again, with the same 21 batches
    whole = LossGuard("skip", window=WINDOW)
    fit(tmp_path, Leaping(way, factors), [whole], rows=rows, max_steps=36)
    first, second = LossGuard("skip", window=WINDOW), LossGuard("skip", window=WINDOW)
    trainer, _ = fit(tmp_path, Leaping(way, factors), [first], rows=rows, max_steps=21)
    trainer.save_checkpoint(tmp_path / "at21.ckpt")
    fit(tmp_path, Leaping(way, factors), [second], rows=rows, max_steps=36, ckpt_path=tmp_path / "at21.ckpt")
    assert whole.skipped == second.skipped == [15, 22, 31]
    assert first.skipped == [15]
    assert torch.equal(whole._history, second._history)
    torch.load(tmp_path / "at21.ckpt", weights_only=True)


def test_another_window_starts_empty() -> None:
    guard = LossGuard("skip", window=8)
    guard.load_state_dict({**LossGuard("skip", window=4).state_dict(), "count": 4, "skipped": [2]})
    assert guard._count == 0
    assert guard.skipped == [2]


@pytest.mark.parametrize(("factor", "said"), [(50.0, "above"), (float("nan"), "gradient norm nan")])
def test_rewinding_is_asked_for_and_only_so_often(way: str, factor: float, said: str, tmp_path: Path) -> None:
    guard = LossGuard("rewind", window=WINDOW, max_rewinds=2)
    guard.rewinds = 1
    module = Leaping(way, {20: factor})
    with pytest.raises(Rewind, match=said) as caught:
        fit(tmp_path, module, [guard], max_steps=30)
    assert (caught.value.step, caught.value.beyond, caught.value.count) == (20, None, 2)
    assert torch.equal(torch.cat([p.detach().flatten() for p in module.parameters()]), module.weights[19])
    for most, ending in ((2, "; rewound 2 times before"), (1, "; rewound once before"), (0, "the step was not taken")):
        guard = LossGuard("rewind", window=WINDOW, max_rewinds=most)
        guard.rewinds = most
        with pytest.raises(Diverged) as caught:
            fit(tmp_path, Leaping(way, {20: factor}), [guard], max_steps=30)
        assert not isinstance(caught.value, Rewind)
        assert str(caught.value).endswith(ending)
        assert caught.value.step == 20


def test_on_a_device_nobody_waits_within_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossGuard, "_masks", staticmethod(lambda device: True))
    module, read = Foreign(optim.AdamW), []
    looking = Later.read

    def watched(later: Later) -> torch.Tensor:
        if len(later._host.shape):  # the guard's, not the optimizer's flag
            read.append(module.trainer.global_step)
        return looking(later)

    monkeypatch.setattr(Later, "read", watched)
    fit(tmp_path, module, [LossGuard("skip")], max_steps=8, log_every_n_steps=100)
    assert read == [1, 2, 3, 4, 5, 6, 7, 8]  # each only when its step is over


class TwoOptimizers(Foreign):
    """Manual optimization: an optimizer each for the embedding and what is behind it."""

    def __init__(self, nan_at: int = -1) -> None:
        super().__init__()
        self.automatic_optimization, self.nan_at = False, nan_at

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in self.table]

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch) * (float("nan") if batch_idx == self.nan_at else 1.0))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


def test_beside_two_optimizers_spikes_are_refused_but_nan_is_not_let_in(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^loss_guard.on_spike = skip: must be None beside 2 optimizers"):
        fit(tmp_path, TwoOptimizers(), [LossGuard("skip")])
    fit(tmp_path, TwoOptimizers(), [LossGuard()], max_steps=6)
    module = TwoOptimizers(nan_at=2)
    with pytest.raises(Diverged, match=r"gradient norm nan at step 5 "):
        fit(tmp_path, module, [LossGuard()], max_steps=8)
    assert all(p.isfinite().all() for p in module.parameters())


def test_beside_a_gradient_scaler_it_stands_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guard, optimizer = LossGuard(), optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()), optimizers=[optimizer])
    guard.on_train_start(trainer, SimpleNamespace(device=torch.device("cpu")))
    guard.on_before_optimizer_step(trainer, None, optimizer)
    assert optimizer._before_update == []
    assert "gradient scaler" in caplog.text


def test_it_lets_go_of_the_optimizer(tmp_path: Path) -> None:
    for factor in (1.0, float("nan")):
        module = Leaping("host", {4: factor})
        try:
            trainer, _ = fit(tmp_path, module, [LossGuard()])
        except Diverged:
            trainer = module.trainer
        assert trainer.optimizers[0]._before_update == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("on_spike", "stop"),
        ("sigma", 0.0),
        ("sigma", float("nan")),
        ("window", 1),
        ("warmup", 1),
        ("warmup", 129),
        ("max_rewinds", -1),
    ],
)
def test_values_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"loss_guard.{field}"):
        LossGuard(**{field: value})
