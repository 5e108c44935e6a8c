"""Kills one run again and again, and tells what is then not as in a run that nobody disturbed.

    python tests/faults/driver.py                               20 kills of debug=smoke, about 6 minutes on 2 cores
    python tests/faults/driver.py --kills 5 --seed 3 optimizer=lion

Each life of the run is killed (SIGKILL, its whole process group) at a random instant after its first step; the last few
die while the trained model is scored or reported. Then the same command runs undisturbed to its end.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
STEPS, EVERY = 120, 3  # a checkpoint every few steps: kills meet saves under way
PATIENCE_S = 300.0  # for one life's next sign
LOOK_S = 0.01

_STEP = re.compile(r"^step (\d+)/(\d+)", re.MULTILINE)
_SCORING = re.compile(r"^evaluation ", re.MULTILINE)

# Columns and fields that a clock or the machine's load writes.
_TIMED = re.compile(r"time_s|.*_ms|.*_share|mfu|tokens_per_s.*|memory_.*_bytes|.*seconds.*|date|.*_time.*")
_TELLS = {"run.log", "events.jsonl", "status.json", "env.json", "summary.json"}
_TELLS |= {"report.html", "report.md", "MODEL_CARD.md"}
"""Files that may tell of restarts and of time; a run that nobody disturbed may have had no event."""
_LEFT_OVER = re.compile(r"\.part\b|\.tmp\b|\.rank|^\.(?!claim$)")

SMALLEST = ("debug=smoke", "data=files", "model.vocab_size=300", "model.context_length=32", "evaluation=none")
"""A run of a second on texts of its own, for tests within one process."""


@dataclass
class Victim:
    """One run in a folder of its own.

    Attributes:
        folder: the command's working directory.
        overrides: of ``train.py``.
        said: what all lives wrote to the terminal.
    """

    folder: Path
    overrides: tuple[str, ...]
    said: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def life(self) -> Iterator[Life]:
        """The command, started anew; whatever happens, none of its processes outlives the block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        out = self.folder.parent / f"{self.folder.name}-life-{len(self.said)}.txt"
        with out.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, str(TRAIN), *self.overrides],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(TRAIN.parent), "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        life = Life(process, out)
        try:
            yield life
        finally:
            life.kill()
            self.said.append(life.text())

    @property
    def run_folder(self) -> Path:
        """Where the run is; there must be one, however often its command ran."""
        [folder] = self.folder.glob("runs/*/*-*")
        return folder


@dataclass
class Life:
    """One process of a run, and its children."""

    process: subprocess.Popen[bytes]
    out: Path

    def text(self) -> str:
        """What it said so far."""
        return self.out.read_text(encoding="utf-8", errors="replace")

    def until(self, sign: re.Pattern[str]) -> bool:
        """Waits for a line; false where the process ends first.

        Raises:
            TimeoutError: neither happened for `PATIENCE_S`.
        """
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            over = self.process.poll() is not None
            if sign.search(self.text()):
                return True
            if over:
                return False
            time.sleep(LOOK_S)
        raise TimeoutError(f"neither {sign.pattern!r} nor an end in {PATIENCE_S:.0f} s:\n{self.text()[-3000:]}")

    def finish(self) -> int:
        """Waits for its end and returns the exit code."""
        return self.process.wait(timeout=PATIENCE_S)

    def kill(self) -> None:
        """SIGKILL to the whole group, as a machine's failure would take them all."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=PATIENCE_S)


def undisturbed(victim: Victim) -> tuple[float, float]:
    """Runs the command once to its end.

    Returns:
        Seconds from the first step to scoring, and from there to the end.

    Raises:
        RuntimeError: it did not end well.
    """
    with victim.life() as life:
        life.until(_STEP)
        first = time.monotonic()
        life.until(_SCORING)
        scoring = time.monotonic()
        if life.finish():
            raise RuntimeError(f"the undisturbed run failed:\n{life.text()[-5000:]}")
    return scoring - first, time.monotonic() - scoring


def harass(victim: Victim, kills: int, seed: int, training_s: float, scoring_s: float) -> list[str]:
    """Kills the run, then lets it end.

    Args:
        victim: the run.
        kills: how often.
        seed: of the instants.
        training_s: seconds of training of an undisturbed run.
        scoring_s: seconds that follow.

    Returns:
        One line per kill: when, and how far the run had come.

    Raises:
        RuntimeError: a life ended by itself before its kill, or the last one badly.
    """
    draw, told, left = random.Random(seed), [], 1.0
    late = kills // 7  # of the last kills, after training
    for number in range(1, kills + 1):
        scoring = number > kills - late
        # what is left of the training is shared among the kills to come; none is left out because the run was over
        share = min(0.8, 2 / max(2, kills - late - number + 2))
        wait = draw.uniform(0, scoring_s / 4 if scoring else left * share * training_s)
        with victim.life() as life:
            came = life.until(_SCORING if scoring else _STEP)
            time.sleep(wait)
            if not came or life.process.poll() is not None or "\nFINISHED" in life.text():
                raise RuntimeError(f"life {number} ended by itself:\n{life.text()[-5000:]}")
            life.kill()
            step, steps = map(int, (_STEP.findall(life.text()) or [("0", "1")])[-1])
        left = 1 - step / steps
        told.append(f"kill {number:2}: {wait:.3f} s into {'scoring' if scoring else 'training'}, at step {step}")
    with victim.life() as life:
        if life.finish():
            raise RuntimeError(f"the last life failed:\n{life.text()[-5000:]}")
    return told


def differences(run: Path, other: Path) -> list[str]:
    """What two finished run folders do not share that the same command must give: one line each, none when equal."""
    names, others = _files(run), _files(other)
    found = [f"only in one folder: {name}" for name in sorted(names ^ others - {"events.jsonl"})]
    found += [f"left over: {name}" for name in sorted(names | others) if any(map(_LEFT_OVER.search, Path(name).parts))]
    for name in sorted(names & others):
        a, b = run / name, other / name
        if name.startswith("checkpoints/"):
            if a.suffix == ".pt":
                found += _unlike(_load(a), _load(b), name)
            elif a.suffix == ".json":
                found += _unlike(*(_manifest(path) for path in (a, b)), name)
            elif a.read_bytes() != b.read_bytes():
                found.append(f"{name}: other bytes")
        elif name == "metrics.csv":
            found += _unlike(_table(a), _table(b), name)
        elif name == "evaluation/results.json":
            found += _unlike(*(_results(path) for path in (a, b)), name)
        elif name not in _TELLS and a.read_bytes() != b.read_bytes():
            found.append(f"{name}: other bytes")
    scores = [json.loads((folder / "summary.json").read_text()) for folder in (run, other)]
    return found + _unlike(*(_scores(score) for score in scores), "summary.json")


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def _load(path: Path) -> Any:
    """The state; but for the open row of metrics.csv, no clock has a say in it."""
    tree = torch.load(path, map_location="cpu", weights_only=True)
    return tree | {"run": _untimed(tree["run"])}


def _results(path: Path) -> dict[str, Any]:
    """lm-eval's results without what it says of paths, addresses in memory and time."""
    results = json.loads(path.read_text(encoding="utf-8"))
    return {name: results[name] for name in ("results", "n-samples", "n-shot", "versions")}


def _manifest(path: Path) -> dict[str, Any]:
    """Without the moment of the save and the digests of files that hold such moments."""
    manifest = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in manifest.items() if key not in ("created", "files", "sha256")}


def _table(path: Path) -> dict[str, list[str]]:
    """Columns by name, to the letter, without those that a clock writes."""
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    return {name: [row[i] for row in rows] for i, name in enumerate(header) if not _TIMED.fullmatch(name)}


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(item) for key, item in value.items() if not _TIMED.fullmatch(str(key))}
    return [_untimed(item) for item in value] if isinstance(value, list) else value


def _scores(summary: dict[str, Any]) -> dict[str, Any]:
    kept = ("steps", "tokens", "train_loss", "val_loss", "val_loss_by_corpus", "evaluation", "state", "config_hash")
    return {name: _untimed(summary[name]) for name in kept}


def _unlike(a: Any, b: Any, where: str) -> list[str]:
    """Every place where two trees are not the same to the last bit."""
    if type(a) is not type(b):
        return [f"{where}: {type(a).__name__}, {type(b).__name__}"]
    if isinstance(a, dict):
        found = [f"{where}: only in one: {key!r}" for key in a.keys() ^ b.keys()]
        return found + [line for key in a.keys() & b.keys() for line in _unlike(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where}: {len(a)} values, {len(b)} values"]
        return [line for i, pair in enumerate(zip(a, b, strict=True)) for line in _unlike(*pair, f"{where}[{i}]")]
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return [] if same and _bits(a) == _bits(b) else [f"{where}: other values"]
    return [] if a == b or (a != a and b != b) else [f"{where}: {a!r}, {b!r}"]


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def write_texts(folder: Path) -> Path:
    """Real text that every Python brings along, in two small corpora."""
    folder.mkdir(parents=True, exist_ok=True)
    for corpus, module in (("code", "argparse.py"), ("prose", "pydoc_data/topics.py")):
        lines = (Path(os.__file__).parent / module).read_text(encoding="utf-8").splitlines()
        (folder / f"{corpus}.txt").write_text("\n\n".join(lines[:3000]), encoding="utf-8")
    return folder


def smoke(texts: Path, *more: str) -> tuple[str, ...]:
    """The command that is killed: every stage of a run, with many checkpoints."""
    base = (
        "debug=smoke",
        "data=files",
        f"data.path={texts}",
        f"data.cache_dir={texts.parent / 'cache'}",
        f"trainer.max_steps={STEPS}",
        "trainer.num_threads=1",
        f"callbacks.checkpoint.every_n_steps={EVERY}",
    )
    return (*base, *more)


def trial(folder: Path, kills: int, seed: int, *overrides: str) -> tuple[list[str], list[str]]:
    """An undisturbed run and a harassed one of the same command.

    Returns:
        What was done, and what differs at the end.
    """
    command = smoke(write_texts(folder / "texts"), *overrides)
    calm, hunted = Victim(folder / "calm", command), Victim(folder / "hunted", command)
    told = [f"seed {seed}", *harass(hunted, kills, seed, *undisturbed(calm))]
    return told, differences(calm.run_folder, hunted.run_folder)


def main() -> int:
    """Prints every kill and what differs; 1 where anything does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=None, help="of the instants; drawn and printed by default")
    parser.add_argument("--folder", type=Path, default=None, help="keeps everything here, for a look afterwards")
    parser.add_argument("overrides", nargs="*", help="further overrides of train.py")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    with tempfile.TemporaryDirectory() as folder:
        told, found = trial(args.folder or Path(folder), args.kills, seed, *args.overrides)
    print("\n".join([*told, *found, "NOT the same" if found else f"{args.kills} kills, the same to the last bit"]))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
