"""Every expert of a stack is a weight for itself: one batched call is the loop, and no expert knows of another."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from lightning_opt import optim
from lightning_opt.anatomy import describe
from lightning_opt.optim.orthogonal import COEFFICIENTS, orthogonalized

CONF = Path(__file__).resolve().parents[2] / "conf" / "optimizer"
E, INNER, HIDDEN = 4, 24, 20


def by_numpy(matrix, steps=5, triple=(3.4445, -4.7750, 2.0315)):
    """Jordan's iteration as his page has it, one matrix, float64."""
    a, b, c = triple
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def stack_of(*shape, seed=0):
    """Experts whose sizes are four decades apart: what is shared between them would show."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.logspace(-2, 2, shape[0]).view(-1, 1, 1)


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(8, 32, 48), (5, 48, 32), (3, 33, 7), (2, 256, 200)])
def test_the_batched_call_is_the_loop_to_float32_rounding(name, shape):
    """They are no farther apart than either is from float64."""
    stack = stack_of(*shape)
    (batched,) = orthogonalized([stack], 5, name, "float32")
    loop = torch.stack([orthogonalized([matrix], 5, name, "float32")[0] for matrix in stack])
    (exact,) = orthogonalized([stack.double()], 5, name)
    rounding = (loop - exact).abs().amax((1, 2))
    assert rounding.max() < 2e-5
    assert ((batched - loop).abs().amax((1, 2)) <= 3 * rounding).all()


@pytest.mark.parametrize("shape", [(8, 32, 48), (5, 48, 32)])
def test_the_batched_call_is_jordans_iteration_expert_by_expert(shape):
    stack = stack_of(*shape)
    (found,) = orthogonalized([stack.double()], 5, "jordan")
    for matrix, mine in zip(stack, found, strict=True):
        np.testing.assert_allclose(mine.numpy(), by_numpy(matrix.double().numpy()), rtol=0, atol=1e-12)


def test_a_stack_is_one_call_and_not_one_per_expert(monkeypatch):
    """Of small matrices on a CPU; large ones keep it busy one by one."""
    from lightning_opt.optim import orthogonal

    shapes, inner = [], orthogonal.newton_schulz
    monkeypatch.setattr(orthogonal, "newton_schulz", lambda x, *how: (shapes.append(tuple(x.shape)), inner(x, *how))[1])
    optimizer, _ = muon()
    optimizer.step()
    assert sum(count for count, *_ in shapes) == 3 * E  # gate, up and down of each
    assert len(shapes) <= 2


def muon(**more):
    gate_up, down = nn.Parameter(stack_of(E, 2 * INNER, HIDDEN)), nn.Parameter(stack_of(E, HIDDEN, INNER))
    gate_up.grad, down.grad = stack_of(E, 2 * INNER, HIDDEN, seed=1), stack_of(E, HIDDEN, INNER, seed=2)
    group = {"params": [gate_up, down], "role": "expert", "pieces": [[INNER, INNER], None]}
    return optim.Muon([group], lr=0.1, ns_dtype="float32", nesterov=False, **more), (gate_up, down)


@pytest.mark.parametrize("apart", [True, False])
def test_gate_and_up_are_apart_by_option(apart):
    optimizer, (gate_up, down) = muon(split_fused=apart, weight_decay=0.0)
    before = [p.detach().clone() for p in (gate_up, down)]
    optimizer.step()
    for p, old in zip((gate_up, down), before, strict=True):
        for weight, was, grad in zip(p.detach(), old, p.grad, strict=True):
            pieces = zip(*(t.split(INNER) for t in (weight, was, grad)), strict=True)
            parts = pieces if apart and p is gate_up else [(weight, was, grad)]
            for new, start, g in parts:
                rows, columns = g.shape
                step = 0.1 * max(1.0, rows / columns) ** 0.5 * by_numpy(g.double().numpy())
                np.testing.assert_allclose((start - new).double().numpy(), step, rtol=0, atol=1e-4)


KNOWS_ITSELF = ["adafactor", "adam_mini", "adamw", "kron", "lion", "muon", "normuon", "scion", "soap"]


@pytest.mark.parametrize("name", KNOWS_ITSELF)
def test_no_expert_knows_of_another(name):
    """Other gradients for the second expert, a hundred times as large: the others go where they went, bit for bit."""
    ends = []
    for factor in (1.0, 100.0):
        p = nn.Parameter(stack_of(3, 8, 6))
        more = {"normalize_grads": True} if name in ("soap", "kron") else {}
        optimizer = optim.Optimizer([{"params": [p], "role": "expert"}], rule=name, lr=1e-2, **more)
        for step in range(4):
            p.grad = stack_of(3, 8, 6, seed=10 + step)
            p.grad[1] *= factor * (1 if step % 2 else -1)
            optimizer.step()
        ends.append(p.detach().clone())
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][2], ends[1][2])
    if name not in ("muon", "normuon", "scion", "lion"):  # those see no size
        assert not torch.equal(ends[0][1], ends[1][1])


def test_kron_fits_factors_of_its_own_to_each_expert():
    """The first of a stack goes as it would alone (it draws the same noise); the others have other noise."""
    weights, grads = stack_of(3, 16, 8), [stack_of(3, 16, 8, seed=k) for k in range(1, 5)]
    stack, alone = nn.Parameter(weights.clone()), nn.Parameter(weights[0].clone())
    optimizers = [
        optim.Optimizer([{"params": [stack], "role": "expert"}], rule="kron", lr=1e-2),
        optim.Optimizer([{"params": [alone], "role": "matrix"}], rule="kron", lr=1e-2),
    ]
    for grad in grads:
        stack.grad, alone.grad = grad.clone(), grad[0].clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(stack.detach()[0], alone.detach(), rtol=1e-5, atol=1e-6)
    factors = [value for key, value in optimizers[0].state[stack].items() if key.startswith("q.")]
    assert [len(q) for q in factors] == [3, 3]


def test_adam_mini_has_one_number_per_expert_and_output():
    p = nn.Parameter(stack_of(3, 8, 6))
    optimizer = optim.AdamMini([{"params": [p], "role": "expert"}], lr=0.1, betas=(0.0, 0.9), eps=1e-12)
    p.grad = stack_of(3, 8, 6, seed=1)
    before = p.detach().clone()
    optimizer.step()
    mean = p.grad.double().square().mean(-1)
    torch.testing.assert_close(optimizer.state[p]["block_sq"].view(3, 8).double(), 0.1 * mean, rtol=1e-5, atol=0)
    step = 0.1 * p.grad.double() / mean.sqrt().unsqueeze(-1)
    torch.testing.assert_close((before - p.detach()).double(), step, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def mixture():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2))


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "soap", "adam_mini", "kron"])
def test_every_experts_weights_move_and_the_router_has_its_own_rule(name, mixture):
    """A published comparison was void because expert weights stayed bit for bit as they were."""
    model = copy.deepcopy(mixture)
    config = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))
    config["roles"] = {**config["roles"], "router": {"rule": "adamw", "lr_scale": 0.1}}
    optimizer = optim.build(model, config)
    rules = {group["role"]: group["rule"] for group in optimizer.param_groups}
    assert (rules["expert"], rules["router"]) == (name, "adamw")
    experts = [info.parameter for info in describe(model).parameters if info.role == "expert"]
    before = [p.detach().clone() for p in experts]
    tokens = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    for p, old in zip(experts, before, strict=True):
        assert p.shape[0] == 4
        for expert, was in zip(p.detach(), old, strict=True):
            assert (expert != was).float().mean() > 0.9
