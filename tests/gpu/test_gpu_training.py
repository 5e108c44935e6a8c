"""Fits on a GPU: they learn in every format, compiled or not, repeat their bits, and do not wait for the device."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from gpu_runs import BATCH, LENGTH, fit, small_model

from lightning_opt import models, training
from lightning_opt.callbacks import Memory, Stability, Throughput
from lightning_opt.models import chunked

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("precision", "compiles"), [("bf16-mixed", "layers"), ("bf16-true", "off"), ("32-true", "off")]
)
def test_a_fit_learns(tmp_path: Path, precision: str, compiles: str) -> None:
    module, columns = fit(tmp_path, steps=30, precision=precision, compile=compiles)
    assert columns["train/loss"][-1] < columns["train/loss"][0] - 0.5
    assert columns["val/loss"][-1] < columns["train/loss"][0] - 0.5
    wanted = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in module.parameters()} == {wanted}
    assert module.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_automatic_choices_find_the_gpu() -> None:
    assert training.choose_device("auto") == "cuda"
    precision, why = training.choose_precision("auto", "auto")
    assert precision == ("bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"), why


def test_compiled_layers_lose_nothing(tmp_path: Path) -> None:
    """bf16 rounds fused operations elsewhere, so the losses agree to its precision only."""
    _, eager = fit(tmp_path / "eager")
    _, compiled = fit(tmp_path / "compiled", compile="layers")
    assert compiled["train/loss"] == pytest.approx(eager["train/loss"], rel=0.02)
    assert compiled["train/loss"][0] == pytest.approx(eager["train/loss"][0], rel=2e-3)


def test_deterministic_runs_repeat_their_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """conf/trainer/default.yaml asks for this; cuBLAS refuses to without a workspace setting, which Lightning makes."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        first, _ = fit(tmp_path / "a", deterministic=True)
        again, _ = fit(tmp_path / "b", deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


class Waits(pl.Callback):
    """Where the host waited for the device, in the optimizer steps between two.

    Args:
        first: optimizer steps done before it begins to look.
        last: optimizer steps done when it ends.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.found: list[str] = []
        self._catch: warnings.catch_warnings | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.first and self._catch is None:
            self._catch = warnings.catch_warnings(record=True)
            self._seen = self._catch.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.last and torch.cuda.get_sync_debug_mode():
            torch.cuda.set_sync_debug_mode("default")
            self._catch.__exit__(None, None, None)
            self.found = [f"{seen.filename}:{seen.lineno}" for seen in self._seen if "synchroniz" in str(seen.message)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_waits_for_the_device_only_where_it_must(tmp_path: Path, accumulate: int) -> None:
    """For the gradient's norm, which decides whether the step is taken, and in each forward of transformers, which
    looks whether sequences are packed."""
    waits = Waits(3, 7)
    try:
        fit(
            tmp_path,
            accumulate=accumulate,
            callbacks=[Stability(), Throughput(), Memory(), waits],
            log_every_n_steps=50,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits.found, "the norm alone makes the host wait"
    assert len(waits.found) <= 4 * (1 + accumulate), sorted(set(waits.found))


@pytest.mark.parametrize(("optimizer", "state_per_weight"), [("adamw", 8), ("lion", 4)])
def test_memory_is_accounted_for(tmp_path: Path, optimizer: str, state_per_weight: int) -> None:
    memory = Memory()
    module, _ = fit(tmp_path, optimizer=optimizer, callbacks=[memory], val_sequences=0)
    weights = sum(p.numel() for p in module.parameters())
    assert memory.last["optimizer_state_bytes"] == state_per_weight * weights
    # weights, gradients and state at once, and activations
    assert memory.last["memory_peak_bytes"] > (8 + state_per_weight) * weights
    assert memory.last["memory_peak_bytes"] >= memory.last["memory_allocated_bytes"]
    assert memory.last["memory_reserved_bytes"] >= memory.last["memory_peak_bytes"]


def test_throughput_tells_the_devices_time(tmp_path: Path) -> None:
    throughput = Throughput(flops_per_token=1e6, device_peak_flops=1e15)
    fit(tmp_path, steps=20, callbacks=[throughput], log_every_n_steps=5)
    told = throughput.last
    parts = sum(told[name] for name in ("data_ms", "forward_backward_ms", "optimizer_ms", "other_ms"))
    assert parts == pytest.approx(told["step_ms"], rel=1e-6)
    assert told["tokens_per_s_per_device"] == pytest.approx(BATCH * LENGTH / told["step_ms"] * 1e3, rel=1e-6)
    assert told["mfu"] == pytest.approx(told["tokens_per_s_per_device"] * 1e6 / 1e15, rel=1e-6)
    assert told["forward_backward_ms"] > 0
    assert 0 < told["optimizer_share"] < 1


def test_the_loss_never_holds_all_logits() -> None:
    tokens, vocabulary, hidden = 16384, 65536, 64
    torch.manual_seed(0)
    model = models.llama(
        hidden_size=hidden,
        num_layers=1,
        num_heads=1,
        intermediate_size=64,
        vocab_size=vocabulary,
        context_length=2048,
        tie_embeddings=False,
    ).cuda()
    ids = torch.randint(vocabulary, (tokens // 2048, 2048), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        loss = models.causal_lm_loss(model, ids, ids.roll(-1, 1))
    loss.total.backward()
    held = torch.cuda.max_memory_allocated() - before
    assert held < 4 * tokens * vocabulary, "as much as all float32 logits"
    assert loss.nll.item() == pytest.approx(11.1, abs=0.3)  # log 65536 = 11.09


def test_the_chunked_loss_is_the_plain_one() -> None:
    torch.manual_seed(0)
    model = small_model(tie_embeddings=False).cuda()
    ids = torch.randint(512, (4, LENGTH), device="cuda")
    labels = ids.roll(-1, 1)
    gradients = []
    for plain in (False, True):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            if plain:
                logits = model(input_ids=ids, use_cache=False).logits.float()
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            else:
                loss = models.causal_lm_loss(model, ids, labels).total
        loss.backward()
        gradients.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    (ours, grads), (plain_loss, plain_grads) = gradients
    assert ours == pytest.approx(plain_loss, rel=1e-5)
    for a, b in zip(grads, plain_grads, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()


def test_large_chunks_of_the_loss_run_compiled_and_right() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2048, 64, device="cuda", requires_grad=True)
    weight = torch.randn(65536, 64, device="cuda", requires_grad=True)
    targets = torch.randint(65536, (2048,), device="cuda")
    targets[::5] = -100
    assert hidden.shape[0] * weight.shape[0] >= chunked.WORTH_COMPILING
    found = []
    for plain in (True, False):
        hidden.grad = weight.grad = None
        if plain:
            loss, _ = chunked.logits_cross_entropy(hidden @ weight.T, targets, z_loss=1e-4)
        else:
            loss = chunked.linear_cross_entropy(hidden, weight, None, targets, z_loss=1e-4)[0]
        loss.backward()
        found.append((loss.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)
    assert chunked._can_compile, "compiling failed"
