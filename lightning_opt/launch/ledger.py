"""The ledger of a sweep folder as it grows: which jobs it holds, in what they differ, which have no result yet."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from lightning_opt.launch.preflight import Job
from lightning_opt.launch.resolve import quoted, redact
from lightning_opt.run_folder import RunFolder, SweepFolder, SweepJob, config_hash, job_name


class Ledger:
    """Adds jobs to ``sweep.json``.

    Args:
        folder: the sweep's.
        words: the command line that asks for the jobs, after ``python``.
        swept: keys that belong to what differs whatever the jobs are.
    """

    def __init__(self, folder: SweepFolder, words: Sequence[str], swept: Sequence[str] = ()) -> None:
        self.folder, self.swept = folder, tuple(swept)
        self.line = shlex.join(redact(words))

    def add(self, jobs: Sequence[Job]) -> list[SweepJob]:
        """Adds the jobs that are not there yet and works out anew in what all of them differ.

        Returns:
            All jobs of the folder, in order.
        """
        known = {job.config_hash: job for job in self.folder.jobs()}
        asked, names = {}, {}
        for job in jobs:
            of = config_hash(job.config)
            asked[of], names[of] = redact([text.removeprefix("++") for text in job.overrides]), job.config["name"]
        overrides = {of: job.overrides for of, job in known.items()} | asked
        values = {of: dict(value_of(line) for line in lines) for of, lines in overrides.items()}
        keys = list(dict.fromkeys([*self.swept, *(key for row in values.values() for key in row)]))
        swept = [key for key in keys if key in self.swept or len({repr(v.get(key)) for v in values.values()}) > 1]
        found = []
        for of, lines in overrides.items():
            differs = {key: values[of][key] for key in swept if key in values[of]}
            place = known[of].folder if of in known else RunFolder(self.folder.path / job_name(differs, of, names[of]))
            line = self.line if of in asked else known[of].command
            found.append(SweepJob(place, of, lines, differs, line))
        self.folder.write(self.line, swept, found)
        return found

    def left(self, jobs: Sequence[Job]) -> list[list[str]]:
        """The overrides, for Hydra's launcher, of those of these jobs that have no result yet."""
        places = {job.config_hash: job for job in self.folder.jobs() if not job.is_done}
        return [
            [*job.overrides, f"hydra.sweep.subdir={quoted(places[of].folder.path.name)}"]
            for job in jobs
            if (of := config_hash(job.config)) in places
        ]


@functools.cache
def value_of(line: str) -> tuple[str, Any]:
    """An override's key, with its ``~``, and value; remembered, since a search adds to the same jobs many times."""
    one = OverridesParser.create().parse_override(line)
    return f"{'~' if one.is_delete() else ''}{one.key_or_group}", one.value()
