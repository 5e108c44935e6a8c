"""What Muon, NorMuon and Scion do with stacks, fused weights, heads, convolutions, roles and shards."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn

from lightning_opt import optim
from lightning_opt.optim import orthogonal
from lightning_opt.plan import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf" / "optimizer"
FAMILY = {"muon": optim.Muon, "normuon": optim.NorMuon, "scion": optim.Scion}


def moved(name, weight, grad, **group):
    """How far some steps carry a weight."""
    p = nn.Parameter(weight.clone())
    optimizer = FAMILY[name]([{"params": [p], **group}], lr=0.1, weight_decay=0.0, ns_dtype="float32")
    for k in range(3):
        p.grad = grad * (1 + 0.1 * k)
        optimizer.step()
    return p.detach() - weight


@pytest.mark.parametrize("name", FAMILY)
def test_every_expert_of_a_stack_is_orthogonalised_alone(name):
    torch.manual_seed(0)
    weight, grad = torch.randn(5, 24, 10), torch.randn(5, 24, 10) * torch.logspace(-3, 3, 5).view(5, 1, 1)
    together = moved(name, weight, grad, role="expert")
    alone = torch.stack([moved(name, w, g) for w, g in zip(weight, grad, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    norms = torch.linalg.matrix_norm(together, 2)
    assert norms.max() < 2 * norms.min()  # though gradients differ a million times
    assert torch.linalg.vector_norm(moved(name, weight, grad * 0)) == 0


@pytest.mark.parametrize("name", FAMILY)
def test_fused_pieces_and_heads_move_as_if_they_were_apart(name):
    torch.manual_seed(0)
    parts, grads = [torch.randn(n, 12) for n in (16, 8, 8)], [torch.randn(n, 12) for n in (16, 8, 8)]
    fused, grad = torch.cat(parts), torch.cat(grads)
    apart = torch.cat([moved(name, w, g) for w, g in zip(parts, grads, strict=True)])
    torch.testing.assert_close(moved(name, fused, grad, pieces=[[16, 8, 8]]), apart, rtol=1e-4, atol=1e-5)
    turned = moved(name, fused.mT.contiguous(), grad.mT.contiguous(), pieces=[[16, 8, 8]], inputs_first=[True])
    torch.testing.assert_close(turned.mT, apart, rtol=1e-4, atol=1e-5)
    whole = moved(name, fused, grad, pieces=[[16, 8, 8]], split_fused=False)
    torch.testing.assert_close(whole, moved(name, fused, grad), rtol=1e-4, atol=1e-5)
    assert (whole - apart).abs().max() > 0.01
    heads = torch.cat([moved(name, w, g) for w, g in zip(fused.split(4), grad.split(4), strict=True)])
    found = moved(name, fused, grad, pieces=[[16, 8, 8]], heads=[8], per_head=True)
    torch.testing.assert_close(found, heads, rtol=1e-4, atol=1e-5)
    values = moved(name, fused, grad, value_heads=[8], per_head=True)
    torch.testing.assert_close(values, heads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_a_convolution_is_one_matrix(name):
    weight, grad = torch.randn(6, 4, 3), torch.randn(6, 4, 3)
    found = moved(name, weight, grad, role="matrix").flatten(1)
    torch.testing.assert_close(found, moved(name, weight.flatten(1), grad.flatten(1)), rtol=1e-4, atol=1e-5)


def test_newton_schulz_is_really_called_by_the_yaml(monkeypatch):
    """DeepSpeed once ran plain SGD under Muon's name (its issue 8442)."""
    shapes = []
    real = orthogonal.newton_schulz
    monkeypatch.setattr(orthogonal, "newton_schulz", lambda x, *a: shapes.append(tuple(x.shape)) or real(x, *a))
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 11, bias=False))
    optimizer = optim.build(model, yaml.safe_load((CONF / "muon.yaml").read_text()))
    model(torch.arange(5)).square().sum().backward()
    optimizer.step()
    assert shapes == [(1, 8, 16)]
    groups = {group["role"]: group for group in optimizer.param_groups}
    assert {role: group["rule"] for role, group in groups.items()} == {
        "matrix": "muon", "embedding": "adamw", "head": "adamw", "norm": "adamw", "bias": "adamw",
    }  # fmt: skip
    assert groups["matrix"]["max_grad_norm"] is None
    assert groups["head"]["lr"] == pytest.approx(0.3 * groups["matrix"]["lr"])
    assert groups["matrix"]["momentum"] == 0.95
    assert "momentum" not in groups["head"]


@pytest.mark.parametrize("name", ["muon", "normuon", "scion", "scion_study"])
def test_the_yamls_train_a_small_network(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 11))
    config = yaml.safe_load((CONF / f"{name}.yaml").read_text()) | {"lr_scale": 4.0 if name == "scion_study" else 1.0}
    optimizer = optim.build(model, config | {"implementation": "eager"})  # what Muon has no use for is AdamW's
    x, y = torch.arange(11), torch.arange(11).flip(0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_steps_have_the_size_that_the_scale_says():
    start = torch.randn(24, 60)
    for scale, rms in (("match_rms_adamw", 0.2), ("weight_rms", float(start.square().mean().sqrt()))):
        p = nn.Parameter(start.clone())
        optimizer = optim.NorMuon([p], lr=1e-3, scale=scale, coefficients="cubic", ns_steps=30, ns_dtype="float32")
        p.grad = torch.randn(24, 60)
        optimizer.step()
        assert float((p.detach() - start).square().mean().sqrt()) == pytest.approx(rms * 1e-3, rel=2e-3)


def test_vectors_and_wrong_words_are_refused():
    with pytest.raises(ValueError, match="takes matrices"):
        optim.Muon([nn.Parameter(torch.ones(3))])
    matrix = [nn.Parameter(torch.ones(3, 3))]
    for wrong in ({"coefficients": "jordn"}, {"scale": "huge"}, {"ns_steps": 0}, {"per_head": 1}, {"momentum": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            optim.Muon(matrix, **wrong)
    with pytest.raises(ConfigError, match="norm"):
        optim.Scion(matrix, norm="spectrum")
    with pytest.raises(ValueError, match="takes matrices"):
        optim.Scion([nn.Parameter(torch.ones(3))], norm="sign")


def _on_two(rank: int, store: str) -> None:
    """Rows that do not split evenly, a stack, a fused weight; weights on two ranks as on one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name in ("muon", "normuon", "scion"):
        for more in ({}, {"state_dtype": "bfloat16"}, {"cautious": True, "cautious_weight_decay": True}):
            for scale in ("original", "weight_rms") if name == "muon" else (None,):
                torch.manual_seed(0)
                models = [nn.Sequential(nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 1))]
                models.append(copy.deepcopy(models[0]))
                fully_shard(models[1], mesh=mesh)
                config = yaml.safe_load((CONF / f"{name}.yaml").read_text())
                config |= {"lr": 0.01, "ns_dtype": "float32", **more, **({"scale": scale} if scale else {})}
                optimizers = [optim.build(model, config) for model in models]
                optimizers[0].param_groups[0]["pieces"] = optimizers[1].param_groups[0]["pieces"] = [None, [6, 6]]
                x = torch.randn(4, 10)
                for skip in (False, True, False):
                    for model, optimizer, part in zip(models, optimizers, (x, x.chunk(2)[rank]), strict=True):
                        model.zero_grad()
                        model(part).square().mean().backward()
                        take_off = optimizer.register_before_update_hook(
                            lambda o, skip=skip: o.skip_step(torch.tensor(skip))
                        )
                        optimizer.step()
                        take_off()
                for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
                    torch.testing.assert_close(a.detach(), b.full_tensor().detach(), rtol=1e-4, atol=2e-5)
                    assert hasattr(optimizers[1].state[b]["exp_avg"], "to_local")
    dist.destroy_process_group()


def test_two_ranks_move_as_one(on_two_ranks, tmp_path):
    on_two_ranks(_on_two, f"{tmp_path}/store")


def test_build_hands_pieces_and_heads_on():
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, pad_token_id=None,
                        num_key_value_heads=2, intermediate_size=24, eos_token_id=None, bos_token_id=None)  # fmt: skip
    model = Phi3ForCausalLM(config)
    optimizer = optim.build(model, yaml.safe_load((CONF / "muon.yaml").read_text()))
    group = next(group for group in optimizer.param_groups if group["role"] == "matrix")
    rows = {tuple(p.shape): pieces for p, pieces in zip(group["params"], group["pieces"], strict=True)}
    assert rows == {(16, 16): None, (32, 16): [16, 8, 8], (48, 16): [24, 24], (16, 24): None}
    assert [heads for heads in group["heads"] if heads] == [8]
    assert group["inputs_first"] is None
    again = optim.build(copy.deepcopy(model), yaml.safe_load((CONF / "muon.yaml").read_text()))
    model(torch.arange(5)[None]).logits.square().mean().backward()
    optimizer.step()
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["pieces"] == optimizer.param_groups[0]["pieces"]
