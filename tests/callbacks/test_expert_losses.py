"""Router losses against their formulas in numpy, transformers' own loss, and an objective written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_experts import EXPERTS, TOP_K, Batches, ForeignExperts, batch_of, model_of, next_token_loss
from foreign_project import Foreign, fit
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lightning_opt.anatomy import find_expert_layers
from lightning_opt.anatomy.routers import choice_of, listen, scores_in
from lightning_opt.callbacks import RouterLosses, balance_loss, expert_losses, router_z_loss


def drawn(rows: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(rows, EXPERTS, generator=generator, dtype=torch.float64)
    return logits, logits.topk(TOP_K).indices, torch.rand(rows, generator=generator) < 0.7


@pytest.mark.parametrize("padded", [False, True])
def test_balance_is_deepseeks_sum_and_a_kth_of_transformers(padded: bool) -> None:
    logits, chosen, tokens = drawn()
    tokens = tokens if padded else torch.ones_like(tokens)
    told = balance_loss(logits.softmax(-1), chosen, tokens if padded else None)
    scores, kept = np.exp(logits.numpy()), tokens.numpy()
    scores = (scores / scores.sum(1, keepdims=True))[kept]
    f = [EXPERTS / (TOP_K * kept.sum()) * (chosen.numpy()[kept] == e).sum() for e in range(EXPERTS)]
    assert float(told) == pytest.approx(sum(np.array(f) * scores.mean(0)), rel=1e-12)
    theirs = load_balancing_loss_func((logits,), EXPERTS, TOP_K, tokens[None].long() if padded else None)
    assert float(told) == pytest.approx(float(theirs) / TOP_K, rel=1e-6)


def test_balance_is_one_where_all_is_even() -> None:
    chosen = torch.arange(EXPERTS).view(-1, 1)
    assert float(balance_loss(torch.full((EXPERTS, EXPERTS), 1 / EXPERTS), chosen)) == pytest.approx(1.0)
    assert float(balance_loss(torch.eye(EXPERTS)[:1].expand(4, -1), torch.zeros(4, 1, dtype=torch.long))) == EXPERTS


def test_sequences_are_each_on_their_own() -> None:
    logits, chosen, tokens = drawn()
    each = balance_loss(logits.view(3, 8, -1).softmax(-1), chosen.view(3, 8, -1), tokens.view(3, 8))
    for row in range(3):
        part = slice(8 * row, 8 * row + 8)
        assert torch.equal(each[row], balance_loss(logits[part].softmax(-1), chosen[part], tokens[part]))


def test_z_is_the_mean_squared_log_partition() -> None:
    logits, _, tokens = drawn()
    squares = np.log(np.exp(logits.numpy()).sum(1)) ** 2
    assert float(router_z_loss(logits)) == pytest.approx(squares.mean(), rel=1e-12)
    assert float(router_z_loss(logits, tokens)) == pytest.approx(squares[tokens.numpy()].mean(), rel=1e-12)


def logits_and_choice(answer: Any) -> tuple[Tensor, Tensor]:
    """As their own code has it: Llama 4 answers (sigmoids of who is chosen, logits), JetMoe's map logits alone."""
    if isinstance(answer, tuple) and len(answer) == 3:
        return answer[0], answer[2]
    logits = answer[1] if isinstance(answer, tuple) else answer
    return logits, logits.topk(TOP_K).indices


def of_a_model(model: Any, batches: list[dict[str, Tensor]], over: str) -> tuple[list[Tensor], list[Tensor]]:
    """(balance, z) of each micro-batch by a pass of its own, the sums over layers written out."""
    layers = find_expert_layers(model)
    answers: dict[int, Any] = {}
    hooks = [
        layer.router.register_forward_hook(lambda _, __, answer, i=i: answers.__setitem__(i, answer))
        for i, layer in enumerate(layers)
    ]
    balances, zs, before = [], [], [0] * len(layers)
    for batch in batches:
        next_token_loss(model, batch)
        mask = batch["attention_mask"].reshape(-1) != 0
        balance = z = 0
        for i, layer in enumerate(layers):
            logits, chosen = logits_and_choice(answers[i])
            sigmoid = layer.bias is not None or type(layer.router).__name__ in ("Llama4Router", "FlintTopKRouter")
            scores = logits.sigmoid() / logits.sigmoid().sum(-1)[:, None] if sigmoid else logits.softmax(-1)
            parts = [mask.clone()]
            if over == "sequence":
                rows = torch.arange(mask.numel()) // batch["input_ids"].shape[1]
                parts = [mask & (rows == row) for row in range(len(batch["input_ids"]))]
            losses = []
            for part in parts:
                counts = torch.stack([(chosen[part] == e).sum() for e in range(EXPERTS)]).float()
                if over == "global":
                    before[i] = counts = before[i] + counts
                losses.append(EXPERTS * (counts / counts.sum() * scores[part].mean(0)).sum())
            balance = balance + torch.stack(losses).mean()
            z = z + logits[mask].logsumexp(-1).square().mean()
        balances.append(balance)
        zs.append(z)
    for hook in hooks:
        hook.remove()
    return balances, zs


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("over", ["layer", "sequence", "global"])
@pytest.mark.parametrize("family", ["Glm4Moe", "Mixtral", "Flint", "JetMoe", "Llama4"])
def test_the_gradient_is_that_of_the_whole_objective(
    tmp_path: Path, family: str, over: str, checkpointing: bool
) -> None:
    """One step of plain gradient descent over two micro-batches, beside the same step made by hand."""
    rows = Batches(2, padded=True)
    by_hand = model_of(family)
    if checkpointing and not by_hand.supports_gradient_checkpointing:
        pytest.skip(f"transformers' {family} cannot")
    balances, zs = of_a_model(by_hand, [rows[0], rows[1]], over)
    for number in range(2):
        loss = next_token_loss(by_hand, rows[number]) + 0.3 * balances[number] + 0.05 * zs[number]
        (loss / 2).backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.5).step()

    module, callback = ForeignExperts(model_of(family), lr=0.5), RouterLosses(0.3, over, 0.05)
    if checkpointing:
        module.model.activation_checkpointing_enable({"use_reentrant": False})
    ordered = [rows[0], rows[1]]
    _, logged = fit(
        tmp_path,
        module,
        [callback],
        rows=ordered,
        batch_size=None,
        max_steps=1,
        accumulate_grad_batches=2,
        enable_progress_bar=False,
    )
    for (name, mine), theirs in zip(module.model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=2e-5, msg=name)
    layers = len(find_expert_layers(by_hand))
    assert logged.column("router_loss/balance") == pytest.approx([float(balances[1]) / layers], rel=1e-4)
    assert logged.column("router_loss/z") == pytest.approx([float(zs[1]) / layers], rel=1e-4)


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    module = ForeignExperts(model_of("Glm4Moe"))
    module.model.activation_checkpointing_enable({"use_reentrant": True})
    module.model.enable_input_require_grads()
    with pytest.raises(ValueError, match="must be non-reentrant"):
        fit(tmp_path, module, [RouterLosses(0.1)], rows=Batches(2), batch_size=None, max_steps=1)


class TwoViews(ForeignExperts):
    """Learns from two views of each batch, and looks at what a teacher, itself, says of a third."""

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        with torch.no_grad():
            next_token_loss(self.model, view(batch, 7))
        return next_token_loss(self.model, batch) + next_token_loss(self.model, view(batch, 3))


def view(batch: dict[str, Tensor], shift: int) -> dict[str, Tensor]:
    return {**batch, "input_ids": (batch["input_ids"] + shift) % 61}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("over", ["layer", "sequence"])
def test_all_passes_with_gradients_count_and_a_teacher_does_not(tmp_path: Path, over: str, checkpointing: bool) -> None:
    batch, by_hand = Batches(1, padded=True)[0], model_of("Glm4Moe")
    for each in (batch, view(batch, 3)):
        balances, zs = of_a_model(by_hand, [each], over)
        (next_token_loss(by_hand, each) + 0.3 * balances[0] + 0.05 * zs[0]).backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.5).step()
    module = TwoViews(model_of("Glm4Moe"), lr=0.5)
    if checkpointing:
        module.model.activation_checkpointing_enable({"use_reentrant": False})
    fit(tmp_path, module, [RouterLosses(0.3, over, 0.05)], rows=[batch], batch_size=None, max_steps=1)
    for (name, mine), theirs in zip(module.model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=2e-5, msg=name)


def test_one_sum_over_the_processes_for_all_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(expert_losses, "sum_over_data", lambda counts, _: seen.append(counts.clone()))
    module = ForeignExperts(model_of("Glm4Moe"))
    fit(tmp_path, module, [RouterLosses(0.1, "global")], rows=Batches(2), batch_size=None, max_steps=2)
    assert [counts.view(2, EXPERTS).tolist() for counts in seen] == [counted.tolist() for counted in module.counted]


def test_sequences_that_do_not_fit_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Flat(ForeignExperts):
        def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
            return next_token_loss(self.model, {"input_ids": batch["input_ids"].reshape(1, -1)[:, :39]})

    ends = []
    for over in ("sequence", "layer"):
        module = Flat(model_of("Mixtral"), lr=0.5)
        fit(tmp_path, module, [RouterLosses(0.3, over)], rows=Batches(2), batch_size=None, max_steps=2)
        ends.append(module.model.state_dict())
    assert caplog.text.count("39 positions are not of 4 sequences") == 1
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


NAMED = {"Ernie4_5_Moe": "softmax", "Mixtral": "softmax", "JetMoe": "softmax", "DeepseekV4": "sqrtsoftplus"}
NAMED |= dict.fromkeys(("Afmoe", "Glm4Moe", "Flint", "Llama4"), "sigmoid")


@pytest.mark.parametrize(("family", "named"), NAMED.items())
def test_scores_are_those_that_weigh_the_experts(family: str, named: str, caplog: pytest.LogCaptureFixture) -> None:
    model, answers = model_of(family), []
    layer = find_expert_layers(model)[0]
    blocks = dict(model.named_modules())
    hooks = listen(layer, blocks[layer.name], lambda _, told: answers.append(told))
    next_token_loss(model, batch_of(0))
    assert len(hooks) == 1 + (family in ("Afmoe", "JetMoe"))
    logits, chosen = scores_in(answers[0][-1], layer), choice_of(answers[0], layer)
    assert expert_losses.score_function(layer, logits, chosen, answers[0]) == named
    assert not caplog.text


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 2])
def test_scores_by_their_weights_alone(k: int, scale: float) -> None:
    layer, logits = find_expert_layers(model_of("Mixtral"))[0], drawn()[0]
    each = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "sqrtsoftplus": (1 + logits.exp()).log().sqrt()}
    for name, scores in each.items():
        weights, chosen = scores.topk(k)
        masked = torch.zeros_like(scores).scatter(-1, chosen, weights)
        for told in (weights, masked):
            assert expert_losses.score_function(layer, logits, chosen, (logits, scale * told)) == name
        torch.testing.assert_close(expert_losses.SCORES[name](logits), scores / scores.sum(-1, keepdim=True))
    even = torch.zeros_like(logits)
    seen = expert_losses.score_function(layer, even, chosen, (even, torch.full_like(weights, 0.5)))
    assert seen == ("softmax" if k == 1 else None)  # all functions are the same there
    assert expert_losses.score_function(layer, logits, chosen, (logits, -weights)) == "softmax"


@pytest.mark.parametrize("k", [1, 2])
def test_scores_of_no_known_function_are_told(k: int, caplog: pytest.LogCaptureFixture) -> None:
    layer, logits = find_expert_layers(model_of("Mixtral"))[0], drawn()[0]
    weights, chosen = logits.square().topk(k)
    expert_losses.score_function(layer, logits, chosen, (logits, weights))
    assert f"{layer.name} weighs its experts by none of softmax, sigmoid, sqrtsoftplus" in caplog.text


def test_equal_logits_decide_nothing_for_later(tmp_path: Path) -> None:
    """Flint's routers start at zero: what they are is seen when they have moved."""
    module, callback = ForeignExperts(model_of("Flint"), lr=0.5), RouterLosses(0.1)
    for layer in find_expert_layers(module.model):
        torch.nn.init.zeros_(layer.router.weight)
    fit(tmp_path, module, [callback], rows=Batches(2), batch_size=None, max_steps=2)
    assert set(callback._by.values()) == {"sigmoid"}


def test_a_loss_in_a_dict_and_manual_optimization(tmp_path: Path) -> None:
    class InDict(ForeignExperts):
        def training_step(self, batch: dict[str, Tensor], number: int) -> dict[str, Tensor]:
            return {"loss": super().training_step(batch, number), "other": torch.zeros(())}

    plain, added = InDict(model_of("Mixtral")), InDict(model_of("Mixtral"))
    fit(tmp_path, plain, [], rows=Batches(1), batch_size=None, max_steps=1)
    fit(tmp_path, added, [RouterLosses(z=1.0)], rows=Batches(1), batch_size=None, max_steps=1)
    routers = [find_expert_layers(module.model)[0].router.weight for module in (plain, added)]
    assert not torch.equal(*routers)
    plain.automatic_optimization = False
    with pytest.raises(ValueError, match="wants the loss that training_step returns"):
        fit(tmp_path, plain, [RouterLosses(z=1.0)], rows=Batches(1), batch_size=None, max_steps=1)


@pytest.mark.parametrize("callback", [RouterLosses(), RouterLosses(0.1)])
def test_nothing_happens_without_weights_or_experts_and_nothing_is_left(tmp_path: Path, callback: RouterLosses) -> None:
    module = Foreign() if callback.balance else ForeignExperts(model_of("Mixtral"))
    rows = None if callback.balance else Batches(2)
    fit(tmp_path, module, [callback], rows=rows, batch_size=4 if callback.balance else None, max_steps=2)
    assert "training_step" not in module.__dict__
    assert callback.last == {}


def test_lets_go_of_the_module(tmp_path: Path) -> None:
    module = ForeignExperts(model_of("Mixtral"))
    hooks = [len(m._forward_hooks) for m in module.modules()]
    fit(tmp_path, module, [RouterLosses(0.1)], rows=Batches(2), batch_size=None, max_steps=2)
    assert "training_step" not in module.__dict__
    assert [len(m._forward_hooks) for m in module.modules()] == hooks
    module.training_step(batch_of(0), 0)
