"""The chunked cross-entropy against torch's own on all logits, and the head that computes it inside real models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_opt import models
from lightning_opt.models import chunked, linear_cross_entropy
from lightning_opt.models import loss as loss_module

V, H = 61, 16
SMALL = {
    "vocab_size": V,
    "hidden_size": H,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(autouse=True)
def seven_rows_at_a_time(monkeypatch):
    """32 rows: four whole chunks and a rest."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", {"cpu": 7 * 4 * V, "cuda": 7 * 4 * V})


def built(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    return getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**{**SMALL, **more}))


def batch(ignored: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(V, (2, 2, 16), generator=generator)
    labels[0, :ignored] = -100
    return ids, labels


def operands(dtype: torch.dtype, bias: bool, device: str = "cpu") -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(32, H), (V, H), (V,) if bias else None]
    return [
        None if s is None else torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes
    ]


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, z_loss: float) -> Tensor:
    """The definition, by torch's own cross-entropy."""
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    kept = targets != -100
    return F.cross_entropy(logits, targets) + z_loss * logits[kept].logsumexp(-1).square().mean()


def gradients(loss: Callable[..., Tensor], given: list[Tensor | None], *rest: Any) -> list[Tensor]:
    wanted = [part for part in given if part is not None]
    return list(torch.autograd.grad(3 * loss(*given, *rest), wanted))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_loss_and_gradients_are_those_of_all_logits_at_once(bias: bool, z_loss: float) -> None:
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 3e-7)):
        given, targets = operands(dtype, bias), batch()[1].flatten()
        total, nll = linear_cross_entropy(*given, targets, z_loss)
        torch.testing.assert_close(total, plain(*given, targets, z_loss), rtol=10 * tolerance, atol=0)
        torch.testing.assert_close(nll, plain(*given, targets, 0.0), rtol=10 * tolerance, atol=0)
        ours = gradients(lambda *a: linear_cross_entropy(*a)[0], given, targets, z_loss)
        theirs = gradients(plain, given, targets, z_loss)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * 10)
        every = models.logits_cross_entropy(F.linear(*given), targets, z_loss)
        torch.testing.assert_close(every[0], total, rtol=10 * tolerance, atol=0)


def test_what_fits_into_one_chunk_is_computed_as_ever_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is 3 % cheaper."""
    chunks: list[slice] = []
    chunk = chunked._chunk
    monkeypatch.setattr(chunked, "_chunk", lambda *given: chunks.append(given[-1]) or chunk(*given))
    given, targets = operands(torch.float32, True), batch()[1].flatten()
    whole, parts = (
        gradients(lambda *a, n=rows: linear_cross_entropy(*a, 0.1, n)[0], given, targets) for rows in (32, 31)
    )
    assert chunks == [slice(0, 31), slice(31, 32)]
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-6)
    for index in (0, 1):
        grads = torch.autograd.grad(linear_cross_entropy(*given, targets, 0.0, 32)[index], given[0])
        assert bool(grads[0].any()) == (index == 0)  # none flows through what is only reported


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_gradcheck(z_loss: float) -> None:
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 3), (5, 3), (5,))]
    targets = torch.tensor([4, -100, 0, 1, 1, -100, 2])
    assert torch.autograd.gradcheck(lambda *a: linear_cross_entropy(*a, targets, z_loss, 3)[0], given)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    hidden, weight, _ = operands(torch.float32, False)
    targets = batch()[1].flatten()
    both = gradients(lambda *a: linear_cross_entropy(*a)[0], [hidden, weight, None], targets)
    frozen = gradients(lambda h: linear_cross_entropy(h, weight.detach(), None, targets)[0], [hidden])
    head_only = gradients(lambda w: linear_cross_entropy(hidden.detach(), w, None, targets)[0], [weight])
    assert torch.equal(frozen[0], both[0])
    assert torch.equal(head_only[0], both[1])
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, None, targets).requires_grad


def test_a_batch_in_which_nothing_counts_is_worth_nothing() -> None:
    given, targets = operands(torch.float32, True), torch.full((32,), -100)
    assert linear_cross_entropy(*given, targets, 0.1).tolist() == [0, 0]
    assert all(not g.any() for g in gradients(lambda *a: linear_cross_entropy(*a)[0], given, targets))
    assert models.logits_cross_entropy(F.linear(*given), targets, 0.1)[0].item() == 0


def test_logits_too_large_for_exp_stay_finite() -> None:
    hidden, weight, _ = operands(torch.float32, False)
    targets = batch()[1].flatten()
    given = [(hidden * 300).detach().requires_grad_(), weight, None]
    torch.testing.assert_close(linear_cross_entropy(*given, targets)[0], plain(*given, targets, 0.0), rtol=1e-6, atol=0)
    assert all(g.isfinite().all() for g in gradients(lambda *a: linear_cross_entropy(*a)[0], given, targets))


def test_a_kept_graph_gives_the_gradient_again() -> None:
    given, targets = operands(torch.float32, True), batch()[1].flatten()
    total = linear_cross_entropy(*given, targets)[0]
    first = torch.autograd.grad(2 * total, given, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(2 * total, given), strict=True):
        assert torch.equal(a, b)


def near_in_bfloat16(device: str) -> None:
    given, targets = operands(torch.float32, True, device=device), batch()[1].flatten().to(device)
    exact = gradients(plain, given, targets, 0.1)
    with torch.autocast(device, torch.bfloat16):
        ours = linear_cross_entropy(*given, targets, 0.1)[0]
        theirs = plain(*given, targets, 0.1)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # the logits are rounded alike
        got = gradients(lambda *a: linear_cross_entropy(*a)[0], given, targets, 0.1)
        by_torch = gradients(plain, given, targets, 0.1)
    assert [g.dtype for g in got] == [torch.float32] * 3
    for a, b, right in zip(got, by_torch, exact, strict=True):
        assert (a - right).norm() <= 1.2 * (b - right).norm()  # rounded no more than torch's
    halves = [part.detach().bfloat16().requires_grad_() for part in given]
    got = gradients(lambda *a: linear_cross_entropy(*a)[0], halves, targets, 0.1)
    by_torch = gradients(plain, halves, targets, 0.1)
    assert [g.dtype for g in got] == [torch.bfloat16] * 3
    for a, b, right in zip(got, by_torch, exact, strict=True):
        assert (a - right).norm() <= 1.2 * (b - right).norm()


def test_bfloat16_rounds_as_torch_does() -> None:
    near_in_bfloat16("cpu")


@pytest.mark.gpu
def test_bfloat16_rounds_as_torch_does_on_a_gpu() -> None:
    near_in_bfloat16("cuda")


def test_float32_logits_of_the_whole_batch_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    model, (ids, labels) = built("Llama"), batch()
    with Watch():
        models.causal_lm_loss(model, ids, labels, 0.1).total.backward()
    assert largest < 32 * V / 1.5
    largest = 0
    with Watch(), torch.inference_mode():
        models.causal_lm_loss(model, ids, labels)
    assert largest < 32 * V / 1.5


def own_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """What the model's authors compute for labels that are already shifted."""
    return model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False).loss


NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
LOCAL = {"logits_soft_cap": 0.5, "block_types": ["attention"], "attention_window_size": 8}
PLAIN = [
    ("Llama", {}),
    ("Llama", {"tie_word_embeddings": True}),
    ("GPT2", NO_DROPOUT),
    ("Gemma2", {"head_dim": 4, "final_logit_softcapping": None}),
    ("Phi", {"partial_rotary_factor": 1.0}),  # its head has a bias
]
CHANGING = [
    ("Gemma2", {"head_dim": 4, "final_logit_softcapping": 0.5}),
    ("Cohere", {"logit_scale": 0.1}),
    ("Granite", {"logits_scaling": 3.0}),
    ("RecurrentGemma", LOCAL),
]


@pytest.mark.parametrize(("kind", "more", "taken"), [(*c, True) for c in PLAIN] + [(*c, False) for c in CHANGING])
def test_real_models_get_their_own_loss(kind: str, more: dict[str, Any], taken: bool) -> None:
    model, (ids, labels) = built(kind, **more), batch()
    for _ in range(2):  # found out, then known
        model.zero_grad()
        loss = models.causal_lm_loss(model, ids, labels)
        loss.total.backward()
        ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        theirs = own_loss(model, ids, labels)
        theirs.backward()
        torch.testing.assert_close(loss.nll, theirs.detach(), rtol=1e-6, atol=0)
        assert not loss.nll.requires_grad
        for name, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(ours[name], p.grad, rtol=1e-4, atol=2e-7)
    assert (model.get_output_embeddings() not in loss_module._not_plain) == taken


@pytest.mark.parametrize("change", ["in place", "hook", "cut", "indexed"])
def test_changes_after_the_head_are_noticed_however_they_are_made(change: str) -> None:
    class Changed(transformers.LlamaForCausalLM):
        def forward(self, **inputs: Any) -> Any:
            out = super().forward(**inputs)
            if change == "in place":
                out.logits *= 0.25
            if change == "cut":
                out.logits = out.logits[..., : V - 3]
            if change == "indexed":
                out.logits[:, :, 3] = -1e4
            return out

    model, (ids, labels) = Changed(transformers.LlamaConfig(**SMALL)), batch()
    labels = labels.where((labels < V - 3) & (labels != 3), -100)
    if change == "hook":
        model.lm_head.register_forward_hook(lambda _, __, logits: logits.tanh())
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            logits = model(input_ids=ids, use_cache=False).logits
            expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            assert models.causal_lm_loss(model, ids, labels).nll.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_head_that_is_no_linear_map_gives_its_logits() -> None:
    class Doubled(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    model, (ids, labels) = built("Llama"), batch()
    model.lm_head = Doubled(H, V, bias=False)
    expected = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten())
    assert models.causal_lm_loss(model, ids, labels).nll.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_head_is_ordinary_again_afterwards_and_its_hooks_fire() -> None:
    model, (ids, labels) = built("Llama"), batch()
    before, calls = model(input_ids=ids).logits, []
    handles = [
        model.lm_head.register_forward_pre_hook(lambda *_: calls.append("before")),
        model.lm_head.register_forward_hook(lambda *_: calls.append("after")),
    ]
    models.causal_lm_loss(model, ids, labels).total.backward()
    assert calls == ["before", "after"]
    for handle in handles:
        handle.remove()
    assert torch.equal(model(input_ids=ids).logits, before)
    with pytest.raises(TypeError):
        models.causal_lm_loss(model, ids, labels, z_loss="x")
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not {"forward", "_question"} & set(vars(model.lm_head))


def test_under_a_checkpoint_around_everything_and_twice_before_backward() -> None:
    model, (ids, labels) = built("Llama"), batch()

    def gradient(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(model.parameters())))

    once = gradient(models.causal_lm_loss(model, ids, labels).total)
    again = checkpoint(lambda i: models.causal_lm_loss(model, i, labels).total, ids, use_reentrant=False)
    for a, b in zip(once, gradient(again), strict=True):
        assert torch.equal(a, b)
    two = [models.causal_lm_loss(model, ids, labels).total for _ in range(2)]
    for a, b in zip(once, gradient(sum(two) / 2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_it_is_the_same_and_is_not_compiled_anew_each_step(whole: bool) -> None:
    torch.compiler.reset()
    models_compiled = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal models_compiled
        models_compiled += 1
        return graph.forward

    model, (ids, labels) = built("Llama"), batch()
    expected = models.causal_lm_loss(model, ids, labels).total
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    for part in [model] if whole else model.model.layers:
        part.compile(backend=count)
    for step in range(4):
        loss = models.causal_lm_loss(model, ids, labels)
        got = torch.autograd.grad(loss.total, list(model.parameters()))
        torch.testing.assert_close(loss.total, expected, rtol=1e-6, atol=0)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        if step == 1:
            settled = models_compiled
    assert models_compiled == settled >= 1
    assert model.lm_head not in loss_module._not_plain


def test_compiled_soft_caps_are_noticed_too() -> None:
    torch.compiler.reset()
    model, (ids, labels) = built("Gemma2", head_dim=4, final_logit_softcapping=0.5), batch()
    expected = own_loss(model, ids, labels).item()
    model.compile(backend="eager")
    for _ in range(2):
        assert models.causal_lm_loss(model, ids, labels).nll.item() == pytest.approx(expected, rel=1e-6)


def test_float16_gives_its_logits_because_its_gradients_need_the_loss_scale() -> None:
    model, (ids, labels) = built("Llama").half(), batch()
    with torch.no_grad():
        loss = models.causal_lm_loss(model, ids, labels).nll.item()
    assert loss == pytest.approx(math.log(V), abs=0.1)
    assert model.lm_head in loss_module._not_plain
