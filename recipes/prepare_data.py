"""Tokenises a data mixture once, into the shards that `train.py data=...` reads.

    python -m recipes.prepare_data data=dclm_starcoder_proofpile tokens=3e9 --dry-run
    python -m recipes.prepare_data data=dclm_starcoder_proofpile tokens=3e9
    python -m recipes.prepare_data data=dclm_starcoder_proofpile tokens=3e9 data.tokenizer.path=openai-community/gpt2
    python -m recipes.prepare_data data=fineweb_edu tokens=1e9 processes=8 data.decontaminate=my_eval_sets

Streams just the tokens asked for, corpus by corpus as their weights say. Stop it whenever you like: the same command
goes on where it was and ends with the same shards, to the byte, on any number of processes; once more, it makes again
what was damaged since. --dry-run (or dry_run=true)
says what would be read, written and taken, and writes nothing. docs/data.md says how to describe another data set.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from lightning_opt.plan import ConfigError, check_data_fields, check_value

_NOT_KEPT = ("data.path=", "processes=", "dry_run=")  # what does not say how the shards of a folder came to be
_OF_THE_MIXTURE = ("data.weights", "data.phases")  # what training has to be told again


def configuration(lines: Sequence[str]) -> dict[str, Any]:
    """The checked configuration of a command line (see conf/prepare.yaml).

    Raises:
        ConfigError: a name or value is wrong.
    """
    from lightning_opt.launch import Composer, compose_checked, plain_config

    with Composer(name="prepare") as composer:
        config = plain_config(compose_checked(composer, lines))
    check_data_fields(config["data"])
    config["processes"] = check_value("prepare.processes", config["processes"], field="processes")
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepares; 0 when the shards can be trained on, 2 when something asked for is wrong, 1 on any other failure."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("lightning_opt").setLevel(logging.INFO)
    from lightning_opt.data.workforce import WorkerLost
    from lightning_opt.plan import HubLost

    try:
        words = ["dry_run=true" if word == "--dry-run" else word for word in arguments]
        for word in words:
            if word.startswith("-"):
                raise ConfigError(word, True, "is no option: there is --dry-run, all else is written key=value")
        return _run(configuration(words), [word for word in words if not word.startswith(_NOT_KEPT)])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (OSError, HubLost, WorkerLost) as error:
        print(f"{error}; the same command goes on where it was", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130


def _run(config: dict[str, Any], arguments: list[str]) -> int:
    from lightning_opt.data import estimating, preparing

    how = {"tokens": config["tokens"], "processes": config["processes"]}
    if config["dry_run"]:
        print(estimating.estimate(config["data"], **how).text())
        return 0
    made = preparing.prepare(config["data"], **how, arguments=arguments)
    for corpus in made:
        removed = f", {corpus.removed:,} documents left out: they share 13 words with an evaluation set"
        empty = f", {corpus.empty:,} rows without text"
        print(
            f"{corpus.name}: {corpus.tokens['train']:,} training and {corpus.tokens['val']:,} validation tokens in "
            f"{sum(corpus.documents.values()):,} documents{removed * bool(corpus.removed)}{empty * bool(corpus.empty)}"
        )
    if not any(corpus.tokens["val"] for corpus in made):
        what = "nothing was held out for validation, which training needs: so little text wants a larger"
        print(f"{what} data.corpora.NAME.val_fraction, or more tokens, and another data.path", file=sys.stderr)
        return 1
    chosen = [word for word in arguments if word.startswith("data=")]  # a file may give itself another name
    words = [*(chosen or [f"data={config['data']['name']}"]), f"data.path={config['data']['path']}"]
    words += [word for word in arguments if word.lstrip("+~").startswith(_OF_THE_MIXTURE)]
    print(f"train on them: {shlex.join(['python', 'train.py', *words])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
