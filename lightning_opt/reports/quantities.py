"""Numbers as people read them: sensible digits, units, thousands separators; what is absent says so and is never 0."""

from __future__ import annotations

import math
from typing import Any

from lightning_opt import plan

NOT_MEASURED = "not measured"


def finite(value: Any) -> float | None:
    """The value as a float, or None where it is no finite number (text, bool, NaN, None)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: Any, digits: int = 4) -> str:
    """A plain number with so many significant digits: 3.712, 0.00031, 1,234."""
    x = finite(value)
    if x is None:
        return NOT_MEASURED
    if x == 0:
        return "0"
    if abs(x) >= 10**digits:
        return f"{x:,.0f}"
    if abs(x) < 1e-4:
        mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(x))))
    return f"{x:,.{decimals}f}"


def trimmed(value: Any, digits: int = 6) -> str:
    """A number somebody chose (a rate, a decay): as short as it was written."""
    x = finite(value)
    if x is None:
        return NOT_MEASURED
    text = number(x, digits)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def integer(value: Any) -> str:
    """A count to the last digit: 1,638,400."""
    x = finite(value)
    return NOT_MEASURED if x is None else f"{x:,.0f}"


def short(value: Any) -> str:
    """A count in three digits: 802, 14.2k, 1.64M, 3.00B."""
    x = finite(value)
    if x is None:
        return NOT_MEASURED
    for limit, unit in ((999.5e9, "T"), (999.5e6, "B"), (999.5e3, "M"), (999.5, "k")):
        if abs(x) >= limit:
            scaled = x / {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}[unit]
            return f"{scaled:.{2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0}f}{unit}"
    return f"{x:.0f}" if x == int(x) else number(x, 3)


def size(value: Any) -> str:
    """Bytes in binary units: 512 B, 8.58 MiB, 1.25 GiB."""
    x = finite(value)
    if x is None:
        return NOT_MEASURED
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(x) < 1024 or unit == "GiB":
            return f"{x:.0f} {unit}" if unit == "B" else f"{number(x, 3)} {unit}"
        x /= 1024
    raise AssertionError("unreachable")


def milliseconds(value: Any) -> str:
    """A time of a step: 4.31 ms, 152 ms, 1.20 s."""
    x = finite(value)
    if x is None:
        return NOT_MEASURED
    return f"{number(x / 1000, 3)} s" if x >= 1000 else f"{number(x, 3)} ms"


def duration(value: Any) -> str:
    """Seconds as a person says them: 41 s, 2 min 17 s, 3 h 05 min."""
    x = finite(value)
    return NOT_MEASURED if x is None else plan.duration(x)


def percent(value: Any) -> str:
    """A share as a percentage: 0.031 is 3.1 %."""
    x = finite(value)
    return NOT_MEASURED if x is None else f"{number(100 * x, 2 if abs(x) < 0.995 else 3)} %"


def plus_minus(value: Any, stderr: Any) -> str:
    """A value with its standard error, the error in two digits and the value to the same decimal: 0.417 ± 0.049."""
    x, error = finite(value), finite(stderr)
    if x is None:
        return NOT_MEASURED
    if error is None or error == 0:
        return f"{x:.3f}"
    decimals = min(4, max(0, 1 - math.floor(math.log10(error))))
    return f"{x:.{decimals}f} ± {error:.{decimals}f}"


def text(value: Any) -> str:
    """Anything of a configuration as one short word: numbers trimmed, lists joined, null as a dash."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return integer(value)
    if isinstance(value, float):
        return trimmed(value) if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(text(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {text(item)}" for key, item in value.items())
    return str(value)
