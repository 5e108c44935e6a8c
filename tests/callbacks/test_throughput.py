"""Throughput against times added up by hand: a fake clock that only the project under test moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from foreign_project import FakeClock, Foreign, Rows, fit

from lightning_opt.callbacks import Throughput, device_peaks, peak_flops

FETCH, FORWARD, BACKWARD, UPDATE, HOOKS = 1.25, 10.0, 20.0, 4.0, 0.5  # ms; a batch of 4 rows is fetched in 5 ms


class SlowHooks(pl.Callback):
    """Somebody's callback that takes time after each micro-batch."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.ms(HOOKS)


def foreign(clock: FakeClock, **hooks: Any) -> Foreign:
    class Timed(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = closure()
            clock.ms(UPDATE)
            super().step()
            return loss

    return Foreign(Timed, forward=lambda: clock.ms(FORWARD), after_backward=lambda: clock.ms(0), **hooks)


class Backward(pl.Callback):
    """Lets the backward pass take time before Throughput hears of its end."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock

    def on_after_backward(self, *_: Any) -> None:
        self.clock.ms(BACKWARD)


def run(tmp_path: Path, clock: FakeClock, throughput: Throughput, module: Foreign | None = None, **options: Any) -> Any:
    callbacks = [Backward(clock), SlowHooks(clock), throughput]
    rows = options.pop("rows", None) or Rows(400, fetch=lambda: clock.ms(FETCH))
    return fit(tmp_path, module or foreign(clock), callbacks, rows=rows, **options)


def test_split_speed_and_mfu_by_hand(tmp_path: Path, clock: FakeClock) -> None:
    throughput = Throughput(flops_per_token=1e6, device_peak_flops=1e9, clock=clock)
    _, logged = run(tmp_path, clock, throughput)
    step = 5 + 10 + 20 + 4 + 0.5
    speed = 4 * 8 / (step / 1e3)
    expected = {
        "step_ms": step,
        "data_ms": 5,
        "forward_backward_ms": 30,
        "optimizer_ms": 4,
        "other_ms": 0.5,
        "optimizer_share": 4 / step,
        "tokens_per_s_per_device": speed,
        "mfu": speed * 1e6 / 1e9,
    }
    assert throughput.last == pytest.approx(expected)
    for name, value in expected.items():
        assert logged.column(name) == pytest.approx([value] * 9), name  # 12 steps, 3 of which warm up


def test_accumulation_is_one_step(tmp_path: Path, clock: FakeClock) -> None:
    throughput = Throughput(clock=clock)
    run(tmp_path, clock, throughput, accumulate_grad_batches=3, max_steps=6)
    step = 3 * (5 + 10 + 20 + 0.5) + 4
    assert throughput.last["step_ms"] == pytest.approx(step)
    assert throughput.last["data_ms"] == pytest.approx(15)
    assert throughput.last["forward_backward_ms"] == pytest.approx(90)
    assert throughput.last["optimizer_ms"] == pytest.approx(4)
    assert throughput.last["tokens_per_s_per_device"] == pytest.approx(3 * 32 / step * 1e3)


def test_validation_checkpoints_and_epochs_do_not_count(tmp_path: Path, clock: FakeClock) -> None:
    module = foreign(clock, validation=lambda: clock.ms(1000), checkpoint=lambda: clock.ms(5000))
    saving = pl.callbacks.ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1)
    throughput = Throughput(clock=clock)
    rows = Rows(16, fetch=lambda: clock.ms(FETCH))  # an epoch is four steps
    callbacks = [Backward(clock), SlowHooks(clock), throughput, saving]
    _, logged = fit(
        tmp_path, module, callbacks, rows=rows, val_rows=Rows(8), val_check_interval=2, enable_checkpointing=True
    )
    assert len(list((tmp_path / "saved").iterdir())) == 12
    assert logged.column("step_ms") == pytest.approx([39.5] * 9)
    assert logged.column("other_ms") == pytest.approx([0.5] * 9)


def test_first_steps_do_not_count_and_a_slow_step_does(tmp_path: Path, clock: FakeClock) -> None:
    module = foreign(clock)
    slow = {0: 9000, 1: 900, 10: 500}  # compilation, then a hiccup in the third interval
    module.hooks["forward"] = lambda: clock.ms(FORWARD + slow.get(len(module.micro_losses), 0))
    throughput = Throughput(warmup_steps=2, clock=clock)
    _, logged = run(tmp_path, clock, throughput, module, log_every_n_steps=4)
    assert logged.column("step_ms") == pytest.approx([39.5, 39.5, 39.5 + 500 / 4])


def test_an_optimizer_that_is_expensive_every_tenth_step_is_told_whole(tmp_path: Path, clock: FakeClock) -> None:
    class Periodic(torch.optim.SGD):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            loss = closure()
            self.calls += 1
            clock.ms(UPDATE + (300 if self.calls % 10 == 0 else 0))
            super().step()
            return loss

    throughput = Throughput(warmup_steps=10, clock=clock)
    started = clock.now
    module = Foreign(Periodic, forward=lambda: clock.ms(FORWARD))
    _, logged = run(tmp_path, clock, throughput, module, log_every_n_steps=10, max_steps=30)
    wall_ms = (clock.now - started) * 1e3 / 30
    assert logged.column("step_ms") == pytest.approx([wall_ms] * 2)
    assert logged.column("optimizer_ms") == pytest.approx([UPDATE + 30] * 2)
    assert logged.column("tokens_per_s_per_device") == pytest.approx([32 / wall_ms * 1e3] * 2)
    parts = [logged.column(f"{part}_ms") for part in ("data", "forward_backward", "optimizer", "other")]
    assert [sum(step) for step in zip(*parts, strict=True)] == pytest.approx([wall_ms] * 2)


def test_variable_batch_sizes(tmp_path: Path, clock: FakeClock) -> None:
    batches = [torch.zeros(rows, 8, dtype=torch.int64) for rows in (8, 8, 8, 4, 8, 12)]
    throughput = Throughput(clock=clock)
    callbacks = [Backward(clock), throughput]
    fit(tmp_path, foreign(clock), callbacks, rows=batches, batch_size=None, log_every_n_steps=6, max_steps=6)
    # three counted steps of 34 ms with 4, 8 and 12 rows of 8 tokens
    assert throughput.last["tokens_per_s_per_device"] == pytest.approx((4 + 8 + 12) * 8 / (3 * 34e-3))


def test_resume_warms_up_again(tmp_path: Path, clock: FakeClock) -> None:
    trainer, _ = run(tmp_path, clock, Throughput(clock=clock), max_steps=5)
    trainer.save_checkpoint(tmp_path / "at5.ckpt")
    module = foreign(clock)
    module.hooks["forward"] = lambda: clock.ms(FORWARD if len(module.micro_losses) >= 3 else 700)
    _, logged = run(tmp_path, clock, Throughput(clock=clock), module, ckpt_path=tmp_path / "at5.ckpt", max_steps=12)
    assert len(module.micro_losses) == 7
    assert logged.column("step_ms") == pytest.approx([39.5] * 4)


def test_an_optimizer_that_announces_its_update_is_timed_without_clipping(tmp_path: Path, clock: FakeClock) -> None:
    class Announcing(torch.optim.SGD):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.announce: list[Any] = []

        def register_before_update_hook(self, fn: Any, *, watches: bool = True) -> Any:
            self.announce.append(fn)
            return lambda: self.announce.remove(fn)

        def step(self, closure: Any = None) -> Any:
            loss = closure()
            for fn in list(self.announce):
                fn(self)
            clock.ms(UPDATE)
            super().step()
            return loss

    class Clipping(Foreign):
        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
            clock.ms(7)

    throughput = Throughput(clock=clock)
    trainer, _ = run(tmp_path, clock, throughput, Clipping(Announcing), max_steps=8)
    assert throughput.last["optimizer_ms"] == pytest.approx(UPDATE)
    assert throughput.last["other_ms"] == pytest.approx(7 + HOOKS)
    assert trainer.optimizers[0].announce == []  # let go of

    throughput = Throughput(clock=clock)  # the same with an optimizer that does not announce: clipping is inside
    run(tmp_path, clock, throughput, Clipping(foreign(clock).make_optimizer), max_steps=8)
    assert throughput.last["optimizer_ms"] == pytest.approx(UPDATE + 7)


def test_unknown_tokens_and_unknown_device_are_absent_not_guessed(tmp_path: Path, clock: FakeClock) -> None:
    throughput = Throughput(flops_per_token=1e6, clock=clock)
    run(tmp_path, clock, throughput, max_steps=5)
    assert "mfu" not in throughput.last  # the CPU has no peak in the table
    assert "tokens_per_s_per_device" in throughput.last

    class Pictures(Foreign):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.table[1](batch).square().mean()

    throughput = Throughput(flops_per_token=1e6, device_peak_flops=1e9, clock=clock)
    callbacks = [Backward(clock), throughput]
    fit(tmp_path, Pictures(), callbacks, rows=[torch.randn(16) for _ in range(80)], max_steps=5)  # type: ignore[arg-type]
    assert "step_ms" in throughput.last
    assert "tokens_per_s_per_device" not in throughput.last


def test_manual_optimization_with_two_optimizers(tmp_path: Path, clock: FakeClock) -> None:
    class Manual(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                clock.ms(FORWARD)
                self.manual_backward(self.loss(batch))
                optimizer.step(lambda: clock.ms(UPDATE))

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in self.table]

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            pass

    throughput = Throughput(clock=clock)
    run(tmp_path, clock, throughput, Manual(), log_every_n_steps=2, max_steps=16)
    assert throughput.last["forward_backward_ms"] == pytest.approx(60)
    assert throughput.last["data_ms"] == pytest.approx(5)


@pytest.mark.parametrize(
    ("name", "arithmetic", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 NVL", "bfloat16", 835.0),
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156.0),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("NVIDIA H100", "bfloat16", None),  # no such exact name
        ("NVIDIA L40S-24Q", "bfloat16", None),  # a slice of a device is not the device
        ("", "float32", None),
    ],
)
def test_peaks_are_dense_and_by_exact_name(name: str, arithmetic: str, teraflops: float | None) -> None:
    assert peak_flops(name, arithmetic) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_peaks_agree_with_lightning_where_its_table_is_dense() -> None:
    from lightning.fabric.utilities.throughput import _CUDA_FLOPS

    theirs = {
        "NVIDIA H100 80GB HBM3": "h100 sxm",
        "NVIDIA H100 PCIe": "h100 pcie",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA L4": "l4",
        "NVIDIA L40": "l40",
        "Tesla T4": "t4",
        "Tesla V100-SXM2-16GB": "v100 sxm",
        "Tesla V100-PCIE-16GB": "v100 pcie",
        "Tesla V100S-PCIE-32GB": "v100s pcie",
    }
    for ours, chip in theirs.items():
        for key, name in ((torch.float32, "float32"), (torch.float16, "float16"), ("tfloat32", "tf32")):
            if key in _CUDA_FLOPS[chip]:
                assert peak_flops(ours, name) == pytest.approx(_CUDA_FLOPS[chip][key], rel=1e-3), (ours, name)
    # and the entry that keeps us from using it: sparse, twice the dense peak
    assert _CUDA_FLOPS["h100 nvl"][torch.bfloat16] / peak_flops("NVIDIA H100 NVL", "bfloat16") > 2


def test_arithmetic_follows_the_trainers_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_peaks.arithmetic_of("bf16-mixed") == device_peaks.arithmetic_of("bf16-true") == "bfloat16"
    assert device_peaks.arithmetic_of("16-mixed") == "float16"
    assert device_peaks.arithmetic_of("64-true") is None
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert device_peaks.arithmetic_of("32-true") == "float32"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert device_peaks.arithmetic_of("32-true") == "tf32"


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="warmup_steps = -1"):
        Throughput(warmup_steps=-1)
    with pytest.raises(ValueError, match="bf16"):
        peak_flops("NVIDIA H200", "bf16")


def test_the_profiler_is_left_as_it_was(tmp_path: Path, clock: FakeClock) -> None:
    trainer, _ = run(tmp_path, clock, Throughput(clock=clock), max_steps=2)
    assert "start" not in trainer.profiler.__dict__


@pytest.mark.gpu
def test_on_a_gpu_the_parts_add_up_to_the_wall(tmp_path: Path) -> None:
    import time

    class Wide(Foreign):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            work = torch.randn(2048, 2048, device=self.device)
            for _ in range(20):
                work = work @ work / 50
            return self.loss(batch) + 0 * work.sum()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            pass

    throughput = Throughput(warmup_steps=5)
    start = time.perf_counter()
    fit(
        tmp_path,
        Wide(),
        [throughput],
        rows=Rows(2000),
        max_steps=200,
        log_every_n_steps=50,
        accelerator="gpu",
        devices=1,
    )
    wall = time.perf_counter() - start
    parts = sum(throughput.last[f"{part}_ms"] for part in ("data", "forward_backward", "optimizer", "other"))
    assert throughput.last["step_ms"] == pytest.approx(parts)
    assert 0 < throughput.last["step_ms"] * 200 / 1e3 < wall
    assert throughput.last["forward_backward_ms"] > throughput.last["optimizer_ms"]
