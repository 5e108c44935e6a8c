"""States in one byte: what codes hold, what rounding by chance is for, and that every way writes the same codes."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_opt import kernels, optim
from lightning_opt.kernels import Coded, compiled, native, quantised
from lightning_opt.plan import ConfigError

needs_compiler = pytest.mark.skipif(not kernels.can_compile("cpu")[0], reason="no C++ compiler")
NAMES = ["adamw", "lion", "momentum", "signum"]
CODES = {torch.int8: 127, torch.uint8: 255}


def by_hand(values, levels):
    """Nearest codes in float64: every value against every code of its block."""
    flat = np.concatenate([values, np.zeros(-len(values) % 256)]).reshape(-1, 256)
    scale = np.abs(flat).max(1, keepdims=True)
    grid = (np.arange(levels + 1) / levels) ** 4
    share = np.abs(flat) / np.where(scale > 0, scale, 1)
    nearest = np.abs(share[..., None] - grid).argmin(-1)
    return (np.sign(flat) * grid[nearest] * scale).reshape(-1)[: len(values)]


@pytest.mark.parametrize("size", [1, 255, 256, 1000])
def test_int8_is_the_nearest_of_its_codes(size):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).double().pow(3).float()
    coded = quantised.encode(values, torch.int8)
    assert coded.codes.dtype == torch.int8
    assert coded.scales.shape == (-(-size // 256),)
    np.testing.assert_allclose(quantised.decode(coded), by_hand(values.double().numpy(), 127), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("salt", [None, 12345])
def test_what_was_decoded_has_the_codes_it_came_from(dtype, salt):
    values = torch.randn(2, 700, generator=torch.Generator().manual_seed(1))
    once = quantised.encode(values.square() if dtype == torch.uint8 else values, dtype)
    again = quantised.encode(quantised.decode(once), dtype, salt)
    assert (once.codes.int() - again.codes.int()).abs().max() <= (salt is not None)
    assert (once.codes != again.codes).float().mean() < 1e-3
    torch.testing.assert_close(once.scales, again.scales)


def test_blocks_of_zeros_tiny_and_wild_numbers():
    rows = torch.zeros(4, 256)
    rows[1, 3], rows[2], rows[3, 5] = 1e-35, torch.linspace(-1.5e38, 1.5e38, 256), torch.nan
    values = quantised.decode(quantised.encode(rows.flatten(), torch.int8)).view(4, 256)
    assert torch.equal(values[:2], torch.zeros(2, 256))
    assert values[2].isfinite().all()
    torch.testing.assert_close(values[2, [0, 255]], rows[2, [0, 255]])
    assert values[3].isnan().all()


def test_a_second_moment_never_becomes_zero():
    v = torch.logspace(-12, 0, 256)
    for salt in range(20):
        values = quantised.decode(quantised.encode(v, torch.uint8, quantised.salt_of(salt, 2)))
        assert (values > 0).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bfloat16])
def test_rounding_by_chance_is_right_on_average(dtype):
    x = torch.randn(512, generator=torch.Generator().manual_seed(0)).abs() + 0.05
    x = x if dtype == torch.uint8 else x * torch.tensor([1.0, -1.0]).repeat(256)
    draws = []
    for step in range(600):
        salt = quantised.salt_of(step, 1)
        narrow = quantised.to_bfloat16(x, salt).float() if dtype == torch.bfloat16 else None
        draws.append(quantised.decode(quantised.encode(x, dtype, salt)) if narrow is None else narrow)
    draws = torch.stack(draws)
    spread = draws.std(0).clamp(min=1e-7) / 600**0.5
    assert ((draws.mean(0) - x) / spread).abs().quantile(0.99) < 3.5
    assert (draws.std(0) > 0).float().mean() > 0.9


def test_wild_numbers_stay_what_they_are_in_bfloat16():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1.0])
    got = quantised.to_bfloat16(x, 7)
    torch.testing.assert_close(got.float(), x, rtol=0, atol=0, equal_nan=True)


def start(name, way, shapes=((5000,), (64, 64), (100,)), dtype=torch.float32, **hyper):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    make = getattr(optim, optim.OPTIMIZERS[name])
    return params, make(params, lr=1e-2, weight_decay=0.1, implementation=way, **hyper)


def feed(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        sizes = torch.exp(torch.randn(p.shape, generator=generator))
        p.grad = (torch.randn(p.shape, generator=generator) * sizes).to(p.dtype)


def train(name, way, steps=range(4), **more):
    params, optimizer = start(name, way, **more)
    for step in steps:
        feed(params, step)
        optimizer.step()
    return params, optimizer


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("rounding", "more"), [("nearest", {}), ("stochastic", {"cautious": True, "weight_decay_mode": "l2"})]
)
def test_every_way_writes_the_same_codes(name, rounding, more):
    runs = {
        way: train(name, way, state_dtype="int8", state_rounding=rounding, **more)
        for way in ("eager", "foreach", "compiled")
    }
    params, optimizer = runs["eager"]
    for way, (others, other) in runs.items():
        assert other.implementations[name].startswith(way)
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4, msg=way)
            for key, tensor in optimizer.state[p].items():
                if torch.is_tensor(tensor) and tensor.dtype in CODES:
                    assert (tensor.int() - other.state[q][key].int()).abs().max() <= 1
                    assert (tensor != other.state[q][key]).float().mean() < 1e-3


@pytest.mark.parametrize(("name", "rounding"), [("lion", "nearest"), ("adamw", "stochastic")])
def test_the_graph_for_gpus_writes_them_too(name, rounding, monkeypatch):
    """Traced as on a GPU, and run by torch's interpreter."""
    compiled._compiled.cache_clear()
    torch._dynamo.reset()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, backend="eager", fullgraph=True, **how))
    monkeypatch.setattr(native, "run", compiled._run_graph)
    hyper = {"state_dtype": "int8", "state_rounding": rounding, "cautious": True}
    params, optimizer = train(name, "eager", **hyper)
    others, other = train(name, "compiled", **hyper)
    compiled._compiled.cache_clear()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
        codes = [state["exp_avg"].float() for state in (optimizer.state[p], other.state[q])]
        assert (codes[0] - codes[1]).abs().max() <= 1
    half = {"dtype": torch.bfloat16, "weight_rounding": "stochastic"}
    for p, q in zip(train(name, "eager", **half)[0], train(name, "compiled", **half)[0], strict=True):
        assert (p != q).float().mean() < 0.01
    compiled._compiled.cache_clear()


def _on_two(rank: int, store: str) -> None:
    """One weight whose shards hold whole blocks, and one whose do not."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name in ("lion", "adamw"):
        torch.manual_seed(0)
        models = [nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 31)) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        fully_shard(models[1], mesh=init_device_mesh("cpu", (2,)))
        config = {"name": name, "lr": 1e-2, "state_dtype": "int8", "max_grad_norm": None}
        optimizers = [optim.build(model, config) for model in models]
        x = torch.randn(4, 64)
        for _ in range(3):
            for model, optimizer, part in zip(models, optimizers, (x, x.chunk(2)[rank]), strict=True):
                model.zero_grad()
                model(part).square().mean().backward()
                optimizer.step()
        whole, odd = models[1][0].weight, models[1][2].weight
        key = next(iter(optim.find_rule(name).codes))
        state = optimizers[1].state[whole]
        assert state[key].dtype == torch.int8
        assert state[key + "_scale"].full_tensor().shape == (64 * 128 // 256,)
        assert optimizers[1].state[odd][key].dtype == torch.float32
        assert quantised.fits(whole)
        assert not quantised.fits(odd)
        plain = optimizers[0].state[models[0][0].weight]
        difference = state[key].full_tensor().int() - plain[key].int()
        assert (difference != 0).float().mean() < 0.01
        saved = copy.deepcopy(optimizers[1].state_dict())
        optimizers[1].load_state_dict(saved)
        assert torch.equal(optimizers[1].state[whole][key].full_tensor(), state[key].full_tensor())
        whole_scale = state[key + "_scale"].full_tensor()
        for each in saved["state"].values():  # as a checkpoint of the whole model hands it in
            if key + "_scale" in each:
                each[key + "_scale"] = each[key + "_scale"].full_tensor()
        optimizers[1].load_state_dict(saved)
        assert torch.equal(optimizers[1].state[whole][key + "_scale"].full_tensor(), whole_scale)
    dist.destroy_process_group()


def test_codes_of_sharded_weights_are_those_of_whole_ones(on_two_ranks, tmp_path):
    on_two_ranks(_on_two, f"{tmp_path}/store")


@needs_compiler
@pytest.mark.parametrize("way", ["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_and_what_stays_in_float32(way, dtype):
    """1.02 bytes per element for one momentum; small tensors, embeddings and float64 are left alone."""
    (p, q, small), optimizer = train("lion", way, state_dtype="int8", dtype=dtype)
    assert optimizer.state[p]["exp_avg"].dtype == optimizer.state[q]["exp_avg"].dtype == torch.int8
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32
    assert optimizer.state[q]["exp_avg"].nbytes + optimizer.state[q]["exp_avg_scale"].nbytes == 4096 * 1.015625
    assert optimizer.state_bytes() == sum(row["state_bytes"] for row in optimizer.routing_table())
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100))
    built = optim.build(model, {"name": "adamw", "lr": 1e-3, "state_dtype": "int8"})
    planned = {row["role"]: row["state_bytes"] / row["params"] for row in built.routing_table()}
    assert planned["embedding"] == 8
    assert planned["bias"] == 8
    assert planned.get("matrix", planned.get("head")) == pytest.approx(2 + 8 / 256)
    (wide, *_), double = train("lion", "eager", state_dtype="int8", dtype=torch.float64)
    assert double.state[wide]["exp_avg"].dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_go_through_a_checkpoint_untouched(name, dtype):
    hyper = {"state_dtype": "int8", "state_rounding": "stochastic", "dtype": dtype, "weight_rounding": "stochastic"}
    straight, _ = train(name, "eager", range(6), **hyper)
    params, optimizer = train(name, "eager", range(3), **hyper)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    _, again = start(name, "eager", **hyper)
    for p, q in zip(again.param_groups[0]["params"], params, strict=True):
        p.data.copy_(q.data)
    again.load_state_dict(torch.load(file, weights_only=True))
    first = again.param_groups[0]["params"][0]
    kinds = {k: t.dtype for k, t in optimizer.state[params[0]].items() if torch.is_tensor(t)}
    assert {k: t.dtype for k, t in again.state[first].items() if torch.is_tensor(t)} == kinds
    for step in range(3, 6):
        feed(again.param_groups[0]["params"], step)
        again.step()
    assert all(torch.equal(p, q) for p, q in zip(straight, again.param_groups[0]["params"], strict=True))


def test_a_float32_state_is_taken_over_into_codes_and_back():
    params, wide = train("lion", "eager")
    _, narrow = train("lion", "eager", state_dtype="int8")
    saved = copy.deepcopy(wide.state_dict())
    saved["param_groups"][0]["state_dtype"] = "int8"
    narrow.load_state_dict(saved)
    p = narrow.param_groups[0]["params"][0]
    held = Coded(narrow.state[p]["exp_avg"], narrow.state[p]["exp_avg_scale"])
    assert held.dtype == torch.int8
    momentum = wide.state[params[0]]["exp_avg"]
    assert torch.nn.functional.cosine_similarity(quantised.decode(held), momentum, dim=0) > 0.999
    saved = copy.deepcopy(narrow.state_dict())
    saved["param_groups"][0]["state_dtype"] = "float32"
    narrow.load_state_dict(saved)
    assert torch.equal(narrow.state[p]["exp_avg"], quantised.decode(held))
    assert "exp_avg_scale" not in narrow.state[p]


@pytest.mark.parametrize("way", ["eager", "foreach", "compiled"])
def test_a_masked_step_leaves_codes_alone(way):
    params, optimizer = train("adamw", way, range(2), state_dtype="int8", state_rounding="stochastic")
    before = copy.deepcopy([optimizer.state[p] for p in params])
    feed(params, 9)
    params[0].grad[0] = torch.nan
    optimizer.register_before_update_hook(lambda o: o.skip_step(torch.tensor(True)))
    optimizer.step()
    optimizer.state_dict()
    for p, state in zip(params, before, strict=True):
        assert all(torch.equal(optimizer.state[p][k], v) if torch.is_tensor(v) else optimizer.state[p][k] == v
                   for k, v in state.items())  # fmt: skip


def test_rules_without_codes_refuse_int8():
    without = next(name for name in optim.list_optimizers() if not optim.find_rule(name).codes)
    with pytest.raises(ConfigError, match="int8") as error:
        getattr(optim, optim.OPTIMIZERS[without])([nn.Parameter(torch.ones(2, 2))], state_dtype="int8")
    assert "float32 and bfloat16" in str(error.value)


@pytest.mark.parametrize(("rounding", "moves"), [("nearest", False), ("stochastic", True)])
def test_momentum_stalls_when_rounded_to_nearest_and_not_by_chance(rounding, moves):
    """A large momentum under a small opposite gradient: it should fall by 1 % per step and turn its sign."""
    p = nn.Parameter(torch.zeros(4096))
    optimizer = optim.Lion([p], lr=1e-3, betas=(0.9, 0.995), state_dtype="int8", state_rounding=rounding)
    p.grad = torch.full((4096,), 1.0)
    p.grad[::256] = 4.0  # keeps the scale of each block
    for _ in range(50):
        optimizer.step()
    held = Coded(optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_scale"])
    start = quantised.decode(held).clone()
    keep = start.view(-1, 256)[:, 0]
    for _ in range(400):
        p.grad.fill_(0.0)
        p.grad[::256] = keep  # as large as the momentum there: it stays
        optimizer.step()
    now = quantised.decode(Coded(optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_scale"]))
    ratio = (now / start).view(-1, 256)[:, 1:].mean().item()
    exact = 0.995**400
    assert abs(ratio - exact) < 0.03 if moves else ratio > 0.3


def test_signs_agree_with_a_float32_momentum_as_measured():
    """Sizes in a block log-normal: sign agreement of Lion's step, linear codes in numpy beside ours."""
    rng = np.random.default_rng(0)
    wanted = {0.5: (0.985, 0.975), 1.0: (0.980, 0.908), 2.0: (0.956, 0.787)}
    for sigma, (ours, linear) in wanted.items():
        size = np.exp(sigma * rng.normal(size=(32, 256)))
        mean = 0.1 * size * rng.normal(size=size.shape)
        exact, line, code = (np.zeros_like(size) for _ in range(3))
        agree = []
        for step in range(300):
            g = mean + size * rng.normal(size=size.shape)
            signs = [np.sign(0.9 * m + 0.1 * g) for m in (exact, line, code)]
            if step >= 150:
                agree.append([(signs[0] == sign).mean() for sign in signs[1:]])
            exact, line, code = (0.99 * m + 0.01 * g for m in (exact, line, code))
            scale = np.abs(line).max(1, keepdims=True) / 127
            line = np.round(line / scale) * scale
            code = quantised.decode(quantised.encode(torch.tensor(code).float(), torch.int8)).double().numpy()
        got = np.mean(agree, axis=0)
        np.testing.assert_allclose(got, (linear, ours), atol=0.012)


def test_as_near_to_float32_lion_as_bitsandbytes():
    """50 steps of random gradients, as in the reference's numerics: mean distance in units of the sum of the rates."""
    peer = pytest.importorskip("bitsandbytes").optim.Lion8bit
    distance = {}
    base = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    runs = {
        "exact": lambda p: optim.Lion(p, lr=1e-3, betas=(0.9, 0.99)),
        "ours": lambda p: optim.Lion(p, lr=1e-3, betas=(0.9, 0.99), state_dtype="int8"),
        "peer": lambda p: peer(p, lr=1e-3, betas=(0.9, 0.99), min_8bit_size=0),
    }
    for name, make in runs.items():
        p = nn.Parameter(base.clone())
        optimizer = make([p])
        for step in range(50):
            feed([p], step)
            optimizer.step()
        distance[name] = p.detach()
    ours, theirs = ((distance[k] - distance["exact"]).abs().mean().item() / 0.05 for k in ("ours", "peer"))
    assert 0 < ours < 1.1 * theirs < 0.1


def test_bfloat16_weights_move_where_nearest_would_leave_them():
    """A rate of a tenth of half a step: nearest stays put, chance moves by the right amount, a master exactly."""
    moved = {}
    for rounding in ("nearest", "stochastic", "master"):
        p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = optim.Lion([p], lr=4e-4, weight_rounding=rounding)
        for _ in range(50):
            p.grad = torch.ones_like(p)
            optimizer.step()
        assert p.dtype == torch.bfloat16
        moved[rounding] = p.detach().float().mean().item()
    assert moved["nearest"] == 1.0
    assert moved["stochastic"] == pytest.approx(0.98, abs=5e-4)
    assert moved["master"] == pytest.approx(0.98, abs=2e-3)


@pytest.mark.parametrize("way", ["eager", pytest.param("compiled", marks=needs_compiler), "fused"])
def test_a_master_is_the_float32_run_and_takes_over_what_others_write(way):
    exact, _ = train("adamw", way)
    params, _ = start("adamw", way)
    narrow, optimizer = start("adamw", way, dtype=torch.bfloat16, weight_rounding="master")
    for p, q in zip(narrow, params, strict=True):
        p.data.copy_(q.data)
        optimizer.state.pop(p, None)
    params, wide = start("adamw", way)
    for p, q in zip(params, narrow, strict=True):
        p.data.copy_(q.data)  # both begin at the rounded weights
    for step in range(4):
        feed(params, step)
        for p, q in zip(narrow, params, strict=True):
            p.grad = q.grad.bfloat16()
            q.grad = p.grad.float()
        for each in (optimizer, wide):
            each.step()
    for p, q in zip(narrow, params, strict=True):
        torch.testing.assert_close(optimizer.state[p]["master"], q.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(p, optimizer.state[p]["master"].bfloat16())
    with torch.no_grad():
        narrow[0].fill_(30.0)
    for p in narrow:
        p.grad = torch.zeros_like(p)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(optimizer.state[narrow[0]]["master"], torch.full_like(narrow[0], 30.0, dtype=torch.float32))
    assert exact[0].shape == narrow[0].shape


def test_a_master_resumes_to_the_bit():
    hyper = {"dtype": torch.bfloat16, "weight_rounding": "master"}
    straight, _ = train("adamw", "eager", range(6), **hyper)
    params, optimizer = train("adamw", "eager", range(3), **hyper)
    others, again = start("adamw", "eager", **hyper)
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q.data)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.state[others[0]]["master"].dtype == torch.float32
    for step in range(3, 6):
        feed(others, step)
        again.step()
    assert all(torch.equal(p, q) for p, q in zip(straight, others, strict=True))
