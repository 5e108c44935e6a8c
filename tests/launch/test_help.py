"""What a user sees without running anything."""

import re

import pytest

from lightning_opt.launch import main


def test_help_imports_nothing_heavy_and_says_what_there_is(train_py, repository):
    done = train_py("--help")
    assert done.code == 0
    assert "heavy: []" in done.out
    for group in ("optimizer", "model", "data", "schedule", "scale", "experiment"):
        options = sorted(file.stem for file in (repository / "conf" / group).glob("*.yaml"))
        assert f"{group}: {', '.join(options)}\n" in done.out
    for words in (
        "trainer.max_steps=",
        "max_tokens",
        "max_epochs",
        "scale=1x",
        "Exit codes: 0 finished",
        "130 interrupted",
        "on_failure=continue",
        "jobs_per_device=",
        "hydra.sweep.dir=",
        "hydra/launcher=processes",
        "pip install -c constraints.txt -e '.[run,launchers]'",
        "python -m recipes.report SWEEP",
        "--compare",
        "all jobs at once on this machine",
        "python train.py model=moe_nano",
        "callbacks.sample_scores.every_n_steps=100",
        "python -m recipes.prepare_data data=dclm_starcoder_proofpile",
        "python -m recipes.evaluate RUN --suite full",
    ):
        assert words in done.out


def test_every_example_in_help_is_a_right_command(train_py, jobs, tmp_path):
    (tmp_path / "my_texts").mkdir()
    (tmp_path / "my_texts" / "a.txt").write_text("some text\n" * 100)
    examples = re.findall(r"^ +python train\.py ?(\S.*?)?(?:  +\S.*)?$", train_py("--help").out, re.MULTILINE)
    assert len(examples) >= 8
    for example in examples:
        if "my_model" not in example:  # that one needs a model
            basic = ["hydra/launcher=basic"] if "-m" in example.split() else []
            assert main([*example.split(), *basic]) == 0, example
    assert len(jobs) == len(examples) - 1 + 5 + 9  # a grid of 6, a descent of two cells with 5 jobs each


def test_completion_completes(train_py):
    done = train_py("-sc", "query=bash", COMP_LINE="python train.py optimizer=", COMP_POINT="26")
    assert "optimizer=lion" in done.out


def test_showing_the_configuration_takes_new_keys_too(train_py):
    done = train_py("--cfg", "job", "--package", "callbacks", "callbacks.mine._target_=builtins.dict")
    assert done.code == 0, done.err
    assert "mine:\n  _target_: builtins.dict\n" in done.out


@pytest.mark.parametrize("flag", [["--cfg", "job"], ["--info", "defaults-tree"], ["--hydra-help"], ["--version"]])
def test_hydras_own_flags_work(train_py, tmp_path, flag):
    done = train_py(*flag)
    assert done.code == 0, done.err
    assert "heavy: []" in done.out
    assert list(tmp_path.iterdir()) == []
