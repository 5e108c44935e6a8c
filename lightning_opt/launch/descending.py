"""``hydra/sweeper=coordinate_descent``: one swept value at a time around the best so far, each cell on its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_opt.launch.preflight import Checker, check_listed
from lightning_opt.launch.searching import Point
from lightning_opt.launch.swept import Swept, texts_of, value_of_text
from lightning_opt.plan import ConfigError
from lightning_opt.study.descent import Descent
from lightning_opt.study.space import Axis, Space, canonical, changed_axes


@dataclass
class _Cell:
    """One choice of every swept group, with a descent of its own.

    Attributes:
        choices: the swept group choices, as overrides.
        lines: all overrides but those of the axes.
        descent: over the axes.
        said: how many accepted steps were told to people.
    """

    choices: tuple[str, ...]
    lines: tuple[str, ...]
    descent: Descent
    said: int = 0

    @property
    def label(self) -> str:
        return " ".join(self.choices)


def decider(
    checker: Checker, overrides: Sequence[Override], options: Mapping[str, Any]
) -> tuple[CoordinateDescent, list[str]]:
    """Reads the command of a descent.

    Args:
        checker: composes the cells.
        overrides: of the command.
        options: the sweeper's: ``threshold`` (nats per token) and ``reach``.

    Returns:
        What decides, and the seeds' overrides.

    Raises:
        ConfigError: nothing is swept that could be an axis, or an option is wrong.
    """
    check_listed(overrides, "a descent")
    composer = checker.composer
    swept = Swept.of(composer, overrides)
    if not swept.fields:
        why = "needs values to go through: sweep one, optimizer.lr_scale=0.5,1,2 say; group choices are cells beside it"
        raise ConfigError("hydra/sweeper", "coordinate_descent", why)
    texts = {
        key: {canonical(value_of_text(composer, key, text)): text for text in texts_of(override)}
        for key, override in swept.fields.items()
    }
    values = {key: [value_of_text(composer, key, text) for text in texts_of(swept.fields[key])] for key in texts}
    reach = options.get("reach")
    if reach is not None and (isinstance(reach, bool) or not isinstance(reach, int) or reach < 1):
        raise ConfigError("hydra.sweeper.reach", reach, "must be a whole number >= 1, or null for every value")
    threshold = options.get("threshold")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < math.inf:
        raise ConfigError("hydra.sweeper.threshold", threshold, "must be a number >= 0, in nats per token")
    space = Space(tuple(Axis(key, tuple(listed), reach) for key, listed in values.items()))
    cells = []
    choices = ([f"{key}={text}" for text in texts_of(override)] for key, override in swept.groups.items())
    for chosen in itertools.product(*choices):
        lines = (*swept.fixed, *chosen)
        cfg = checker.compose(composer.parse(lines), sweep=True)
        start = {key: _start(cfg, key.lstrip("+"), listed) for key, listed in values.items()}
        cells.append(_Cell(chosen, lines, Descent(space, start, threshold=threshold)))
    return CoordinateDescent(cells, texts, threshold), swept.seeds


def _start(cfg: DictConfig, key: str, listed: Sequence[Any]) -> Any:
    """The listed value that the configuration has anyhow, else the first."""
    try:
        own = OmegaConf.select(cfg, key)
    except OmegaConfBaseException:
        own = None
    own = canonical(OmegaConf.to_container(own) if OmegaConf.is_config(own) else own)
    return next((value for value in listed if canonical(value) == own), listed[0])


class CoordinateDescent:
    """Decides by coordinate descent, all cells side by side.

    Args:
        cells: each with a descent that was told nothing yet.
        texts: axis to `canonical` value to how the command writes it.
        threshold: of the descents, nats per token.
    """

    def __init__(self, cells: Sequence[_Cell], texts: Mapping[str, Mapping[str, str]], threshold: float) -> None:
        self._cells, self._texts = list(cells), texts
        self._say: Callable[[str], None] = lambda line: None
        where = f" in each of {len(cells)} cells" if len(cells) > 1 else ""
        self.words = f"coordinate descent over {', '.join(texts)}{where}, taking what gains over {threshold:g} nats"
        self.first = [
            self._point(number, config)
            for number, cell in enumerate(self._cells)
            for config in (cell.descent.start, *cell.descent.space.around(cell.descent.start))
        ]

    def open(self, folder: Path, say: Callable[[str], None]) -> None:
        """Says where each cell starts."""
        self._say = say
        for cell in self._cells:
            say(f"{self._head(cell)}from {self._shown(cell.descent.start)}")

    def ask(self) -> list[Point]:
        """What every cell wants to know next; also says what was accepted."""
        for cell in self._cells:
            self._say_accepted(cell)
        return [self._point(number, config) for number, cell in enumerate(self._cells) for config in cell.descent.ask()]

    def tell(self, point: Point, loss: float | None, refused: str = "") -> None:
        """Tells the point's cell."""
        number, config = point.name
        self._cells[number].descent.tell(config, loss)

    def closing(self) -> list[str]:
        """The best of each cell."""
        lines = []
        for cell in self._cells:
            descent = cell.descent
            if descent.best is None:
                lines.append(f"{self._head(cell)}no configuration has a loss ({descent.told} tried)")
                continue
            found = f"best {self._shown(descent.best)}: loss {descent.loss(descent.best):.4f}"
            near = len(descent.near_best) - 1
            count = f"{descent.told} configurations, {near} more within {descent.near:g} nats of it"
            lines.append(f"{self._head(cell)}{found} ({count})")
        return lines

    def _say_accepted(self, cell: _Cell) -> None:
        for step in cell.descent.accepted[cell.said :]:
            keys = changed_axes(step.before, step.after)
            moves = (f"{key} {self._text(step.before, key)} -> {self._text(step.after, key)}" for key in keys)
            before, after = cell.descent.loss(step.before), cell.descent.loss(step.after)
            was = "diverged" if before is None or math.isinf(before) else f"loss {before:.4f}"
            self._say(f"{self._head(cell)}accepted {', '.join(moves)}: {was} -> {after:.4f}")
        cell.said = len(cell.descent.accepted)

    def _point(self, number: int, config: Mapping[str, Any]) -> Point:
        cell = self._cells[number]
        changed = [f"{key}={self._text(config, key)}" for key in changed_axes(cell.descent.start, config)]
        lines = (*cell.lines, *(f"{key}={self._text(config, key)}" for key in config))
        return Point(
            (number, dict(config)), lines, f"{self._head(cell)}{self._shown(config)}", changed[0] if changed else None
        )

    def _text(self, config: Mapping[str, Any], key: str) -> str:
        return self._texts[key][canonical(config[key])]

    def _shown(self, config: Mapping[str, Any]) -> str:
        return " ".join(f"{key}={self._text(config, key)}" for key in config)

    @staticmethod
    def _head(cell: _Cell) -> str:
        return f"{cell.label}: " if cell.label else ""
