"""What is summed over tensors before they are updated: caution, block means, over threads, masks and ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_opt import kernels, optim
from lightning_opt.kernels import Bucket, Measure, Rule, native
from lightning_opt.optim.buckets import Row, filled_bucket
from lightning_opt.optim.groups import COMMON

needs_compiler = pytest.mark.skipif(not kernels.can_compile("cpu")[0], reason="no C++ compiler")
WAYS = ["eager", "foreach", pytest.param("compiled", marks=needs_compiler)]
SHAPES = [(6, 4), (), (5,), (3, 4, 8), (70_000,)]
LR, WD, STEPS = 0.01, 0.3, 5


def problem(shapes=SHAPES, seed=0):
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=s) for s in shapes]
    return weights, [[rng.normal(size=s) for s in shapes] for _ in range(STEPS)]


def published(name, weights, gradients, *, cautious, cautious_decay):
    """AdamW (mask on the updated moment) and Lion, cautious as in kyleliang919/C-Optim, timm and arXiv 2510.12402."""
    weights = [np.array(w) for w in weights]
    m, v = ([np.zeros_like(w) for w in weights] for _ in range(2))
    for t, grads in enumerate(gradients, 1):
        for i, g in enumerate(grads):
            if name == "adamw":
                m[i] = 0.9 * m[i] + 0.1 * g
                v[i] = 0.97 * v[i] + 0.03 * g**2
                u = m[i] / (1 - 0.9**t) / (np.sqrt(v[i] / (1 - 0.97**t)) + 1e-8)
                mask = m[i] * g > 0
            else:
                u = np.sign(0.9 * m[i] + 0.1 * g)
                m[i] = 0.97 * m[i] + 0.03 * g
                mask = u * g > 0
            if cautious:
                u = u * mask / max(np.mean(mask), 1e-3)
            decays = u * weights[i] >= 0 if cautious_decay else np.ones_like(u, dtype=bool)
            weights[i] = weights[i] - LR * (u + WD * np.where(decays, weights[i], 0.0))
    return weights


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["adamw", "lion"])
@pytest.mark.parametrize(("cautious", "decay"), [(True, False), (False, True), (True, True)])
def test_cautious_steps_and_decay_are_the_published_rule(name, way, cautious, decay):
    weights, gradients = problem()
    gradients[1][0][...] = -np.abs(gradients[0][0]) * np.sign(gradients[0][0]) * 0.01  # nearly all disagree
    params = [nn.Parameter(torch.tensor(w)) for w in weights]
    make = getattr(optim, optim.OPTIMIZERS[name])
    optimizer = make(params, lr=LR, betas=(0.9, 0.97), weight_decay=WD, cautious=cautious, cautious_weight_decay=decay,
                     implementation=way)  # fmt: skip
    for grads in gradients:
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
    wanted = published(name, weights, gradients, cautious=cautious, cautious_decay=decay)
    assert optimizer.implementations[name].startswith(way)
    for p, want in zip(params, wanted, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), want, rtol=1e-12, atol=1e-12)


def own_block(p, layout, group):
    """Halves of the first dimension where it is even, else everything."""
    return p.numel() // 2 if p.ndim and p.shape[0] % 2 == 0 else p.numel()


def mean_square(total, count, v, *, lr, **_):
    v.mul_(0.5).add_(0.5 * total / count)
    return 1 / (v.sqrt() + 1)


def made(block=own_block):
    """Steps of g divided by a running mean of g^2 per block; m counts nothing but must be handed on."""
    return Rule(
        "by_block",
        lambda p, g, m, *, lr, scale: (m.lerp_(g, 0.5) * lr) * scale,
        lambda step, group: {"lr": group["lr"]},
        state=("m",),
        defaults={},
        traffic=24,
        measure=Measure(
            "scale", lambda p, g, m, *, lr: g * g + m * m, mean_square, block, state=("v",) if block else ()
        ),
    )


def plain(weights, gradients, *, cautious=False, l2=0.0):
    """`made` in numpy."""
    weights = [np.array(w) for w in weights]
    m = [np.zeros_like(w) for w in weights]
    cut = [2 if w.ndim and w.shape[0] % 2 == 0 else 1 for w in weights]
    v = [np.zeros(n) for n in cut]
    for grads in gradients:
        for i, g in enumerate(grads):
            g = g + l2 * weights[i]
            v[i] = 0.5 * v[i] + 0.5 * (g**2 + m[i] ** 2).reshape(cut[i], -1).mean(1)
            scale = np.repeat(1 / (np.sqrt(v[i]) + 1), g.size // cut[i]).reshape(g.shape)
            m[i] = 0.5 * m[i] + 0.5 * g
            u = m[i] * LR * scale
            if cautious:
                mask = u * g > 0
                u = u * mask / max(mask.mean(), 1e-3)
            weights[i] = weights[i] - u
    return weights, v


def bucket_of(rule, params, grads, states, step=1, **more):
    options = {**COMMON, "lr": LR, **more.pop("options", {})}
    return Bucket(params, grads, (states["m"],), {"lr": LR}, step, options=options,
                  block_states=(states["v"],), layouts=[{}] * len(params), **more)  # fmt: skip


def run(way, weights, gradients, *, skips=(), l2=None, **options):
    rule, cut = made(), lambda p: torch.zeros(p.numel() // own_block(p, {}, {}), dtype=p.dtype)
    params = [torch.tensor(w) for w in weights]
    params[0] = params[0].t().contiguous().t()  # not in one piece
    states = {"m": [torch.zeros_like(p) for p in params], "v": [cut(p) for p in params]}
    for t, grads in enumerate(gradients, 1):
        skip = torch.tensor(t in skips) if skips else None
        gs = [torch.tensor(g) for g in grads]
        kernels.run(way, rule, bucket_of(rule, params, gs, states, t, options=options, skip=skip, l2=l2))
    return params, states


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("cautious", "l2"), [(False, None), (True, None), (True, 0.2)])
def test_sums_over_blocks_and_caution_over_whole_tensors(way, cautious, l2):
    weights, gradients = problem()
    params, states = run(way, weights, gradients, cautious=cautious, l2=l2)
    wanted, means = plain(weights, gradients, cautious=cautious, l2=l2 or 0.0)
    for got, want in zip((*params, *states["v"]), (*wanted, *means), strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cautious", [False, True])
def test_a_masked_step_leaves_block_states_alone_too(way, cautious):
    weights, gradients = problem()
    bad = [[np.full_like(g, np.nan) for g in gradients[0]], *gradients[:2]]
    params, states = run(way, weights, [gradients[0], bad[0], gradients[1]], skips=(2,), cautious=cautious)
    wanted, others = run("eager", weights, gradients[:2], cautious=cautious)
    for a, b in zip((*params, *states["v"], *states["m"]), (*wanted, *others["v"], *others["m"]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_does_not_depend_on_threads(dtype):
    rule = optim.find_rule("lion")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, generator=generator).to(dtype) for n in (300_001, 1, 65_536, 0, 70_000)]
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        params, momenta = [r.clone() for r in rows], [r * 0.3 for r in rows]
        grads = [r.flip(0) for r in rows]
        try:
            torch.set_num_threads(threads)
            scalars = {"lr": 0.01, "new1": 0.1, "new2": 0.01}
            native.run(rule, Bucket(params, grads, (momenta,), scalars, 1, options={"cautious": True}))
        finally:
            torch.set_num_threads(before)
        results.append(torch.cat(params))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], torch.cat(rows))


def test_blocks_that_do_not_fill_a_weight_are_refused():
    rule = made(lambda p, *_: 4)
    p = torch.ones(6)
    with pytest.raises(ValueError, match="blocks of 4"):
        kernels.run("eager", rule, bucket_of(rule, [p], [p], {"m": [p.clone()], "v": [torch.zeros(1)]}))


def _on_two(rank: int, store: str) -> None:
    """Blocks that straddle the ranks, a weight that one rank does not hold at all, cautious shares of whole tensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    weights, gradients = problem([(6, 4), (1,), (5, 3), (7, 2)])
    split = lambda a: distribute_tensor(torch.tensor(a), mesh, [Shard(0)])  # noqa: E731
    for cautious in (False, True):
        for way in ("eager", "foreach", "compiled"):
            rule = made(lambda p, *_: p.numel() // 2 if p.shape[0] == 6 else p.numel())
            params = [split(w) for w in weights]
            blocks = [2 if p.shape[0] == 6 else 1 for p in params]
            states = [
                {"m": torch.zeros_like(p), "v": torch.zeros(n, dtype=p.dtype)}
                for p, n in zip(params, blocks, strict=True)
            ]
            group = {**COMMON, "lr": LR, "cautious": cautious, "role": "all"}
            for t, grads in enumerate(gradients, 1):
                rows = [Row.of(rule, p, split(g), s, {}) for p, g, s in zip(params, grads, states, strict=True)]
                kernels.run(way, rule, filled_bucket(rule, rows, t, group, shrink=None, l2=None, skip=None))
            wanted, means = plain(weights, gradients, cautious=cautious)
            for p, s, want, mean in zip(params, states, wanted, means, strict=True):
                np.testing.assert_allclose(p.full_tensor().numpy(), want, rtol=1e-12, atol=1e-12)
                np.testing.assert_allclose(s["v"].numpy(), mean, rtol=1e-12, atol=1e-12)
    dist.destroy_process_group()


def test_sums_of_shards_are_those_of_the_whole_tensor(on_two_ranks, tmp_path):
    on_two_ranks(_on_two, f"{tmp_path}/store")
