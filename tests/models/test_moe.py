"""Mixtures of experts: published sizes, initialisation, what stays float32, ways to compute experts, recomputation."""

from __future__ import annotations

import copy
import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import SumMetric
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

from lightning_opt import anatomy, models, optim
from lightning_opt.job.pieces import flops_per_token
from lightning_opt.plan import ConfigError, check
from lightning_opt.plan.lengths import params_for_length
from lightning_opt.training.precision import BFloat16Parameters

TINY = {
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "num_experts": 8,
    "experts_per_token": 2,
    "expert_size": 24,
    "vocab_size": 64,
    "context_length": 32,
}


def tiny(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = {"_target_": "lightning_opt.models.glm4_moe", "name": "tiny", **TINY, **more}
    return models.build(config, vocab_size=64, instantiate=instantiate)


def instantiate(given: dict[str, Any]) -> nn.Module:
    return getattr(models, given.pop("_target_").rsplit(".", 1)[1])(**given)


def preset(repository: Path, name: str) -> dict[str, Any]:
    return yaml.safe_load((repository / "conf" / "model" / f"{name}.yaml").read_text())


def on_meta(config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return models.build(config, vocab_size=config["vocab_size"], instantiate=instantiate)


def batch(rows: int = 2, length: int = 32) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(64, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    models.causal_lm_loss(model, *batch()).total.backward()
    return [p.grad.clone() for p in model.parameters()]


def test_air_has_the_published_sizes(repository: Path) -> None:
    """Table 1 of arXiv:2508.06471 and moe.md, section 1: 106B total, 12B active without embeddings."""
    model = on_meta(preset(repository, "glm45_air"))
    counted = anatomy.describe(model)
    roles = Counter()
    for info in counted.parameters:
        roles[info.role] += info.parameter.numel()
    assert counted.total == 106_852_245_504
    assert roles["expert"] == 45 * 128 * 3 * 4096 * 1408 == 99_656_663_040
    assert roles["embedding"] + roles["head"] == 2 * 151552 * 4096
    assert roles["router"] == 45 * 128 * 4096
    attention = 46 * 2 * 4096 * 128 * (96 + 8)
    shared, dense = 45 * 3 * 4096 * 1408, 3 * 4096 * 10944
    assert roles["matrix"] == attention + shared + dense
    assert roles["bias"] == 46 * 128 * (96 + 2 * 8)
    assert counted.active_non_embedding == pytest.approx(12.18e9, rel=1e-3)
    assert counted.non_embedding == pytest.approx(105.6e9, rel=1e-3)
    assert (len(counted.expert_layers), counted.expert_layers[0].name) == (45, "model.layers.1.mlp")
    assert {(layer.count, layer.top_k) for layer in counted.expert_layers} == {(128, 8)}
    shapes = [tuple(p.shape) for p in counted.expert_layers[0].experts]
    assert shapes == [(128, 2 * 1408, 4096), (128, 4096, 1408)]
    assert counted.expert_layers[0].bias.shape == (128,)


def test_airs_configuration_is_transformers_own(repository: Path) -> None:
    """The class's defaults are Air's; what they leave out is in THUDM/slime's launch script for it."""
    ours = on_meta(preset(repository, "glm45_air")).config.to_dict()
    theirs = Glm4MoeConfig(
        head_dim=128,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
    ).to_dict()
    other = {key for key in theirs if key in ours and ours[key] != theirs[key]}
    assert other <= {"max_position_embeddings", "num_nextn_predict_layers", "dtype", "architectures"}


@pytest.mark.parametrize(("name", "total", "active"), [("glm_mini", 1.0e9, 0.14e9), ("moe_nano", 1.93e6, 0.78e6)])
def test_small_sizes(repository: Path, name: str, total: float, active: float) -> None:
    counted = anatomy.describe(on_meta(preset(repository, name)))
    assert counted.total == pytest.approx(total, rel=0.01)
    assert counted.active_non_embedding == pytest.approx(active, rel=0.01)


@pytest.mark.parametrize("name", ["moe_nano", "glm_mini", "glm45_air"])
def test_the_stated_count_is_what_one_token_uses_whatever_the_shape(repository: Path, name: str) -> None:
    config = preset(repository, name)
    assert config["non_embedding_params"] == params_for_length(config)
    for change in ({}, {"num_experts": 4, "experts_per_token": 1}, {"dense_layers": 2, "num_kv_heads": None}):
        changed = {**config, "vocab_size": 512, **change}
        assert params_for_length(changed) == anatomy.describe(on_meta(changed)).active_non_embedding
    for wrong in ({"num_experts": None}, {"hidden_size": "wide"}, {"num_heads": 0}, {"head_dim": "two"}):
        assert params_for_length({**config, **wrong}) == config["non_embedding_params"]  # `check` refuses it later


def test_flops_against_torchs_counter() -> None:
    model = tiny(experts_implementation="eager", activation_checkpointing="off")
    model.set_attn_implementation("eager")
    inputs, _ = batch()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=inputs, labels=inputs).loss.backward()
    stated = flops_per_token(model, anatomy.describe(model).active_non_embedding, 32)
    assert counter.get_total_flops() / inputs.numel() == pytest.approx(stated, rel=1e-3)


def test_flops_of_heads_that_compare_and_carry_different_widths() -> None:
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=48, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=12, pad_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    model.set_experts_implementation("eager")
    inputs, _ = batch()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=inputs, labels=inputs).loss.backward()
    stated = flops_per_token(model, anatomy.describe(model).active_non_embedding, 32)
    assert counter.get_total_flops() / inputs.numel() == pytest.approx(stated, rel=1e-3)


def test_the_initialisation_follows_the_width_of_experts_and_routers_too() -> None:
    for init, std in (("width", 256**-0.5), (0.02, 0.02)):
        model = tiny(hidden_size=256, expert_size=64, init=init)
        for info in anatomy.describe(model).parameters:
            if info.parameter.ndim >= 2:
                assert info.parameter.std().item() == pytest.approx(std, rel=0.05), info.name
    biases = [info for info in anatomy.describe(model).parameters if info.role == "bias"]
    assert len(biases) == 3 * 3
    assert not any(info.parameter.any() for info in biases)


@pytest.mark.parametrize("how", ["auto", "grouped_mm", "batched_mm"])
def test_ways_to_compute_experts_agree(how: str) -> None:
    """`eager` is the plain loop of transformers' modelling file."""
    loop, other = tiny(experts_implementation="eager"), tiny(experts_implementation=how)
    for theirs, ours in zip(gradients(loop), gradients(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


class Products(TorchDispatchMode):
    """Types of the grouped matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[tuple[torch.dtype, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "grouped_mm" in str(func):
            self.types.add(tuple(a.dtype for a in args[:2]))
        return func(*args, **(kwargs or {}))


def test_autocast_reaches_the_experts_but_not_the_router() -> None:
    """transformers' own grouped product stays in float32 there, and its router leaves it."""
    model, (inputs, _) = tiny(), batch()
    layer = anatomy.find_expert_layers(model)[0]
    seen: dict[str, Tensor] = {}
    layer.router.register_forward_hook(lambda _, args, out: seen.update(hidden=args[0].detach(), logits=out[0]))
    with Products() as products, torch.autocast("cpu", torch.bfloat16):
        lower = model(input_ids=inputs).logits
        lower.float().square().mean().backward()
    assert products.types == {(torch.bfloat16, torch.bfloat16)}
    exact = seen["hidden"].reshape(-1, 32).float() @ layer.routers[0].T
    torch.testing.assert_close(seen["logits"].reshape(-1, 8), exact, rtol=1e-5, atol=1e-5)
    loop = tiny(experts_implementation="eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(lower, loop(input_ids=inputs).logits, rtol=0.05, atol=0.05)
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in layer.experts)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["off", "full"])
def test_compiled_layers_are_two_graphs_with_eagers_gradients(mode: str) -> None:
    """One for layers without experts, one for layers with, however many (Dynamo keeps 8 of one code)."""
    plain = gradients(tiny(num_layers=11, activation_checkpointing=mode))
    model = tiny(num_layers=11, activation_checkpointing=mode)
    counters.clear()
    with torch.compiler.set_stance(force_backend="aot_eager"), models.compiled(model, "layers"):
        for _ in range(2):
            for eager, compiled in zip(plain, gradients(model), strict=True):
                torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
            assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("mode", ["full", "every_2"])
def test_recomputation_changes_no_gradient(mode: str) -> None:
    calls = Counter()

    def counted(mode: str) -> list[Tensor]:
        model = tiny(activation_checkpointing=mode)
        for layer in anatomy.find_expert_layers(model):
            layer.holder.register_forward_pre_hook(lambda *_: calls.update([mode]))
        return gradients(model)

    for plain, again in zip(counted("off"), counted(mode), strict=True):
        assert torch.equal(plain, again)
    assert calls == {"off": 2, mode: 4 if mode == "full" else 3}


def test_the_loss_is_that_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_opt.models import chunked

    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 7 * 4 * 64)  # seven rows of logits at a time
    model = tiny()
    inputs, labels = batch()
    loss = models.causal_lm_loss(model, inputs, labels)
    whole = nn.functional.cross_entropy(model(input_ids=inputs).logits.transpose(1, 2), labels)
    assert loss.nll.item() == pytest.approx(whole.item(), rel=1e-6)
    loss.total.backward()
    chunked_gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    whole.backward()
    for ours, theirs in zip(chunked_gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-7)


class Plain(pl.LightningModule):
    """Somebody else's module around a model of ours."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, inputs: Tensor, _: int) -> Tensor:
        return self.model(input_ids=inputs, labels=inputs).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def float_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


@pytest.mark.parametrize("plugin", ["lightning", "ours"])
def test_buffers_stay_float32_under_bf16_true(plugin: str, tmp_path: Path) -> None:
    model = tiny()
    for layer in anatomy.find_expert_layers(model):
        layer.bias.copy_(torch.linspace(0.5, 0.501, 8))
    before = {name: buffer.clone() for name, buffer in float_buffers(model).items()}
    assert len(before) == 2 + 2  # a bias per layer with experts, rotary frequencies twice
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    precision = {"precision": "bf16-true"} if plugin == "lightning" else {"plugins": [BFloat16Parameters()]}
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", enable_model_summary=False, default_root_dir=tmp_path, **precision, **quiet
    )
    module = Plain(model)
    module.losses = SumMetric()
    trainer.fit(module, torch.utils.data.DataLoader(batch()[0], batch_size=2))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert plugin == "lightning" or module.losses.sum_value.dtype == torch.float32
    for name, buffer in float_buffers(model).items():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, before[name]), name


def test_what_keeps_float32_can_be_copied_kept_and_moved() -> None:
    model = tiny()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again.to(torch.bfloat16)
        assert {b.dtype for b in float_buffers(again).values()} == {torch.float32}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        layer, original = anatomy.find_expert_layers(again)[0], anatomy.find_expert_layers(model)[0]
        assert type(layer.router) is type(original.router)
        assert layer.router is not original.router
        assert layer.bias is not original.bias
    model.to("meta")
    assert {b.device.type for b in model.buffers()} == {"meta"}


def test_other_families_keep_their_buffers_too() -> None:
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    config = MixtralConfig(vocab_size=61, num_hidden_layers=1, num_local_experts=4, **shape)
    model = anatomy.keep_float32(anatomy.keep_float32(MixtralForCausalLM(config)))
    frequencies = model.model.rotary_emb.inv_freq.clone()
    model.bfloat16()
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "soap"])
def test_every_expert_learns(repository: Path, name: str) -> None:
    """Each expert's gate, up and down and each router row change, and the loss falls."""
    model = tiny()
    before = {info.name: info.parameter.detach().clone() for info in anatomy.describe(model).parameters}
    config = yaml.safe_load((repository / "conf" / "optimizer" / f"{name}.yaml").read_text())
    optimizer = optim.build(model, {**config, "weight_decay": 0.0, "roles": without_decay(config["roles"])})
    losses = []
    for _ in range(12):
        loss = models.causal_lm_loss(model, *batch(8)).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(64), abs=1.0)
    assert losses[-1] < losses[0]
    for layer in anatomy.find_expert_layers(model):
        names = {id(p): name for name, p in model.named_parameters()}
        gate_up, down = layer.experts
        for stack in (*gate_up.chunk(2, 1), down, layer.routers[0]):
            whole = stack if stack._base is None else stack._base
            old = before[names[id(whole)]]
            if stack is not whole:
                old = old.chunk(2, 1)[int(stack.storage_offset() > 0)]
            moved = (stack.detach() - old).flatten(1).abs().amax(1)
            assert (moved > 0).all(), names[id(whole)]


def without_decay(roles: dict[str, Any]) -> dict[str, Any]:
    return {role: {**entry, "weight_decay": 0.0} for role, entry in roles.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 9}, r"model\.experts_per_token = 9: must be at most model\.num_experts = 8"),
        ({"dense_layers": 4}, r"model\.dense_layers = 4: must be less than model\.num_layers = 4"),
        ({"head_dim": 6}, r"model\.head_dim = 6: must leave an even head size .* not 3"),
        ({"num_experts": 1}, r"model\.num_experts = 1: must be a whole number >= 2"),
        ({"init": "study"}, r"model\.init = study: must be width or a number"),
        ({"experts_implementation": "fastest"}, r"model\.experts_implementation = fastest: must be one of auto"),
        ({"rotary_fraction": 0}, r"model\.rotary_fraction = 0: must be a number > 0 and <= 1"),
    ],
)
def test_wrong_shapes_are_refused(repository: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check({"name": "run", "model": {**preset(repository, "moe_nano"), **changes}})


def test_a_model_without_a_choice_refuses_one() -> None:
    shape = {"_target_": "lightning_opt.models.llama", "hidden_size": 32, "num_layers": 1, "num_heads": 2}
    dense = {**shape, "intermediate_size": 48, "vocab_size": 64, "context_length": 16}
    models.build({**dense, "experts_implementation": "auto"}, vocab_size=64, instantiate=instantiate)
    with pytest.raises(ConfigError, match=r"model\.experts_implementation = batched_mm: auto or eager: LlamaFor"):
        models.build({**dense, "experts_implementation": "batched_mm"}, vocab_size=64, instantiate=instantiate)
