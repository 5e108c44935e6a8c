"""The command line of ours, and lm-eval's own on the same task files."""

from __future__ import annotations

import copy
import html
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_opt.evaluation import evaluate, sandbox
from lightning_opt.evaluation.offline import write_tasks

ISOLATED, WHY = sandbox.available()


def recipe(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recipes.evaluate", *arguments]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def answers_nowhere_else(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/no/such/run"], "must be a run folder with model/"),
        (["some-org/my.model"], "hf download some-org/my.model --local-dir my.model"),
        (["{checkpoint}", "--tasks", "hellasawg"], "did you mean hellaswag?"),
        (["{checkpoint}", "--suite", "ful"], "did you mean full?"),
        (["{checkpoint}", "--suite", "none"], "must be one of full, mini"),
        (["{checkpoint}", "--suite", "full", "--data-dir", "/no/such/folder"], "humaneval.jsonl"),
        (["{checkpoint}", "{checkpoint}", "--out", "README.md"], "must be a folder"),
        (
            ["{checkpoint}", "--out", "README.md/deep", "--tasks", "mmlu"],
            "--out = README.md/deep: must be a folder we",
        ),
        (["{checkpoint}", "--engine", "vllm"], "vllm is not installed"),
        (["{checkpoint}", "--engine-args", "seed"], "name=value"),
        (["{checkpoint}", "--sandbox-seconds", "0"], "seconds a generated program may run"),
        (["{checkpoint}", "--freeze", "x"], "without PATH"),
        (["{checkpoint}", "--report-only", "--out", "/no/such/folder"], "scored before"),
        ([], "at least one"),
        (["{checkpoint}", "{checkpoint}", "--export-tasks", "x"], "one PATH"),
    ],
)
def test_wrong_input_is_refused_before_torch(
    repository: Path, checkpoint: Path, arguments: list[str], said: str
) -> None:
    filled = [argument.format(checkpoint=checkpoint) for argument in arguments]
    code = (
        "import sys; from recipes.evaluate import main; status = main(sys.argv[1:]);"
        "print(sorted({'torch', 'lm_eval', 'transformers'} & set(sys.modules))); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, *filled]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == "[]\n"


def test_help_shows_examples(repository: Path) -> None:
    done = recipe(repository, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "python -m recipes.evaluate ./my-llama --suite full" in done.stdout
    # Every option that an example takes is one that the parser knows and explains.
    usage, _, examples = done.stdout.partition("examples:")
    commands = [line for line in examples.splitlines() if line.strip().startswith("python ")]
    options = {word for line in commands for word in line.split() if word.startswith("--")}
    assert options >= {"--suite", "--data-dir", "--limit", "--tasks", "--out", "--export-tasks"}
    assert all(f"\n  {option} " in usage for option in options)


def test_plain_checkpoint_is_scored_and_kept_without_network(
    repository: Path, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "scores"
    before = sorted(path.name for path in checkpoint.iterdir())
    # An audit hook sees every attempt to reach the network, also one that would fail or be caught.
    code = (
        "import sys\nseen, watched = [], ('socket.connect', 'socket.getaddrinfo')\n"
        "sys.addaudithook(lambda event, _: seen.append(event) if event in watched else None)\n"
        "from recipes.evaluate import main\nstatus = main(sys.argv[1:])\nassert not seen, seen\nsys.exit(status)"
    )
    arguments = [
        str(checkpoint),
        "--no-cache",
        "--limit",
        "8",
        "--max-gen-toks",
        "8",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    online = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False, env=online)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (results,) = (json.loads(path.read_text()) for path in out.glob("checkpoint0-*/results.json"))
    assert (out / "scores.html").is_file()
    assert results["n-samples"]["hellaswag"]["effective"] == 8
    assert f"{results['results']['hellaswag']['acc_norm,none']:.4f}" in done.stdout
    assert "not comparable" in " ".join(done.stdout.split())
    assert sorted(path.name for path in checkpoint.iterdir()) == before


def test_run_folder_gets_its_results(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.syspath_prepend(str(repository))
    from recipes import evaluate as door

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(checkpoint)
    refreshed = []
    monkeypatch.setattr(door, "refresh", refreshed.append)
    assert door.main([str(tmp_path / "run"), "--tasks", "mmlu", "--limit", "6", "--device", "cpu"]) == 0
    results = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())
    assert results["summary"]["mmlu"]["n"] == 6
    assert refreshed == [tmp_path / "run"]


@pytest.mark.parametrize(("device", "why"), [("cuda:7000", "cuda|CUDA|ordinal"), ("cupu", "Expected one of")])
def test_a_device_that_is_not_here_is_one_line(
    checkpoint: Path, capsys: pytest.CaptureFixture, device: str, why: str
) -> None:
    from recipes.evaluate import main

    assert main([str(checkpoint), "--device", device]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"--device = {device}: must be auto, cpu or an accelerator that is here")
    assert re.search(why, said)
    assert said.count("\n") == 1


def test_a_task_without_a_score_is_told_and_is_no_success(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The run's earlier results stay where nothing was scored, and no page is made of them."""
    from lightning_opt.evaluation import score
    from recipes import evaluate as door

    run, out = tmp_path / ("a_long_name_" * 8), tmp_path / "out"
    run.mkdir()
    (run / "model").symlink_to(checkpoint)
    monkeypatch.setattr(door, "refresh", lambda _: None)
    why = "no sandbox for generated code: " + "no user namespaces here, and many words about it " * 2
    monkeypatch.setattr(score, "available", lambda: (False, why.strip()))
    arguments = [str(run), "--limit", "4", "--device", "cpu", "--out", str(out), "--tasks"]
    assert door.main([*arguments, "mmlu,humaneval"]) == 1
    said = capsys.readouterr().out
    assert f"{run}: humaneval skipped: {why.strip()}" in said.splitlines()
    assert (out / "scores.html").is_file()
    kept = (run / "evaluation" / "results.json").read_bytes()
    (out / "scores.html").unlink()
    assert door.main([*arguments, "humaneval"]) == 1
    assert (run / "evaluation" / "results.json").read_bytes() == kept
    assert not (out / "scores.html").exists()


def test_a_hub_that_does_not_answer_is_told_before_torch(repository: Path, checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from recipes.evaluate import main; status = main(sys.argv[1:]);"
        "print(sorted({'torch', 'lm_eval', 'transformers'} & set(sys.modules))); sys.exit(status)"
    )
    online = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    online |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_DATASETS_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code, str(checkpoint), "--suite", "full", "--tasks", "piqa,boolq"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False, env=online)
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first.startswith("piqa: baber/piqa is not in the cache and the hub does not answer")
    assert second.startswith("boolq: aps/super_glue")
    assert done.stdout == "[]\n"


def test_run_that_has_no_model_yet_is_named(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: run\n")
    done = recipe(repository, str(tmp_path))
    assert done.returncode == 2
    assert "has no model/ yet" in done.stderr
    assert done.stderr.count("\n") == 1


def test_table_names_what_stands_beside_no_published_score(capsys: pytest.CaptureFixture, repository: Path) -> None:
    from recipes.evaluate import show

    entry = {"metric": "acc", "value": 0.5, "stderr": 0.1, "n": 10, "shots": 0, "chance": 0.25, "truncated": 0}
    skipped = {"skipped": "not in evaluation.tasks"}
    scores = {"hellaswag": entry | {"comparable": True}, "humaneval": skipped}
    scores["mmlu"] = entry | {"comparable": False, "why_not": "10 of 14042 documents"}
    show("x", {"suite": "full", "comparable": False, **scores})
    said = " ".join(capsys.readouterr().out.split())
    assert "mmlu: 10 of 14042 documents" in said
    assert "skipped" not in said
    assert "hellaswag:" not in said


def test_export_prints_a_command_and_needs_no_torch(repository: Path, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--export-tasks", str(tmp_path / "tasks"), "--tasks", "mmlu,humaneval", "--sandbox-seconds", "2.5"]
    done = recipe(repository, str(checkpoint), *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("lm-eval run --model hf")
    assert "--confirm_run_unsafe_code" in done.stdout
    assert (tmp_path / "tasks" / "humaneval.yaml").read_text().count("max_gen_toks: 64") == 1
    assert "seconds: 2.5" in (tmp_path / "tasks" / "humaneval.yaml").read_text()


def test_hub_tasks_keep_the_stock_source(tmp_path: Path) -> None:
    write_tasks(tmp_path, suite="full", tasks=["hellaswag", "mmlu", "humaneval"], context_length=2048)
    text = "".join(path.read_text() for path in tmp_path.glob("*.yaml"))
    assert "custom_dataset" not in text
    assert len(list(tmp_path.glob("mmlu_*.yaml"))) == 57
    write_tasks(tmp_path / "few", suite="full", tasks=["mmlu"], context_length=2048, limit=57)
    anatomy = (tmp_path / "few" / "mmlu_anatomy.yaml").read_text()
    assert '"take": {"test": 1}' in anatomy
    assert '"hub": ["cais/mmlu", "anatomy"]' in anatomy


@pytest.mark.parametrize("limit", [5_700, 9_000, 14_041, 14_042])
def test_a_large_limit_of_hub_mmlu_takes_that_many(tmp_path: Path, limit: int) -> None:
    write_tasks(tmp_path, suite="full", tasks=["mmlu"], context_length=2048, limit=limit)
    found = [re.search(r'"test": (\d+)', path.read_text()) for path in tmp_path.glob("mmlu_*.yaml")]
    assert sum(int(match[1]) for match in found) == limit


@pytest.mark.slow
@pytest.mark.skipif(not ISOLATED, reason=WHY)
@pytest.mark.parametrize("suite", ["mini", "full"])
def test_lm_evals_own_command_line_gives_the_same_numbers(
    suite: str, model: Any, tokenizer: Any, checkpoint: Path, tmp_path: Path, repository: Path, shared_data: Path
) -> None:
    config = {"suite": suite, "batch_size": 16, "max_gen_toks": 16}
    config |= {"data_dir": str(shared_data / "eval"), "limit": 50} if suite == "full" else {}
    evaluate(model, tokenizer, config, tmp_path / "evaluation")
    ours = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "16",
        "--model_args", f"pretrained={checkpoint},dtype=float32", "--tasks", "hellaswag,mmlu,humaneval",
        "--include_path", str(tmp_path / "evaluation" / "tasks"), "--confirm_run_unsafe_code",
        "--output_path", str(tmp_path / "cli.json"),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(repository), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(next(tmp_path.glob("cli*.json")).read_text())
    assert theirs["n-samples"] == ours["n-samples"]
    assert theirs["n-shot"] == ours["n-shot"]
    assert theirs["results"].keys() == ours["results"].keys()
    for name, scores in theirs["results"].items():
        for key, value in scores.items():
            if isinstance(value, float):
                assert ours["results"][name][key] == pytest.approx(value, abs=1e-12), (name, key)


def test_several_models_give_one_page_and_a_broken_one_does_not_lose_the_others(
    checkpoint: Path,
    make_model: Any,
    tokenizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    repository: Path,
) -> None:
    monkeypatch.syspath_prepend(str(repository))
    from recipes import evaluate as door

    other, broken, run = tmp_path / "other", tmp_path / "broken", tmp_path / "run"
    make_model(seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    shutil.copytree(other, broken)
    (broken / "model.safetensors").write_bytes(b"no tensors")
    run.mkdir()
    (run / "model").symlink_to(checkpoint)
    monkeypatch.setattr(door, "refresh", lambda _: None)
    endless = tmp_path / "endless"  # a ConfigError of its own: no token to start from
    shutil.copytree(other, endless)
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    bare.save_pretrained(endless)
    paths = [str(run), str(other), str(broken), str(endless)]
    arguments = ["--tasks", "mmlu", "--limit", "8", "--device", "cpu", "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert door.main([*paths, *arguments]) == 1
    said = capsys.readouterr()
    first, second = said.err.splitlines()
    assert first.startswith(f"{broken}: ")
    assert second.startswith(f"{endless}: data.tokenizer = ")
    assert str(tmp_path / "out" / "scores.html") in said.out
    rows = (tmp_path / "out" / "scores.csv").read_text().splitlines()
    assert sum(row.startswith("score,mmlu,,acc,") for row in rows) == 2
    assert sum(row.startswith("difference,mmlu,,acc,run,other,") for row in rows) == 1
    assert list((tmp_path / "out").glob("other-*/documents.jsonl.gz"))
    assert door.main([*paths[:2], "--report-only", "--out", str(tmp_path / "out")]) == 0


def stand_ins(tmp_path: Path, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Checkpoints by the look of their folders; that of "b" fails, all others have the same score."""
    from recipes import evaluate as door

    def score(folder: Path, place: Path, config: dict[str, Any], device: str) -> dict[str, Any]:
        if folder.parent.name == "b":
            raise OSError("no tensors")
        entry = {"metric": "acc", "value": 0.5, "stderr": 0.1, "n": 10, "shots": 0, "chance": 0.25, "truncated": 0}
        block = {"suite": "full", "comparable": True, "mmlu": entry | {"comparable": True}}
        place.mkdir(parents=True)
        (place / "results.json").write_text(json.dumps({"summary": block}))
        return block

    monkeypatch.setattr(door, "score", score)
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            (tmp_path / name / file).write_text("{}")
    return [str(tmp_path / name) for name in names]


def test_a_failure_does_not_move_the_results_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Two folders of one name: where the scores of the first lie does not hang on the second, nor on who is asked."""
    from recipes import evaluate as door

    paths, out = stand_ins(tmp_path, ("a/x", "b/x", "c/y"), monkeypatch), tmp_path / "out"
    assert door.main([*paths, "--tasks", "mmlu", "--device", "cpu", "--out", str(out)]) == 1
    assert capsys.readouterr().err == f"{paths[1]}: OSError: no tensors\n"
    assert _scored(out) == ["x", "y"]
    for asked, labels in ((paths[::2], ["x", "y"]), (paths[:1], ["x"]), (paths[2:], ["y"])):
        assert door.main([*asked, "--report-only", "--out", str(out)]) == 0
        assert _scored(out) == labels
    capsys.readouterr()
    assert door.main([*paths[:2], "--report-only", "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"--report-only = {paths[1]}: must have been scored before\n"


def _scored(out: Path) -> list[str]:
    rows = [row.split(",") for row in (out / "scores.csv").read_text().splitlines()]
    return [row[4] for row in rows if row[0] == "score"]


def test_any_folder_with_results_goes_on_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Agents have results and no checkpoint; a run keeps its own in evaluation/. The page's command draws it again."""
    from recipes import evaluate as door

    entry = {"metric": "pass^1", "value": 0.5, "stderr": 0.1, "n": 10, "shots": 0, "chance": None, "comparable": True}
    block = {"suite": "agents", "trials": 4, "comparable": True, "tau2_retail": entry}
    agent, run, out = tmp_path / "my agent", tmp_path / "run", tmp_path / "out"
    for folder in (agent, run / "evaluation"):
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"suite": "agents", "summary": block}))
    assert door.main([str(agent), str(run), "--report-only", "--out", str(out)]) == 0
    text = (out / "scores.html").read_text()
    assert "tau2 retail" in text
    assert "could not be drawn" not in text
    assert _scored(out) == ["my agent", "run"]
    again = html.unescape(re.search(r"python -m recipes\.evaluate [^<]*", text)[0])
    (out / "scores.html").unlink()
    assert door.main(shlex.split(again)[3:]) == 0
    assert (out / "scores.html").read_text() == text


@pytest.mark.parametrize("text", ["", '{"summ', "[]", "{}"])
def test_results_that_are_cut_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture, text: str) -> None:
    from recipes.evaluate import main

    (tmp_path / "results.json").write_text(text)
    assert main([str(tmp_path), "--report-only", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert re.match(r"--report-only = \S+/results\.json: must be whole", said)
    assert said.count("\n") == 1


def test_weights_that_cannot_be_read_are_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from recipes.evaluate import main

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "model.safetensors").write_bytes(b"no tensors")
    assert main([str(broken), "--tasks", "mmlu", "--device", "cpu", "--no-cache"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"PATH = {broken}: must be whole, and transformers cannot load it (")
    assert said.count("\n") == 1


def test_everything_wrong_with_the_paths_is_listed(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, repository: Path
) -> None:
    from recipes.evaluate import main

    (tmp_path / "bare").mkdir()
    shutil.copy(checkpoint / "config.json", tmp_path / "bare")
    assert main([str(tmp_path / "bare"), str(checkpoint), "/no/such/run"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"PATH = {tmp_path / 'bare'}: must also hold weights and a tokenizer"
    assert "/no/such/run" in second


def test_words_of_the_command_line() -> None:
    from recipes.evaluate_asked import engine_arguments, parse, settings

    assert engine_arguments("tensor_parallel_size=8,dtype=auto,enforce_eager=true") == {
        "tensor_parallel_size": 8,
        "dtype": "auto",
        "enforce_eager": True,
    }
    assert settings(parse("", ["x"]))["suite"] == "mini"
    assert settings(parse("", ["x"]))["cache"].endswith("lightning_opt/answers")
    assert settings(parse("", ["x", "--no-cache"]))["cache"] is None
    assert settings(parse("", ["x"]))["sandbox_seconds"] == 5.0
    assert settings(parse("", ["x", "--sandbox-seconds", "2.5"]))["sandbox_seconds"] == 2.5
