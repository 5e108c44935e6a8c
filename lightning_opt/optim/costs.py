"""What one step of a rule costs: counted while the real optimizer steps a matrix of shapes only."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_opt.optim.base import Optimizer
from lightning_opt.optim.catalogue import find_rule
from lightning_opt.plan import ConfigError

# Operations per element of the result where it is not one; reductions count the elements that go in.
_PER_ELEMENT = {"lerp": 3, "addcmul": 3, "addcdiv": 3, "where": 0, "copy": 0}
_REDUCTIONS = {"sum": 1, "mean": 1, "linalg_vector_norm": 2, "norm": 2, "amax": 1, "max": 1}
_FACTORISATIONS = {
    "linalg_qr": lambda m, n: 4 * m * n * n - 4 * n**3 / 3,
    "_linalg_eigh": lambda m, n: 9 * n**3,
    "linalg_cholesky_ex": lambda m, n: n**3 / 3,
}
_LATE = 10_000  # steps after which schedules inside a rule have come to rest
_STEPS = 100


@dataclass(frozen=True)
class Costs:
    """What a step of one float32 matrix costs, per weight.

    Attributes:
        shape: of the matrix.
        state: bytes of state, by what it is stored in (``float32``, ``bfloat16``, ``int8``); refused ones are absent.
        traffic: bytes that an ideal step reads and writes.
        operations: floating-point operations of a step, the mean of many.
        least, most: of the cheapest and the dearest of these steps.
    """

    shape: tuple[int, int]
    state: dict[str, float]
    traffic: int
    operations: float
    least: float
    most: float

    @property
    def intensity(self) -> float:
        """Operations per byte moved."""
        return self.operations / self.traffic


def costs(rule: str, shape: tuple[int, int] = (512, 2048), **hyper: Any) -> Costs:
    """Counts what a rule does to one matrix, on the meta device: nothing is computed.

    Operations are additions, multiplications, divisions, roots and comparisons, one each; a matrix product has
    ``2 m n k``, a triangular solve half of that, factorisations what Golub and Van Loan, Matrix Computations (4th
    edition) give: QR with Q in 5.2, symmetric eigenvectors in 8.3, Cholesky in 4.2. Counted late in a run: first steps
    and warm-ups inside a rule are over.

    Args:
        rule: name of the rule.
        shape: of the matrix.
        **hyper: hyperparameters of the rule.
    """
    spec = find_rule(rule)
    weight = nn.Parameter(torch.empty(shape, device="meta"))
    given = {"implementation": "eager" if spec.elementwise else "auto", **hyper}  # else it would compile
    optimizer = Optimizer([weight], rule=rule, **given)
    if optimizer.needs:
        optimizer.observe(**dict.fromkeys(optimizer.needs, 0))
    counted = []
    for step in range(1 + (1 if spec.elementwise else _STEPS)):
        weight.grad = torch.empty_like(weight)
        with _Counter() as counter:
            optimizer.step()
        if not step:  # it made the state
            optimizer.state[weight]["step"] = _LATE
        else:
            counted.append(counter.operations / weight.numel())
    state = {}
    for dtype in ("float32", "bfloat16", "int8"):
        with contextlib.suppress(ConfigError):
            (row,) = Optimizer([weight], rule=rule, **{**given, "state_dtype": dtype}).routing_table()
            state[dtype] = row["state_bytes"] / weight.numel()
    return Costs(shape, state, spec.traffic, sum(counted) / len(counted), min(counted), max(counted))


class _Counter(TorchDispatchMode):
    """Adds up the operations of every torch operator that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += _operations(func, args, kwargs or {}, result)
        return result


def _operations(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    name = func._schema.name.removeprefix("aten::").removeprefix("_foreach_").removesuffix("_")
    product = flop_registry.get(getattr(torch.ops.aten, name, None))
    if product is not None:  # in place and out= are packets of their own: the registry has none of them
        return product(*args, **{key: value for key, value in kwargs.items() if key != "out"}, out_val=result)
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if name in _FACTORISATIONS:
        *batch, m, n = tensors[0].shape
        return torch.Size(batch).numel() * _FACTORISATIONS[name](m, n)
    if name == "linalg_solve_triangular":
        return tensors[1].numel() * tensors[0].shape[-1]
    if name in _REDUCTIONS and tensors:
        return _REDUCTIONS[name] * tensors[0].numel()
    if torch.Tag.pointwise in func.tags:
        made = args[0] if args and isinstance(args[0], (list, tuple)) else [result]
        return _PER_ELEMENT.get(name, 1) * sum(t.numel() for t in made if isinstance(t, Tensor))
    return 0
