"""A sweep of ``train.py`` run from another program: stopped as a whole, and gone on with by the same words."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run(words: Sequence[str]) -> int:
    """Runs ``train.py -m`` with overrides; SIGINT and SIGTERM are handed on to it.

    Args:
        words: overrides; ``hydra.sweep.dir`` among them names the folder, to which these jobs are added.

    Returns:
        0 where the sweep went to its end, though jobs may have diverged or failed, else its exit code.
    """
    print(f"python train.py -m {' '.join(words)}", flush=True)
    process = subprocess.Popen([sys.executable, "train.py", "-m", *words], cwd=ROOT)

    def hand_on(number: int, frame: Any) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0 if code in (0, 1, 3) else code
