"""Weights cut into blocks, and equal blocks worked on as one batch: what SOAP and Kron have in common.

A weight is seen in some shape (small dimensions merged), cut by a grid, and each block gets its own factors, one matrix
per dimension. Blocks at the far edges are as small as they come out: nothing is padded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_opt.kernels import wide

# Blocks up to this size of several weights go into one batch: larger ones keep a machine busy by themselves, and the
# copies into the batch would cost more than the calls they save.
SMALL = 128 * 128


@dataclass(frozen=True)
class Region:
    """Equal blocks of one weight: a rectangle of it under a grid.

    Attributes:
        view: the shape the weight is seen in.
        starts, counts, sizes: per dimension of `view`, where the rectangle begins, how many blocks, how long each is.
        stacked: the first dimension counts matrices: it is cut into ones, and no dimension of a block.
    """

    view: tuple[int, ...]
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    sizes: tuple[int, ...]
    stacked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one block."""
        return self.sizes[1:] if self.stacked else self.sizes

    @property
    def number(self) -> int:
        """Of blocks."""
        return math.prod(self.counts)

    def cut(self, tensor: Tensor) -> Tensor:
        """The blocks, ``[number, *shape]``; a view of the tensor where there can be one."""
        paired = [length for pair in zip(self.counts, self.sizes, strict=True) for length in pair]
        part = self._rectangle(tensor.reshape(self.view)).reshape(paired)
        return part.permute(*range(0, len(paired), 2), *range(1, len(paired), 2)).reshape(-1, *self.shape)

    def put(self, tensor: Tensor, blocks: Tensor) -> None:
        """Writes the blocks into the tensor, unless they are views of it."""
        seen = tensor.reshape(self.view)
        dims = len(self.view)
        order = [axis for dim in range(dims) for axis in (dim, dims + dim)]
        spread = blocks.reshape(*self.counts, *self.sizes).permute(order)
        rectangle = self._rectangle(seen)
        if spread.data_ptr() != rectangle.data_ptr():
            rectangle.copy_(spread.reshape(rectangle.shape))
        if seen.data_ptr() != tensor.data_ptr():  # dimensions of a strided weight cannot be merged in place
            tensor.copy_(seen.reshape(tensor.shape))

    def _rectangle(self, seen: Tensor) -> Tensor:
        for dim, (start, count, size) in enumerate(zip(self.starts, self.counts, self.sizes, strict=True)):
            seen = seen.narrow(dim, start, count * size)
        return seen


@dataclass(frozen=True)
class Grid:
    """How one weight is cut.

    Attributes:
        regions: in fixed order, their numbers are part of the states' names.
        factored: per dimension of a block, whether its factor is a matrix.
    """

    regions: tuple[Region, ...]
    factored: tuple[bool, ...]


def grid_of(
    view: Sequence[int], factored: Sequence[bool], block_size: int | None = None, *, stacked: bool = False
) -> Grid:
    """The grid of a weight.

    Args:
        view: the shape the weight is seen in, at least one dimension.
        factored: per dimension of a block (without the first of `view` where `stacked`), whether it has a matrix; only
            these are cut.
        block_size: longest side of a block; None: uncut.
        stacked: the first dimension counts matrices.
    """
    if 0 in view:
        return Grid((), tuple(factored))
    runs = [[(0, view[0], 1)]] if stacked else []
    for length, cut in zip(view[len(runs) :], factored, strict=True):
        size = min(block_size or length, length) if cut else length
        whole, rest = divmod(length, size)
        runs.append([(0, whole, size), *([(whole * size, 1, rest)] if rest else [])])
    regions = (Region(tuple(view), *zip(*choice, strict=True), stacked) for choice in itertools.product(*runs))
    return Grid(tuple(regions), tuple(factored))


def is_stack(p: Tensor, role: object) -> bool:
    """Whether a weight is a stack of matrices, each for itself, and no convolution (out, in, ...), which is one matrix.

    A weight of three dimensions is one unless its role is ``matrix`` (Conv1d); one of more only if it is ``expert``.
    """
    return p.ndim > 2 and (role == "expert" or (p.ndim == 3 and role != "matrix"))


def own_dims(x: Tensor, role: object) -> tuple[int, ...]:
    """The dimensions of one matrix of a stack, or all, for sums over what is one weight by its sense."""
    return tuple(range(1 if is_stack(x, role) else 0, x.ndim))


@dataclass(frozen=True)
class Stack:
    """Equal blocks, of one weight or of several, as one batch.

    What is read may be views, so whatever is changed goes back by `write` or `write_factors`.

    Attributes:
        members: per region its weight's index, its number in the weight's grid, and the region.
        factored: as in `Grid`.
    """

    members: list[tuple[int, int, Region]]
    factored: tuple[bool, ...]

    def read(self, tensors: Sequence[Tensor]) -> Tensor:
        """Blocks ``[number, *shape]``, float32 or float64."""
        return _joined([wide(region.cut(tensors[i])) for i, _, region in self.members])

    def write(self, tensors: Sequence[Tensor], blocks: Tensor) -> None:
        """Writes blocks back."""
        for (i, _, region), part in zip(self.members, self._parts(blocks), strict=True):
            region.put(tensors[i], part)

    def factors(self, extra: Sequence[Mapping[str, Tensor]], name: str) -> list[Tensor | None]:
        """Per dimension the blocks' factors ``[number, ...]``; None where a dimension has none."""
        found: list[Tensor | None] = []
        for dim in range(len(self.factored)):
            keys = [(i, factor_name(name, number, dim)) for i, number, _ in self.members]
            here = [extra[i][key] for i, key in keys if key in extra[i]]
            found.append(_joined(here) if here else None)
        return found

    def write_factors(self, extra: Sequence[Mapping[str, Tensor]], name: str, factors: Sequence[Tensor | None]) -> None:
        """Writes factors back."""
        for dim, factor in enumerate(factors):
            for (i, number, _), part in (
                zip(self.members, self._parts(factor), strict=True) if factor is not None else ()
            ):
                held = extra[i][factor_name(name, number, dim)]
                if part.data_ptr() != held.data_ptr():
                    held.copy_(part)

    def _parts(self, blocks: Tensor) -> Sequence[Tensor]:
        """The batch, member by member."""
        return blocks.split([region.number for _, _, region in self.members])


def factor_name(name: str, region: int, dim: int) -> str:
    """Under which a region's factor is kept in ``optimizer.state[p]``."""
    return f"{name}.{region}.{dim}"


def fresh_factors(grid: Grid, name: str, make: Callable[[int, int, int], Tensor | None]) -> dict[str, Tensor]:
    """States for a weight: ``make(number of blocks, dimension, length)`` for each region and dimension, or None."""
    found = {}
    for number, region in enumerate(grid.regions):
        for dim, size in enumerate(region.shape):
            factor = make(region.number, dim, size)
            if factor is not None:
                found[factor_name(name, number, dim)] = factor
    return found


def stacks(grids: Sequence[Grid]) -> list[Stack]:
    """All blocks of weights with these grids, equal small ones of different weights together."""
    found: dict[tuple[object, ...], Stack] = {}
    for i, grid in enumerate(grids):
        for number, region in enumerate(grid.regions):
            small = math.prod(region.shape) <= SMALL
            key = (region.shape, grid.factored, None if small else (i, number))
            found.setdefault(key, Stack([], grid.factored)).members.append((i, number, region))
    return list(found.values())


def along(x: Tensor, turn: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Applies ``turn(dim, rows)`` along each dimension of blocks ``[number, *shape]``.

    `rows` is ``[number, elements of the other dimensions, length of this one]``; the result keeps that shape.
    """
    for dim in range(x.ndim - 1):
        rows = x.reshape(x.shape[0], x.shape[1], -1).mT
        x = turn(dim, rows).reshape(x.shape[0], *x.shape[2:], x.shape[1])
    return x


def unfolded(x: Tensor, dim: int) -> Tensor:
    """Blocks ``[number, *shape]`` as matrices ``[number, length of dim, the rest]``."""
    return x.movedim(1 + dim, 1).flatten(2) if x.ndim > 2 else x.unsqueeze(2)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]
