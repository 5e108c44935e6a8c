"""Updates in the backward pass: the weights of a step after it, no gradient left, and what cannot be had refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_opt import optim
from lightning_opt.optim.releasing import Release, release
from lightning_opt.plan import ConfigError


class Tied(nn.Module):
    """One matrix used twice: its gradient is complete only once."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.middle = nn.Linear(8, 8)

    def forward(self, tokens):
        return self.middle(self.embedding(tokens)).relu() @ self.embedding.weight.t()


def fitted(released, name="adamw", *, clip=None, steps=4, **more):
    torch.manual_seed(0)
    model = Tied()
    optimizer = optim.build(model, {"name": name, "lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": clip, **more})
    handle = Release(optimizer, clip_each=clip is not None) if released else None
    seen = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        tokens = torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).mul(30).backward()
        if released:
            assert all(p.grad is None for p in model.parameters())
        seen.append(optimizer.clip_() if released else None)
        optimizer.step()
        model.zero_grad()
    return model, optimizer, handle, seen


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_the_weights_are_those_of_a_step_after_the_backward_pass(name):
    after, before = fitted(False, name), fitted(True, name)
    for a, b in zip(after[0].parameters(), before[0].parameters(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = (run[1].state_dict()["state"] for run in (before, after))
    assert (
        {k: v["step"] for k, v in ours.items()} == {k: v["step"] for k, v in theirs.items()} == dict.fromkeys(ours, 4)
    )


def test_clip_each_is_a_clip_of_each_tensor_by_its_own_norm():
    torch.manual_seed(0)
    clipped, plain = fitted(True, clip=0.1), fitted(True)
    assert not torch.equal(clipped[0].middle.weight, plain[0].middle.weight)
    model = Tied()
    optimizer = optim.build(model, {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": None})
    torch.manual_seed(0)
    model.load_state_dict(Tied().state_dict())
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        tokens = torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).mul(30).backward()
        for p in model.parameters():
            nn.utils.clip_grad_norm_([p], 0.1)
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(model.parameters(), clipped[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_norm_of_all_gradients_is_still_known():
    _, optimizer, _, norms = fitted(True, steps=1)
    torch.manual_seed(0)
    model = Tied()
    tokens = torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).mul(30).backward()
    want = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
    torch.testing.assert_close(norms[0], want)
    torch.testing.assert_close(torch.stack(list(optimizer.grad_norms().values())).norm(), want)


def test_taken_off_it_steps_after_the_backward_pass_again():
    model, optimizer, handle, _ = fitted(True)
    handle.remove()
    model(torch.tensor([[1, 2]])).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    before = model.middle.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.middle.weight)


def test_what_needs_all_gradients_is_refused_in_one_line(monkeypatch):
    p = [nn.Parameter(torch.ones(4, 4))]
    plain, clipped = optim.Lion(p), optim.Lion(p, max_grad_norm=1.0)
    hooked = optim.Lion(p)
    hooked.register_before_update_hook(lambda o: None)
    phases = {"a": {"rule": "lion", "until": 3}, "b": {"rule": "adamw"}}
    cases = [
        (optim.Phased(p, phases), "on", 1, False, "phases"),
        (clipped, "on", 1, False, "max_grad_norm"),
        (plain, "on", 2, False, "micro_batch_size"),
        (plain, "on", 1, True, "LossGuard"),
        (hooked, "clip_each", 1, False, "lambda"),
    ]
    if "muon" in optim.list_optimizers():
        cases.append((optim.Muon(p), "on", 1, False, "muon"))
    for optimizer, mode, accumulate, guarded, word in cases:
        with pytest.raises(ConfigError, match=word) as error:
            release(optimizer, mode, accumulate=accumulate, guarded=guarded)
        assert "update_in_backward" in str(error.value)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="one device"):
        release(plain, "on", accumulate=1, guarded=False)
    assert release(plain, "off", accumulate=2, guarded=True) is None


def test_a_second_backward_pass_before_the_step_is_refused():
    p = nn.Parameter(torch.ones(3))
    optimizer = optim.Lion([p])
    Release(optimizer)
    (p * 2).sum().backward()
    with pytest.raises(ConfigError, match="accumulation"):
        (p * 2).sum().backward()


def test_a_guard_that_comes_later_is_refused_too():
    p = nn.Parameter(torch.ones(3))
    optimizer = optim.Lion([p])
    Release(optimizer)
    optimizer.register_before_update_hook(lambda o: None)
    with pytest.raises(ConfigError, match="before the step"):
        (p * 2).sum().backward()
    assert torch.equal(p, torch.ones(3))


def test_a_hook_that_only_takes_a_time_may_stay():
    p = nn.Parameter(torch.ones(3))
    optimizer, told = optim.Lion([p]), []
    Release(optimizer)
    take_off = optimizer.register_before_update_hook(told.append, watches=False)
    for _ in range(2):
        (p * 2).sum().backward()
        optimizer.step()
    take_off()
    optimizer.step()
    assert told == [optimizer, optimizer]


def test_a_backward_pass_on_averaged_weights_changes_none():
    p = nn.Parameter(torch.ones(3))
    optimizer = optim.ScheduleFreeAdamW([p])
    Release(optimizer)
    (p * 2).sum().backward()
    optimizer.step()
    optimizer.eval()
    held = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"train\(\)"):
        (p * 2).sum().backward()
    assert torch.equal(p, held)
