"""How near to orthogonal does Newton-Schulz come, by coefficients, steps, condition number and dtype, and how fast?

    python -m benchmarks.newton_schulz              a minute
    python -m benchmarks.newton_schulz --quick      small matrices, one round

*error*: root mean square of (singular value - 1) of the result, and the smallest and largest of them; matrices have
singular values evenly spread in logarithm from 1 to 1 / condition. *size*: root mean square of the result over that of
an orthogonal matrix, by which a step is larger or smaller. *cpu ms*: processor time of one matrix, the least of all
rounds; torch's is `torch.optim.Muon`'s own function, in bfloat16.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import Page, Table, keep, machine
from lightning_opt.optim.orthogonal import COEFFICIENTS, orthogonalized

STEPS = (3, 5, 7, 10)
CONDITIONS = (1e1, 1e2, 1e3, 1e5)


def with_condition(rows: int, columns: int, condition: float) -> Tensor:
    left = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, rows, dtype=torch.float64))[0]
    return (left * torch.logspace(0, -math.log10(condition), rows, dtype=torch.float64)) @ right.mT


def errors(rows: int, columns: int, dtype: str) -> list[dict[str, Any]]:
    found = []
    for condition in CONDITIONS:
        torch.manual_seed(0)
        matrix = with_condition(rows, columns, condition).float()
        for name in COEFFICIENTS:
            for steps in STEPS:
                values = torch.linalg.svdvals(orthogonalized([matrix], steps, name, dtype)[0].double())
                found.append(
                    {
                        "condition": f"{condition:.0e}",
                        "coefficients": name,
                        "steps": steps,
                        "dtype": dtype,
                        "error": float((values - 1).square().mean().sqrt()),
                        "smallest": float(values.min()),
                        "largest": float(values.max()),
                        "size": float(values.square().mean().sqrt()),
                    }
                )
    return found


def cpu_ms(work: Callable[[], Any], rounds: int) -> float:
    least = math.inf
    for _ in range(rounds + 1):
        start = time.process_time()
        work()
        least = min(least, time.process_time() - start)
    return least * 1e3


def speeds(shapes: list[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    from torch.optim._muon import _zeropower_via_newtonschulz

    found = []
    for shape in shapes:
        matrix = torch.randn(shape)
        torchs = cpu_ms(lambda x=matrix: _zeropower_via_newtonschulz(x, (3.4445, -4.775, 2.0315), 5, 1e-7), rounds)
        row: dict[str, Any] = {"matrix": f"{shape[0]} x {shape[1]}", "torch.optim.Muon cpu ms": torchs}
        for dtype in ("float32", "bfloat16", "auto"):
            row[f"{dtype} cpu ms"] = cpu_ms(lambda x=matrix, d=dtype: orthogonalized([x], 5, "jordan", d), rounds)
        found.append(row | {"torch / auto": torchs / row["auto cpu ms"]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small matrices, one round")
    parser.add_argument("--out", type=Path, help="folder of the page")
    options = parser.parse_args()
    where = machine()
    shape = (16, 48) if options.quick else (256, 768)
    shapes = [(64, 64), (64, 256)] if options.quick else [(128, 128), (512, 512), (512, 1024), (512, 2048), (768, 3072)]
    tables = [
        Table(f"Error, {shape[0]} x {shape[1]}, {dtype}", errors(*shape, dtype)) for dtype in ("float32", "bfloat16")
    ]
    tables.append(Table("Time of five steps", speeds(shapes, 1 if options.quick else 10)))
    page = Page("newton_schulz", "Newton-Schulz: error and time", "See the module's text.", tables)
    keep(page, where, options.out, suffix="-quick" if options.quick else "")


if __name__ == "__main__":
    main()
