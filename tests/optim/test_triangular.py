"""Products that leave out zeros and mirrored halves equal the whole ones, for every shape and stride."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_opt.optim import triangular

SIDES = (1, 130, 256, 301, 515)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("n", SIDES)
def test_products_equal_the_whole_ones(n: int, strided: bool) -> None:
    rows, q, u = drawn(2, 37, n), drawn(2, n, n).triu(), drawn(2, n, n).triu_()
    if strided:
        rows, q = drawn(2, n, 37).mT, drawn(2, 2 * n, n)[:, :n].triu()
    before = rows.clone(), q.clone(), u.clone()
    torch.testing.assert_close(triangular.times_upper(rows, q), rows @ q)
    torch.testing.assert_close(triangular.times_lower(rows, q), rows @ q.mT)
    torch.testing.assert_close(triangular.upper_times_upper(u, q), u @ q)
    torch.testing.assert_close(triangular.gram(rows.mT), rows.mT @ rows)
    assert all(torch.equal(a, b) for a, b in zip(before, (rows, q, u), strict=True))


@pytest.mark.parametrize("n", SIDES)
def test_averages_move_by_their_share(n: int) -> None:
    a = drawn(3, n, 20)
    average = torch.cat([a @ a.mT + 1, drawn(3, n, n)])[:3]  # a view, as of a state
    a = a.sin()
    wanted = average.lerp(a @ a.mT, 0.05)
    assert triangular.average_gram_(average, a, 0.05) is average
    torch.testing.assert_close(average, wanted)


def test_what_is_there_already_does_not_count_at_a_share_of_one() -> None:
    a = drawn(1, 300, 5)
    filled = triangular.average_gram_(torch.full((1, 300, 300), torch.nan, dtype=a.dtype), a, 1.0)
    torch.testing.assert_close(filled, a @ a.mT)


@pytest.mark.parametrize(
    ("product", "left"),
    [
        (lambda x, q: triangular.times_upper(x, q), 5 / 8),
        (lambda x, q: triangular.times_lower(x, q), 5 / 8),
        (lambda x, q: triangular.upper_times_upper(q, q), 11 / 32),
        (lambda x, q: triangular.gram(x), 5 / 8),
    ],
)
def test_the_arithmetic_that_is_left(product: Callable[[Tensor, Tensor], Tensor], left: float) -> None:
    x, q = drawn(1, 512, 512), drawn(1, 512, 512).triu()
    in_place = {torch.ops.aten.baddbmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * a[2] * b[2]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        product(x, q)
    assert counter.get_total_flops() == left * 2 * 512**3
