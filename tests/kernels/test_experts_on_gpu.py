"""Experts that rest on a GPU: as on a CPU, and without the host waiting for the counts."""

from __future__ import annotations

import pytest
import torch

from lightning_opt import optim

pytestmark = pytest.mark.gpu
TOKENS = [[9, 0, 4], [0, 7, 8], [3, 0, 0], [5, 5, 0]]


def run(name: str, way: str, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights before and after the last step, which nobody may wait in."""
    generator = torch.Generator().manual_seed(0)
    stacks = [torch.nn.Parameter(torch.randn(3, 64, 48, generator=generator).to(device)) for _ in range(2)]
    more = {"ns_dtype": "float32"} if name == "muon" else {}
    hyper = {"lr": 1e-2, "weight_decay": 0.1, "implementation": way, "sparse_experts": 4, "expert_rate": "sqrt_load"}
    optimizer = optim.Optimizer([{"params": stacks, "role": "expert"}], rule=name, **hyper, **more)
    before = []
    for step, counts in enumerate(TOKENS):
        for p in stacks:
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        tokens = torch.tensor(counts, device=device)
        before = [p.detach().clone() for p in stacks]
        strict = device == "cuda" and step == len(TOKENS) - 1  # compiled by then
        if strict:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.observe(expert_tokens=dict.fromkeys(stacks, tokens))
            optimizer.step()
        finally:
            if strict:
                torch.cuda.set_sync_debug_mode("default")
    return [b.cpu() for b in before], [p.detach().cpu() for p in stacks]


@pytest.mark.parametrize(
    ("name", "way"),
    [("adamw", "eager"), ("adamw", "compiled"), ("lion", "compiled"), ("adam_mini", "eager"), ("muon", "whole")],
)
def test_as_on_a_cpu_and_nobody_waits(name: str, way: str) -> None:
    before, after = run(name, way, "cuda")
    _, wanted = run(name, "whole" if way == "whole" else "eager", "cpu")
    for was, now, want in zip(before, after, wanted, strict=True):
        assert torch.equal(now[2], was[2])  # it had no token in the last step
        assert not torch.equal(now[0], was[0])
        torch.testing.assert_close(now, want, rtol=1e-3, atol=1e-4)
