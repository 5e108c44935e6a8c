"""Dense peak FLOP/s of a GPU by its exact name: the denominator of model FLOPs utilisation.

Data sheets often print the number *with sparsity*, twice what a dense matrix product can reach. Lightning's own table
(`lightning.fabric.utilities.throughput.get_available_flops`, 2.6.6) is not used for that reason: it holds the sparse
values for "h100 nvl" (1978.8e12 for bfloat16; dense: 835e12) and for both H200s (2.0e15; dense: 989e12), half of the
dense value for the RTX 4090, and it matches parts of names, so that an unlisted device may get a neighbour's number
(Lightning issues 21677 and 21743). Here an unlisted name has no peak, and MFU is then absent rather than guessed.

Values: TFLOP/s, dense, accumulation in float32. Sources, by letter in the table:

- H  NVIDIA H100 Tensor Core GPU Architecture white paper, table "H100 and A100 performance"; H100 and H200 data sheets
     (printed with sparsity, halved here), as in torchtitan's `get_peak_flops`: NVL 835, SXM 989, PCIe 756, H200 989
- B  NVIDIA HGX B200 data sheet, an eighth of the eight-GPU board, sparsity halved
- A  NVIDIA A100 data sheet (A100, all forms); A10, A30, A40, RTX A6000: their data sheets, dense columns
- L  NVIDIA L4, L40, L40S data sheets, dense columns
- G  NVIDIA Ada, Ampere GA102 and RTX Blackwell architecture white papers, rows "with FP32 accumulate", dense
- V  NVIDIA V100, V100S and T4 data sheets (no bfloat16 tensor cores)
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

Arithmetic = Literal["float32", "tf32", "bfloat16", "float16"]


def _peaks(float32: float, tf32: float | None, half: float, bfloat16: bool = True) -> dict[str, float | None]:
    return {"float32": float32, "tf32": tf32, "bfloat16": half if bfloat16 else None, "float16": half}


_H100_SXM = _peaks(66.9, 494.7, 989.4)  # H
_H100_NVL = _peaks(60.0, 417.5, 835.0)  # H
_A100 = _peaks(19.5, 156.0, 312.0)  # A
_V100_SXM = _peaks(15.7, None, 125.0, bfloat16=False)  # V
_V100_PCIE = _peaks(14.0, None, 112.0, bfloat16=False)  # V

TERAFLOPS: dict[str, dict[str, float | None]] = {
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA H100 PCIe": _peaks(51.2, 378.0, 756.0),  # H
    "NVIDIA H100 NVL": _H100_NVL,
    "NVIDIA H200": _H100_SXM,
    "NVIDIA H200 NVL": _H100_NVL,
    "NVIDIA GH200 480GB": _H100_SXM,
    "NVIDIA B200": _peaks(75.0, 1125.0, 2250.0),  # B
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "A100-SXM4-40GB": _A100,  # as older drivers spell it
    "A100-SXM4-80GB": _A100,
    "A100-PCIE-40GB": _A100,
    "NVIDIA A10": _peaks(31.2, 62.5, 125.0),  # A
    "NVIDIA A30": _peaks(10.3, 82.0, 165.0),  # A
    "NVIDIA A40": _peaks(37.4, 74.8, 149.7),  # A
    "NVIDIA RTX A6000": _peaks(38.7, 77.4, 154.8),  # A
    "NVIDIA L4": _peaks(30.3, 60.0, 121.0),  # L
    "NVIDIA L40": _peaks(90.5, 90.5, 181.0),  # L
    "NVIDIA L40S": _peaks(91.6, 183.0, 362.0),  # L
    "NVIDIA GeForce RTX 5090": _peaks(104.8, 104.8, 209.5),  # G
    "NVIDIA GeForce RTX 4090": _peaks(82.6, 82.6, 165.2),  # G
    "NVIDIA GeForce RTX 3090": _peaks(35.6, 35.6, 71.0),  # G
    "Tesla V100-SXM2-16GB": _V100_SXM,
    "Tesla V100-SXM2-32GB": _V100_SXM,
    "Tesla V100-PCIE-16GB": _V100_PCIE,
    "Tesla V100-PCIE-32GB": _V100_PCIE,
    "Tesla V100S-PCIE-32GB": _peaks(16.4, None, 130.0, bfloat16=False),  # V
    "Tesla T4": _peaks(8.1, None, 65.0, bfloat16=False),  # V
}


def peak_flops(device_name: str, arithmetic: str) -> float | None:
    """Dense peak of one device in FLOP/s.

    Args:
        device_name: exactly what ``torch.cuda.get_device_name()`` returns.
        arithmetic: ``float32``, ``tf32``, ``bfloat16`` or ``float16``.

    Returns:
        FLOP/s, or ``None`` for a device that is not in the table or lacks that arithmetic.

    Raises:
        ValueError: ``arithmetic`` is none of the four.
    """
    if arithmetic not in get_args(Arithmetic):
        raise ValueError(f"arithmetic={arithmetic!r}: expected one of {', '.join(get_args(Arithmetic))}")
    teraflops = TERAFLOPS.get(device_name, {}).get(arithmetic)
    return None if teraflops is None else teraflops * 1e12


def arithmetic_of(precision: str) -> str | None:
    """The arithmetic that matrix products run in under a Lightning precision such as ``bf16-mixed``.

    Plain float32 becomes ``tf32`` where ``torch.set_float32_matmul_precision`` allows it. ``None`` where the table has
    no such column (float64, float8).
    """
    if precision.startswith("bf16"):
        return "bfloat16"
    if precision.startswith("16"):
        return "float16"
    if precision.startswith("32"):
        return "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return None
