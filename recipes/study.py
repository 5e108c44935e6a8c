"""Which optimizer for this model and budget? Each is tuned on its own, then compared at the end of its schedule.

A live study trains, in runs of train.py that are its only ledger: stop it whenever you like, the same command goes on.
    python -m recipes.study optimizers=[adamw,lion,muon] model=pico scales=[1x,2x] budget=12 seeds=3
    python -m recipes.study optimizers=[adamw,lion] models=[femto,pico] search=rate threshold=auto
    python -m recipes.study optimizers=[adamw,muon] model=pico search=[rate,decay] 'budget={runs:12,seconds:7200}'
    python -m recipes.study optimizers=[adamw,muon] model=nano evaluation=mini jobs_per_device=2 trainer.num_threads=1
    python -m recipes.study settings=my_study.yaml         # conf/study.yaml says what can stand in it
    ... dry_run=true       how many runs and core-seconds it takes at most; runs nothing
    ... status=true        how far it is; runs nothing
    ... only=[lion]        just these optimizers' runs now; stop_after=3600 starts nothing more after an hour
Words that are no field of conf/study.yaml go to every run: data=files data.path=my_texts trainer=gpu.

A replay analyses published results again, or those of an earlier study; it trains nothing:
    python -m recipes.study results=results.csv
    python -m recipes.study results=results.csv out=verdict fit=[1,16] sigma=2e-3 tuned=tuned_hparams.yaml

In out=FOLDER (runs/study/NAME): report.html, report.md, verdict.csv, speedups.csv, laws.csv, results.csv. The method
and how to read the verdict: docs/study.md. Exit codes: 0 finished (or out of time), 1 a run failed for good, 2 wrong
configuration, 130 interrupted, 143 preempted.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_opt.job.signals import Terminated, terminable
from lightning_opt.plan import ConfigError, closest, one_of
from lightning_opt.plan.errors import show
from lightning_opt.plan.secrets import guarding

if TYPE_CHECKING:
    from lightning_opt.study.cells import Trial
    from lightning_opt.study.phases import Standing

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
SPELLED = {
    "model": "models",
    "optimizer": "optimizers",
    "scale": "scales",
    "evaluation": "final_evaluation",
    "tuned": "tuned_file",
}
"""Words that would read as groups of train.py."""

_OF_PARTS = ("budget", "reduced_budget", "search", "scales", "start", "space")  # budget.runs=12
_PATHS = ("results", "out", "tuned", "tuned_file")  # whose commas and signs are no grammar
_REPLAYED = ("results", "out", "name", "baseline", "fit", "sigma", "tuned_file", "near")
_FLAGS = {"--dry-run": "dry_run=true", "--status": "status=true"}


def fields() -> list[str]:
    """The words that are the study's own."""
    import yaml

    own = yaml.safe_load((CONF / "study.yaml").read_text(encoding="utf-8"))
    return ["settings", *SPELLED, *own]


def sorted_out(words: Sequence[str]) -> tuple[list[str], list[str], Path | None]:
    """The study's own words, those for every run, and the file of settings.

    Raises:
        ConfigError: a word is neither, as far as its name tells.
    """
    from lightning_opt.launch.resolve import quoted

    known, own, others, file = fields(), [], [], None
    for word in (_FLAGS.get(word, word) for word in words):
        key, sign, value = word.partition("=")
        if word.startswith("-"):
            raise ConfigError(word, True, f"is no option: there are {', '.join(_FLAGS)}, all else is key=value")
        if key == "settings":
            file = Path(value)
        elif sign and (key in known or key.partition(".")[0] in _OF_PARTS):
            plain = quoted(value) if key in _PATHS and value != "null" else value
            own.append(f"{SPELLED.get(key, key)}={plain}")
        else:
            others.append(word)
    return own, others, file


def settings_of(words: Sequence[str], file: Path | None = None) -> dict[str, Any]:
    """The fields of conf/study.yaml, a file's on top and a command line's on top of these, names found right.

    Raises:
        ConfigError: a name or the file is wrong.
    """
    from lightning_opt.launch import Composer, compose_checked, plain_config

    try:
        with Composer(name="study") as composer:
            plain, said = (plain_config(compose_checked(composer, lines)) for lines in ([], words))
    except TypeError as error:  # OmegaConf: a map on top of a list
        raise ConfigError("command line", " ".join(words), " ".join(str(error).split())) from None
    held = {} if file is None else _held(file, plain)
    mine = {word.partition("=")[0].partition(".")[0] for word in words}
    return {**plain, **held, **{name: said[name] for name in mine}}


def _held(file: Path, plain: Mapping[str, Any]) -> dict[str, Any]:
    """A file of settings; its grids replace those of the same names."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        held = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        why = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ConfigError("settings", str(file), f"must be a YAML file that can be read ({why})") from None
    if not isinstance(held, dict):
        raise ConfigError("settings", str(file), "must be a YAML file of fields as in conf/study.yaml")
    held = {SPELLED.get(str(name), str(name)): value for name, value in held.items()}
    for name, value in held.items():
        if name not in plain:
            raise ConfigError(f"settings.{name}", show(value), one_of(name, plain))
    space = held.get("space") or {}
    grids = {name: {**plain["space"].get(name, {}), **space.get(name, {})} for name in {**plain["space"], **space}}
    return {**held, "space": grids}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a study, or analyses results; answers an exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        return 0 if words else 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        with terminable(), guarding(dict(word.partition("=")[::2] for word in words)):
            return _main(words)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    except Terminated as stop:
        print(f"stopped by {stop.name}; the same command goes on where it was", file=sys.stderr)
        return 143


def _main(words: Sequence[str]) -> int:
    own, others, file = sorted_out(words)
    settings = settings_of(own, file)
    if settings["results"] is None:
        return live(settings, others, words)
    for word in others:
        key, _, value = word.partition("=")
        raise ConfigError(key, value, one_of(key, fields()))
    for word in own:
        key, _, value = word.partition("=")
        if key not in _REPLAYED:
            raise ConfigError(key, value, f"is of live runs; results=FILE trains nothing, takes {', '.join(_REPLAYED)}")
    return replayed(settings, words)


def fit_of(settings: Mapping[str, Any], default: tuple[float, float] | None) -> tuple[float, float] | None:
    """The scales of the baseline's law; None: all.

    Raises:
        ConfigError: it is neither two numbers nor ``all``.
    """
    fit = settings["fit"]
    if fit is None or fit == "all":
        return default if fit is None else None
    numbers = isinstance(fit, list) and all(isinstance(end, int | float) for end in fit)
    if not numbers or len(fit) != 2 or not 0 < fit[0] <= fit[1]:
        raise ConfigError("fit", fit, "must be the lowest and the highest scale, as [1,8], or all")
    return float(fit[0]), float(fit[1])


def sigma_of(settings: Mapping[str, Any]) -> float | None:
    """A given spread between seeds; None where it is to be measured.

    Raises:
        ConfigError: it is no number above 0.
    """
    sigma = settings["sigma"]
    if sigma is None or sigma == "pooled":
        return None
    if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 < sigma < math.inf:
        raise ConfigError("sigma", sigma, "must be a number > 0 (nats), or pooled: from repeated seeds")
    return float(sigma)


def near_of(settings: Mapping[str, Any]) -> float | None:
    """How far near-best configurations reach above the best, nats; None where it is not given.

    Raises:
        ConfigError: it is no number of 0 or more.
    """
    near = settings["near"]
    if near is None:
        return None
    if isinstance(near, bool) or not isinstance(near, int | float) or not 0 <= near < math.inf:
        raise ConfigError("near", near, "must be a number >= 0 (nats)")
    return float(near)


def folder_of(settings: Mapping[str, Any], default: str) -> Path:
    """Where the study's files go.

    Raises:
        ConfigError: a file is in the way.
    """
    folder = Path(settings["out"] or Path("runs", "study", settings["name"] or default)).absolute()
    if not next(path for path in (folder, *folder.parents) if path.exists()).is_dir():
        raise ConfigError("out", str(folder), "must be a folder, or a path where one can be made")
    return folder


def replayed(settings: Mapping[str, Any], words: Sequence[str]) -> int:
    """Analyses a table of results and writes the verdict."""
    from lightning_opt.study.replay import replay
    from lightning_opt.study.sensitivity import NEAR

    file = Path(settings["results"])
    sigma = sigma_of(settings) if settings["sigma"] is not None else 3e-3
    out, tuned = folder_of(settings, file.stem), settings["tuned_file"]
    near = near_of(settings)
    found = replay(
        file,
        out,
        baseline=str(settings["baseline"]),
        fit=fit_of(settings, (1, 8)),
        sigma=sigma,
        tuned=tuned,
        near=NEAR if near is None else near,
    )
    from lightning_opt.reports.study import write  # draws: only once the table is found right
    from recipes import studying

    commands = [("All of this again", studying.command(words))]
    paths = write(out, found.results, found.speedups, found.laws, {}, {**found.facts, "commands": commands})
    print(f"sigma {found.facts['sigma']:g} nats ({found.facts['sigma_origin']}), fit over {found.facts['fit']}")
    for note in found.facts.get("notes", ()):
        print(note)
    studying.say_paths([*found.paths, *paths])
    return 0


def live(settings: Mapping[str, Any], words: Sequence[str], asked: Sequence[str]) -> int:
    """Runs a study, or says how it stands."""
    from lightning_opt.launch import Checker, Composer
    from lightning_opt.study.harvest import check_same_data
    from lightning_opt.study.phases import drive
    from recipes import studying
    from recipes.study_design import OF_THE_SWEEP, count, design_of, names

    judged = {"fit": fit_of(settings, None), "sigma": sigma_of(settings), "baseline": settings["baseline"]}
    only = frozenset() if settings["only"] is None else frozenset(names(settings, "only"))
    stop_after = settings["stop_after"] and count("stop_after", settings["stop_after"])
    shared = [word for word in words if OF_THE_SWEEP.fullmatch(word.lstrip("+~").partition("=")[0])]
    with Composer() as composer:
        _check_names(words, composer)
        checker = Checker(composer)
        design = design_of(settings, words, checker)
        config = checker.job([*next(iter(design.plans.values())).words, *shared]).config
    for name in only - {*design.optimizers}:
        raise ConfigError("only", name, one_of(name, design.optimizers))
    out = folder_of(settings, "-".join(names(settings, "models")))
    about = studying.About(design, out / "runs", config["jobs_per_device"], float(settings["flops_per_second"]))
    if settings["status"]:
        about.show()
        return 0
    if settings["dry_run"]:
        print("\n".join(about.plan_lines()))
        return 0
    line = ["-m", "recipes.study", *asked]
    waves = studying.Waves(design, out / "runs", command=line, shared=shared, stop_after=stop_after)

    def tell(standing: Standing, wave: Sequence[Trial]) -> None:
        check_same_data(design, standing, about.ledger())
        about.show()

    with studying.Progress(about):
        code = drive(design, about.ledger, waves, only=only, tell=tell)
    if code in (130, 143):
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return code
    if code == waves.OUT_OF_TIME:
        print("out of time (stop_after); the same command goes on where it was")
    studying.conclude(design, out, **judged, asked=asked)
    return max(code, 0)


def _check_names(words: Sequence[str], composer: Any) -> None:
    """A misspelt field of the study's must not be looked for among those of train.py."""
    import yaml

    theirs = {*composer.groups, *yaml.safe_load((CONF / "train.yaml").read_text(encoding="utf-8"))}
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        plain = key.partition(".")[0].partition("/")[0]
        if plain not in theirs and plain != "hydra" and (near := closest(plain, [*fields(), *theirs])):
            raise ConfigError(key, word.partition("=")[2], f"no such field; did you mean {near}?")


if __name__ == "__main__":
    sys.exit(main())
