"""From the command line to an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.types import TaskFunction
from omegaconf import DictConfig

from lightning_opt.job.signals import Terminated, terminable
from lightning_opt.launch.compose import CONF, CONFIG_NAME, Composer
from lightning_opt.launch.refusing import give_up, refuse
from lightning_opt.plan import ConfigError, place
from lightning_opt.plan.secrets import guarding
from lightning_opt.run_folder import ExitCode


def main(argv: Sequence[str], conf: Path = CONF) -> int:
    """Runs a command of `train.py`.

    Args:
        argv: the arguments, without the program's name.
        conf: folder of configurations.

    Returns:
        Exit code: 0 finished, 1 failed, 2 wrong configuration, 3 diverged, 130 interrupted, 143 preempted. A sweep
        answers 1 if any job failed, else 3 if any diverged, else 0.
    """
    try:
        with terminable(), guarding(dict(word.partition("=")[::2] for word in argv)):
            return _main(argv, conf)
    except ConfigError as error:  # of the environment, which the handlers of signals ask for already
        return refuse(error)
    except (KeyboardInterrupt, Terminated) as stop:
        return give_up(stop)


def _main(argv: Sequence[str], conf: Path) -> int:
    try:
        args = _arguments(argv)
        if args.help or args.hydra_help or args.shell_completion or args.info or args.experimental_rerun:
            return hand_to_hydra(list(argv), _nothing, conf)
        from lightning_opt.launch.preflight import check_command  # not for --help, which should be quick

        with Composer(
            conf, Path(args.config_dir) if args.config_dir else None, args.config_name or CONFIG_NAME
        ) as composer:
            command = check_command(composer, args.overrides, multirun=args.multirun, values=not args.cfg)
    except ConfigError as error:
        return refuse(error)
    if args.cfg:
        return hand_to_hydra([*_flags(args), *command.overrides], _nothing, conf)
    from lightning_opt.launch import task

    def hand_over(overrides: list[str]) -> int:
        return hand_to_hydra([*_flags(args), *overrides], task.run_job, conf)

    if command.swept is None:
        task.begin(command.folder)
        return hand_over(command.overrides) or task.exit_code()
    from lightning_opt.launch.sweep import run_sweep

    try:
        return run_sweep(command, ["train.py", *argv], hand_over)
    except ConfigError as error:
        return refuse(error)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ConfigError("command line", " ".join(argv), f"{message}; see train.py --help")

    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(list(argv))
    if args.cfg and args.multirun:
        raise ConfigError("--cfg", args.cfg, "shows one configuration: leave out -m, and say one value for each field")
    if args.multirun and (starter := place().launcher):
        why = f"a sweep starts its jobs itself: leave {starter} out, trainer.devices=N gives each N processes"
        raise ConfigError("-m", starter, why)
    if args.config_path:
        raise ConfigError("--config-path", args.config_path, "is fixed; add a folder of your own by --config-dir")
    return args


def _flags(args: argparse.Namespace) -> list[str]:
    flags = ["--multirun"] if args.multirun else []
    flags += ["--resolve"] if args.resolve else []
    for name in ("cfg", "package", "config_dir", "config_name"):
        value = getattr(args, name)
        flags += [f"--{name.replace('_', '-')}", value] if value else []
    return flags


def _nothing(cfg: DictConfig) -> None:
    """What Hydra would run after showing help; it never does."""


def hand_to_hydra(argv: list[str], function: TaskFunction, conf: Path = CONF) -> int:
    """Calls `hydra.main` with these arguments; answers an exit code."""
    with _as_command_line(argv):
        try:
            hydra.main(config_path=str(conf), config_name=CONFIG_NAME, version_base="1.3")(function)()
        except SystemExit as stop:
            if isinstance(stop.code, int):
                return stop.code
            return ExitCode.FINISHED if stop.code is None else ExitCode.FAILED
    return ExitCode.FINISHED


@contextmanager
def _as_command_line(argv: list[str]) -> Iterator[None]:
    """Hydra reads `sys.argv` and nothing else."""
    before = sys.argv
    sys.argv = [before[0], *argv]
    try:
        yield
    finally:
        sys.argv = before
