"""Shards of a large mixture, made once: just the tokens asked for, by many processes, and stopped wherever one likes.

The plan is made first and kept: which files, in which order, how much of each. Units (`units`) then fill up in any
order on any number of processes; what is used of them (`finishing`) depends on the plan alone. So a killed and repeated
command gives the same shards, to the byte, as one that ran through.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock

from lightning_opt.data import finishing, orders
from lightning_opt.data.cached import Damaged, file_digest, fingerprint, replace_text, verify
from lightning_opt.data.meter import Meter
from lightning_opt.data.orders import CorpusPlan, Plan
from lightning_opt.data.shards import RECORD, WORK, read_index
from lightning_opt.data.tokenizer import BESIDE, TOKENIZER
from lightning_opt.data.units import Progress, Unit, progress_of
from lightning_opt.data.workforce import Kit, Workforce
from lightning_opt.plan import ConfigError, available_cpus, differences
from lightning_opt.plan.errors import show

log = logging.getLogger("lightning_opt.data")

_COUNTED = ("tokens", "documents")
_FIELDS = {"tokens": "tokens", "format": "format"}  # of the settings, those that lie outside of data


@dataclass(frozen=True)
class Prepared:
    """One corpus of what was made.

    Attributes:
        name: of the corpus.
        asked: tokens wanted, of its training or of its validation text.
        tokens: there are, by split.
        documents: there are, by split.
        removed: documents left out because they share a run of words with an evaluation set.
        empty: rows left out because their text is empty or null.
    """

    name: str
    asked: int
    tokens: dict[str, int]
    documents: dict[str, int]
    removed: int
    empty: int


def prepare(
    config: Mapping[str, Any], *, tokens: Any, processes: int | None = None, arguments: Sequence[str] = ()
) -> list[Prepared]:
    """Makes the shards of ``config["path"]``, or goes on with them, or finds them made; what is damaged is made again.

    Args:
        config: ``config["data"]``.
        tokens: training tokens of all corpora together, shared out by weight.
        processes: how many work side by side; None: one per CPU. Changes the speed, never the shards.
        arguments: of the command, but for the folder; kept for those who have to repeat it.

    Raises:
        ConfigError: something asked for is wrong or cannot be had, or the folder holds something else.
        HubLost: the hub does not answer; the same call goes on.
        WorkerLost: a worker was killed; the same call goes on.
    """
    settings = orders.asked(config, tokens)
    target = Path(config["path"])
    check_target(target, settings)
    with _alone(target):
        record = check_target(target, settings)
        if record and _is_whole(target, record, config):
            made = [_prepared(target / name) for name in record["corpora"]]
        else:
            work = target / WORK
            plan = orders.read_plan(work)
            if plan is None:
                shutil.rmtree(work, ignore_errors=True)
                plan = orders.make_plan(config, settings, work)
            begun = {"settings": settings, "arguments": list(arguments)}
            replace_text(work / RECORD, json.dumps(begun))  # for who is told to go on with it
            made = _make(target, plan, processes or available_cpus(), arguments)
        shutil.rmtree(target / WORK, ignore_errors=True)
    return made


def check_target(target: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a preparation of these settings that was finished in the folder; None where it is to be made.

    Raises:
        ConfigError: the folder cannot be written, or holds something else.
    """
    place = orders.existing(target)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError("data.path", str(target), "must be a folder we can write to")
    try:
        record = json.loads((target / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        if not (target / WORK).is_dir() and target.is_dir() and any(target.iterdir()):
            how = "must be a new folder, or one that this command began: it holds something else"
            raise ConfigError("data.path", str(target), how) from None
        if begun := orders.read_plan(target / WORK):
            _check_same(begun.settings, settings, target)
        return None
    _check_same(record["settings"], settings, target)
    return record


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    try:
        target.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(target.parent / f".{target.name}.lock")
        lock.acquire(timeout=1)
    except filelock.Timeout:
        raise ConfigError("data.path", str(target), "must not be in use: another process is preparing it") from None
    except OSError as error:
        raise ConfigError("data.path", str(target), f"must be a folder we can write to ({error})") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # while it is held: who waits for it notices that it is gone
            os.unlink(lock.lock_file)
        lock.release()
        with contextlib.suppress(OSError):
            target.rmdir()  # nothing was begun


def _is_whole(target: Path, record: dict[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether all is as it was written; if not, all that is not is cleared away, to be made by the plan of then."""
    damaged = [name for name in record["corpora"] if _is_damaged(target / name)]
    tokenizer = (target / TOKENIZER).is_file() and file_digest(target / TOKENIZER) == record["tokenizer_sha256"]
    if not damaged and tokenizer:
        return True
    work = target / WORK
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    if plan := orders.read_plan(target):
        plan = replace(plan, folder=work)
        if tokenizer:
            _copy_tokenizer(target, work)
        else:
            log.warning("%s is missing or not what was written: made again", target / TOKENIZER)
            orders.make_tokenizer(plan.settings, plan.corpora, work)
            tokenizer = file_digest(plan.tokenizer) == record["tokenizer_sha256"]
        orders.save_plan(plan, config)
    else:
        for name in (TOKENIZER, *BESIDE, orders.PLAN):  # all begins anew, as in an empty folder
            (target / name).unlink(missing_ok=True)
    for name in damaged if plan and tokenizer else record["corpora"]:
        shutil.rmtree(target / name, ignore_errors=True)
    (target / RECORD).unlink()  # last: until here the next call finds the damage again
    return False


def _is_damaged(folder: Path) -> bool:
    try:
        read_index(folder)
        verify(folder)  # without a memory: a byte may change and leave size and time as they were
    except Damaged as damage:
        log.warning("%s: made again", damage)
        return True
    return False


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in (TOKENIZER, *BESIDE):
        if (source / name).is_file():
            replace_text(target / name, (source / name).read_text(encoding="utf-8"))


def _check_same(before: dict[str, Any], now: dict[str, Any], target: Path) -> None:
    found = [one for key in now for one in differences(_FIELDS.get(key, f"data.{key}"), before.get(key), now[key])]
    if found:
        (field, *values), *others = found
        then, asked = (f"{value:.4g}" if isinstance(value, float) else show(value) for value in values)
        what = f"holds shards of {field} = {then}, not of {asked}"
        more = f" (differing too: {', '.join(field for field, _, _ in others)})" * bool(others)
        raise ConfigError("data.path", str(target), f"{what}: name another data.path, or delete it{more}")


class _Corpus:
    """The units of one corpus: which are over, which are next, and when there are enough."""

    def __init__(self, plan: CorpusPlan, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.plan, self.folder = plan, folder
        self.over: dict[int, Progress] = {}
        self.running = 0
        self._units: list[Unit] = []
        self._issued = self._round_from = 0

    @property
    def missing(self) -> float:
        """Tokens still to be asked of further units, going by what those that are over gave."""
        done = [progress.tokens[self.plan.split] for progress in self.over.values()]
        each = sum(done) / len(done) if done else self.plan.quota
        return self.plan.goal - sum(done) - self.running * each

    def next(self) -> Unit | None:
        """The next unit that is not over; None where there are enough of them, or more are not known yet."""
        while self.missing > 0 and (self._issued < len(self._units) or self._another_round()):
            unit = self._units[self._issued]
            self._issued += 1
            progress = progress_of(unit)
            if not progress.done:
                self.running += 1
                return unit
            self.over[unit.number] = progress
        return None

    def _another_round(self) -> bool:
        """Adds a unit for every file: from its start, or from where it was left with twice as much to take."""
        if self.running:
            return False
        if not self._units:
            self._units = [self._unit(number, file, 0, self.plan.quota) for number, file in enumerate(self.plan.files)]
            return True
        last, self._round_from = self._units[self._round_from :], len(self._units)
        left = [unit for unit in last if not self.over[unit.number].exhausted]
        for number, unit in enumerate(left, len(self._units)):
            row = self.over[unit.number].row
            self._units.append(self._unit(number, (unit.file, unit.size), row, 2 * unit.quota))
        return bool(left)

    def _unit(self, number: int, file: tuple[str, int], row: int, quota: int) -> Unit:
        plan = self.plan
        return Unit(number, self.folder, plan.origin, *file, plan.column, row, quota, plan.split, plan.val_fraction)

    def report(self, unit: Unit, progress: Progress) -> None:
        """A running unit is over."""
        self.running -= 1
        self.over[unit.number] = progress

    def pieces(self) -> list[finishing.Piece]:
        """What is used of the units."""
        over = [(self._units[number], self.over[number]) for number in sorted(self.over)]
        return finishing.pieces(over, self.plan.split, self.plan.goal)


def _make(target: Path, plan: Plan, processes: int, arguments: Sequence[str]) -> list[Prepared]:
    missing = [corpus for corpus in plan.corpora if not (target / corpus.name).is_dir()]
    corpora = {corpus.name: _Corpus(corpus, plan.folder / corpus.name) for corpus in missing}
    if corpora:
        _fill(corpora, plan, processes)
        facts = plan.facts()
        for corpus in corpora.values():
            _finish(target, corpus, plan, facts)
    made = [_prepared(target / corpus.name) for corpus in plan.corpora]
    _copy_tokenizer(plan.folder, target)
    replace_text(target / orders.PLAN, (plan.folder / orders.PLAN).read_text(encoding="utf-8"))
    record = {
        "settings": plan.settings,
        "corpora": [corpus.name for corpus in plan.corpora],
        "tokenizer_sha256": file_digest(target / TOKENIZER),
        "arguments": list(arguments),
    }
    replace_text(target / RECORD, json.dumps(record, indent=1))
    return made


def _prepared(folder: Path) -> Prepared:
    """What the index of a corpus folder says."""
    index = read_index(folder)
    tokens, documents = ({split: entry[key] for split, entry in index["splits"].items()} for key in _COUNTED)
    made_from = index["made_from"]
    left_out = made_from["documents_removed"], made_from["rows_empty"]
    return Prepared(index["corpus"], made_from["asked_tokens"], tokens, documents, *left_out)


def _fill(corpora: dict[str, _Corpus], plan: Plan, processes: int) -> None:
    """Lets workers fill units until every corpus has what it needs, or no more text."""
    workers = min(processes, sum(len(corpus.plan.files) for corpus in corpora.values()))
    kit = Kit(plan.tokenizer, plan.facts(), plan.ngrams, threads=max(1, processes // workers))
    by_folder = {corpus.folder: corpus for corpus in corpora.values()}
    ready = [unit for unit in (_neediest(corpora) for _ in range(workers)) if unit]
    if not ready:
        return
    total = sum(corpus.plan.goal for corpus in corpora.values())
    begun = sum(progress_of(unit).tokens[unit.split] for unit in ready)
    with (
        Meter("preparing", total, unit="tokens", done=total - _missing(corpora) + begun) as meter,
        Workforce(workers, kit) as workforce,
    ):
        while True:
            while workforce.has_idle and (unit := ready.pop() if ready else _neediest(corpora)):
                workforce.give(unit)
            if not workforce.is_busy:
                return
            for unit, tokens, over in workforce.reports():
                meter.advance(tokens)
                if over:
                    by_folder[unit.folder].report(unit, over)


def _missing(corpora: dict[str, _Corpus]) -> int:
    """Tokens that units which are not over have to give."""
    done = {c: sum(p.tokens[c.plan.split] for p in c.over.values()) for c in corpora.values()}
    return sum(max(corpus.plan.goal - tokens, 0) for corpus, tokens in done.items())


def _neediest(corpora: dict[str, _Corpus]) -> Unit | None:
    """The next unit of the corpus that lacks the most tokens."""
    for corpus in sorted(corpora.values(), key=lambda corpus: -corpus.missing):
        if unit := corpus.next():
            return unit
    return None


def _finish(target: Path, corpus: _Corpus, plan: Plan, facts: Any) -> None:
    used, asked = corpus.pieces(), corpus.plan
    made_from = {
        "asked_tokens": asked.goal,
        "source": asked.origin.repo or plan.settings["corpora"][asked.name]["repo"] or asked.name,
        "revision": asked.origin.revision,
        "column": asked.column,
        "files": len(dict.fromkeys(piece.unit.file for piece in used)),
        "listing_sha256": fingerprint(asked.files),
        "val_fraction": asked.val_fraction,
        "decontaminated_by": plan.settings["decontaminate"],
        "documents_removed": sum(piece.progress.removed for piece in used),
        "rows_empty": sum(piece.empty for piece in used),
    }
    finishing.finish(target / asked.name, plan.folder / f"{asked.name}.shards", asked.name, used, facts, made_from)
    there = _prepared(target / asked.name).tokens[asked.split]
    if there < asked.goal:
        log.warning(
            "%s has no more than %d tokens, %.0f %% of the %d asked for%s", asked.name, there,
            100 * there / asked.goal, asked.goal, ": training repeats it" * (asked.split == "train"),
        )  # fmt: skip
