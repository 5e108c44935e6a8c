"""tau2's scores: the recipe against a stand-in of tau2's command line, the arithmetic against enumeration, and, where
LIGHTNING_OPT_TAU2 names the Python of a real tau2 1.x, the same against that.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_endpoint import Script, served

from lightning_opt.evaluation.agents import scores, settings
from lightning_opt.plan import ConfigError
from recipes import evaluate_agent

STANDIN = Path(__file__).parent / "standin_tau2"
AGENT_KEY, OPENAI_KEY = "agent-key-4711-abc", "openai-key-0815-xyz"


def action(name: str, **arguments: Any) -> dict[str, Any]:
    return {"action_id": name, "name": name, "arguments": arguments, "info": None}


def task(number: int, actions: list[dict[str, Any]], assertions: tuple[str, ...] = ()) -> dict[str, Any]:
    told = {"reason_for_call": f"You want thing {number}.", "known_info": f"You are customer {number}.", "domain": "x"}
    wanted = {"actions": actions, "communicate_info": [], "nl_assertions": list(assertions)}
    wanted["reward_basis"] = ["DB", "NL_ASSERTION"]
    scenario = {"persona": None, "instructions": told}
    return {"id": str(number), "user_scenario": scenario, "evaluation_criteria": wanted}


TASKS = [
    task(10, [action("find_user", first_name="Ann"), action("cancel_order", order="#1")]),
    task(11, [action("find_user", first_name="Bo")], ("Agent should be kind.",)),
    task(12, [action("cancel_order", order="#3"), action("cancel_order", order="#4")]),
]


class Desk:
    """A stand-in tau2 and a scripted endpoint; `run` is the command line."""

    def __init__(self, folder: Path, url: str, script: Script) -> None:
        self.folder, self.url, self.script = folder, url, script
        self.out = folder / "scores"

    def run(self, *words: str, own: bool = True) -> int:
        given = [f"url={self.url}", f"tau2={sys.executable}", f"out={self.out}", "trials=2"] if own else []
        sides = [f"{side}={side}" for side in ("user", "judge")] + [f"{s}_url={self.url}" for s in ("user", "judge")]
        return evaluate_agent.main([*words, *(given + sides if own else [])])

    def results(self) -> dict[str, Any]:
        return json.loads((self.out / "results.json").read_text())


def install(folder: Path, name: str, version: str, summary: str) -> Path:
    """What pip leaves of a package beside its code."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n")
    return folder


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    for domain in settings.DOMAINS:
        path = tmp_path / "data" / "tau2" / "domains" / domain / "tasks.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(TASKS))
    site = install(tmp_path / "site", "tau2", "1.0.1", "tau-bench")
    monkeypatch.setenv("PYTHONPATH", f"{STANDIN}{os.pathsep}{site}")
    monkeypatch.setenv("TAU2_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("HOSTED_VLLM_API_KEY", AGENT_KEY)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    script = Script(TASKS)
    with served(script) as url:
        yield Desk(tmp_path, url, script)


def test_gold_actions_score_1_in_both_domains(desk: Desk) -> None:
    assert desk.run("model=gold") == 0
    found = desk.results()
    assert set(found["results"]) == {"tau2_retail", "tau2_airline"}
    for name in found["results"]:
        flat, entry = found["results"][name], found["summary"][name]
        assert flat["pass^1,none"] == flat["pass^2,none"] == flat["tool_call_success,none"] == 1.0
        assert (entry["value"], entry["stderr"], entry["n"], entry["trials"]) == (1.0, 0.0, 3, 2)
        assert entry["tool_calls"] == 2 * (2 + 1 + 2)
        assert entry["endings"] == {"user_stop": 6}
        assert found["n-samples"][name] == {"original": 3, "effective": 3}
    assert found["versions"] == {"tau2_retail": "1.0.1", "tau2_airline": "1.0.1"}


def test_two_agents_can_be_compared_task_by_task(desk: Desk) -> None:
    """By the downstream report's own reader; the test by itself: three tasks, all of which only one agent passes."""
    from lightning_opt.reports.downstream import differences, read_judged

    models = []
    for name in ("gold", "silent"):
        desk.out = desk.folder / name
        desk.run(f"model={name}", "domains=airline")
        models.append(read_judged(name, desk.out))
    (found,) = differences(models, ["tau2_airline"])
    assert (found.metric, found.value, found.n, found.only_first, found.only_second) == ("pass^1", 1.0, 3, 3, 0)
    assert found.p == pytest.approx(2 * 0.5**3)


def test_a_silent_agent_scores_0_and_has_no_tool_calls(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert desk.run("model=silent", "domains=retail") == 0
    entry = desk.results()["summary"]["tau2_retail"]
    assert (entry["value"], entry["pass"]["2"]["value"]) == (0.0, 0.0)
    assert (entry["tool_calls"], entry["tool_call_success"]) == (0, None)
    assert "none made" in capsys.readouterr().out


def test_calls_that_end_in_an_error_are_no_success(desk: Desk) -> None:
    assert desk.run("model=wrong", "domains=airline") == 0
    entry = desk.results()["summary"]["tau2_airline"]
    assert (entry["value"], entry["tool_calls"], entry["tool_call_success"]) == (0.0, 6, 0.0)


def test_who_played_the_others_is_recorded_and_why_not_comparable(desk: Desk) -> None:
    desk.run("model=gold", "domains=retail")
    found = desk.results()
    played = {name: found["config"][name] for name in ("agent", "user", "judge", "user_url", "tau2_version")}
    assert played == {
        "agent": "gold", "user": "hosted_vllm/user", "judge": "hosted_vllm/judge", "user_url": desk.url,
        "tau2_version": "1.0.1",
    }  # fmt: skip
    assert not found["comparable"]
    assert "not the model of the published scores" in found["summary"]["tau2_retail"]["why_not"]
    assert {body["model"] for body in desk.script.heard} == {"gold", "user", "judge"}


def test_tau2s_own_user_and_judge_are_named_and_comparable(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", OPENAI_KEY)
    monkeypatch.setenv("OPENAI_API_BASE", desk.url)
    answer = desk.script.answer
    desk.script.answer = lambda model, messages: answer({"gpt-4.1-2025-04-14": "user"}.get(model, model), messages)
    words = [
        f"url={desk.url}",
        f"tau2={sys.executable}",
        f"out={desk.out}",
        "model=gold",
        "trials=1",
        "domains=airline",
    ]
    assert desk.run(*words, own=False) == 0
    found = desk.results()
    assert found["comparable"]
    assert found["config"]["user"] == found["config"]["judge"] == "gpt-4.1-2025-04-14"
    assert set(desk.script.keys) == {f"Bearer {AGENT_KEY}", f"Bearer {OPENAI_KEY}"}


def test_keys_are_used_and_never_written(desk: Desk, capfd: pytest.CaptureFixture[str]) -> None:
    desk.run("model=gold", "domains=retail")
    assert f"Bearer {AGENT_KEY}" in desk.script.keys
    files = [path for path in desk.out.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"results.json", "tau2.log", "documents.jsonl.gz"}
    assert not any(AGENT_KEY.encode() in path.read_bytes() for path in files)
    told = capfd.readouterr()
    assert AGENT_KEY not in told.out + told.err


def test_a_key_that_an_endpoint_quotes_is_masked(desk: Desk) -> None:
    """And a conversation that broke off is no score: it is counted, and held again by the next call."""
    answer = desk.script.answer

    def refuse(model: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
        if model == "gold" and "TASK 11" in str(messages):
            raise PermissionError(f"bad key {desk.script.keys[-1]}")
        return answer(model, messages)

    desk.script.answer = refuse
    assert desk.run("model=gold", "domains=retail") == 0
    entry = desk.results()["summary"]["tau2_retail"]
    assert (entry["n"], entry["broken"], entry["value"], entry["comparable"]) == (2, 2, 1.0, False)
    kept = (desk.out / "retail" / "results.json").read_text()
    assert "bad key Bearer [redacted]" in kept
    assert AGENT_KEY not in kept
    desk.script.answer = answer
    assert desk.run("model=gold", "domains=retail") == 0
    entry = desk.results()["summary"]["tau2_retail"]
    assert (entry["n"], entry["broken"]) == (3, 0)


def test_the_same_command_goes_on_where_it_was_killed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STANDIN_DIES_AFTER", "4")
    assert desk.run("model=gold", "domains=retail") == 1
    before = [run["id"] for run in json.loads((desk.out / "retail" / "results.json").read_text())["simulations"]]
    assert len(before) == 4
    monkeypatch.delenv("STANDIN_DIES_AFTER")
    assert desk.run("model=gold", "domains=retail") == 0
    after = [run["id"] for run in json.loads((desk.out / "retail" / "results.json").read_text())["simulations"]]
    assert after[:4] == before
    assert len(after) == 6
    asked = len(desk.script.heard)
    assert desk.run("model=gold", "domains=retail") == 0
    assert len(desk.script.heard) == asked


def test_other_settings_do_not_mix_with_what_is_there(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    desk.run("model=gold", "domains=retail")
    assert desk.run("model=silent", "domains=retail") == 2
    assert "holds conversations with agent gold instead of silent" in capsys.readouterr().err
    assert desk.run("model=gold") == 0  # another domain is no other setting


def refused(desk: Desk, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert desk.run(*words) == 2
    told = capsys.readouterr().err.strip()
    assert "\n" not in told
    assert not desk.out.exists()
    return told


def test_a_cut_file_and_a_folder_that_cannot_be_made_are_one_line_each(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    (desk.folder / "taken").write_text("")
    desk.out = desk.folder / "taken" / "scores"
    told = refused(desk, capsys, "model=gold")
    assert told.startswith("out = ")
    assert ": must be a folder we can write to" in told
    desk.out = desk.folder / "scores"
    desk.out.mkdir()
    (desk.out / "results.json").write_text('{"suite": "agents", "resul')
    assert desk.run("model=gold") == 2
    told = capsys.readouterr().err
    assert told.startswith("out = ")
    assert ": must be whole, and is cut or no JSON: delete it" in told
    assert not desk.script.heard


def test_without_tau2_there_is_one_clear_line(
    desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    told = refused(desk, capsys, "model=gold")
    assert told.startswith("tau2 = ")
    assert "git clone https://github.com/sierra-research/tau2-bench" in told


def test_no_command_on_the_path(
    desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(desk.folder))
    assert evaluate_agent.main([f"url={desk.url}", "model=gold", f"out={desk.out}"]) == 2
    assert capsys.readouterr().err.startswith("tau2 = null: must lead to Sierra's tau2 1.x (not PyPI's tau2")


def test_the_unrelated_project_of_the_same_name_is_told_apart(
    desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its package has a `tau2.cli` as well."""
    site = install(desk.folder / "pypi", "tau2", "2.4.0", "A package for working with magnetic relaxation data")
    (site / "tau2").mkdir()
    (site / "tau2" / "__init__.py").write_text("")
    (site / "tau2" / "cli.py").write_text("def main(): raise SystemExit('hysteresis')\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    told = refused(desk, capsys, "model=gold")
    assert "holds another project, tau2 2.4.0 (A package for working with magnetic relaxation data)" in told


def test_an_older_tau2_is_refused(
    desk: Desk, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = install(desk.folder / "old", "tau2", "0.2.0", "tau-bench")
    monkeypatch.setenv("PYTHONPATH", f"{STANDIN}{os.pathsep}{old}")
    assert refused(desk, capsys, "model=gold").startswith("tau2 = 0.2.0: must lead to Sierra's tau2 1.x")


def test_a_virtual_environments_python_is_found_beside_the_command(tmp_path: Path) -> None:
    from lightning_opt.evaluation.agents.tau2 import interpreter

    (tmp_path / "venv").mkdir()
    for name in ("tau2", "python"):
        (tmp_path / "venv" / name).write_text("#!/bin/sh\n")
        (tmp_path / "venv" / name).chmod(0o755)
    (tmp_path / "tau2").symlink_to(tmp_path / "venv" / "tau2")
    assert interpreter(str(tmp_path / "tau2")) == str(tmp_path / "venv" / "python")
    assert interpreter(str(tmp_path / "venv" / "python")) == str(tmp_path / "venv" / "python")


def test_a_missing_key_is_said_before_anything_runs(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"url={desk.url}", f"tau2={sys.executable}", f"out={desk.out}", "model=gold"]
    assert evaluate_agent.main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("user = gpt-4.1-2025-04-14: plays the user and needs OPENAI_API_KEY in the environment")
    assert evaluate_agent.main([*words, "user=user", f"user_url={desk.url}"]) == 2
    assert capsys.readouterr().err.startswith("judge = gpt-4.1-2025-04-14: judges 2 tasks and needs OPENAI_API_KEY")
    assert desk.script.heard == []


def test_the_endpoint_is_asked_first(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(desk, capsys, "model=golf")
    assert "did you mean gold?" in told
    assert "must be one of empty, garbled, gold, judge, silent, user, wrong" in refused(desk, capsys)
    assert evaluate_agent.main(["url=http://127.0.0.1:9/v1", "model=mine"]) == 2
    told = capsys.readouterr().err
    assert "start it with vllm serve RUN/model --served-model-name mine --enable-auto-tool-choice" in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "url = null: must be the OpenAI-compatible endpoint"),
        (["http://127.0.0.1:8000/v1"], "word = http://127.0.0.1:8000/v1: must be name=value"),
        (["url=127.0.0.1:8000"], "url = 127.0.0.1:8000: must be http://HOST:PORT/v1"),
        (["url=http://me:hush-hush@host/v1"], "url = .redacted.: must hold no key or password"),
        (["url=http://h/v1", "trails=4"], "word = trails: must be one of .*did you mean trials?"),
        (["url=http://h/v1", "trials=0"], "trials = 0: must be a whole number >= 1"),
        (["url=http://h/v1", "trials=4", "trials=5"], "trials = 5: must be given once"),
        (["url=http://h/v1", "domains=retail,airlines"], "domains = airlines: must be one of .*did you mean airline"),
        (["url=http://h/v1", "temperature=hot"], "temperature = hot: must be a number from 0 to 2"),
        (["url=http://h/v1", "user_url=http://h/v1"], "user = null: must be the model that user_url serves"),
    ],
)  # fmt: skip
def test_wrong_words_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings.parse_words(words)


def test_words_become_settings() -> None:
    found = settings.parse_words(["url=https://h:1/v1/", "domains=airline", "tasks=5", "seed=0", "user=null"])
    assert (found.url, found.domains, found.tasks, found.seed, found.user) == (
        "https://h:1/v1",
        ("airline",),
        5,
        0,
        None,
    )
    assert found.trials == 4
    assert settings.folder_of(found) == Path("runs/agents/agent")


def test_help_shows_examples_and_imports_no_torch() -> None:
    code = (
        "import sys; from recipes import evaluate_agent\n"
        "try: evaluate_agent.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    for part in ("vllm serve", "url=http://127.0.0.1:8000/v1", "concurrency: conversations at once", "OPENAI_API_KEY"):
        assert part in done.stdout


# -- the arithmetic --


@pytest.mark.parametrize(("trials", "successes"), [(1, 0), (1, 1), (4, 0), (4, 3), (5, 2), (6, 6)])
def test_pass_hat_k_is_the_share_of_draws_that_all_succeed(trials: int, successes: int) -> None:
    held = [index < successes for index in range(trials)]
    for k in range(1, trials + 1):
        draws = list(itertools.combinations(held, k))
        assert scores.pass_hat_k(trials, successes, k) == pytest.approx(sum(map(all, draws)) / len(draws))


@pytest.mark.parametrize(("trials", "successes", "k"), [(2, 3, 1), (2, 1, 3), (2, 1, 0), (2, -1, 1)])
def test_impossible_counts_are_refused(trials: int, successes: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass"):
        scores.pass_hat_k(trials, successes, k)


def simulation(name: str, trial: int, reward: float | None, reason: str = "user_stop", **more: Any) -> dict[str, Any]:
    info = None if reward is None else {"reward": reward, "action_checks": []}
    return {
        "task_id": name,
        "trial": trial,
        "termination_reason": reason,
        "reward_info": info,
        "messages": None,
        **more,
    }


def tool(error: bool, requestor: str = "assistant") -> dict[str, Any]:
    return {"role": "tool", "id": "x", "content": "", "requestor": requestor, "error": error}


def test_scores_of_a_domain() -> None:
    found = scores.score_domain(
        {
            "simulations": [
                simulation("a", 0, 1.0, messages=[tool(False), tool(True), tool(True, requestor="user")]),
                simulation("a", 1, 0.0, messages=[{"role": "tool", "tool_messages": [tool(False), tool(False)]}]),
                simulation("b", 0, 1.0), simulation("b", 1, 1.0),
                simulation("c", 0, None, "too_many_errors"), simulation("c", 1, 0.5),
                simulation("c", 2, None, scores.BROKEN),
            ]
        }
    )  # fmt: skip
    assert found["tasks"] == {
        "a": {"trials": 2, "successes": 1}, "b": {"trials": 2, "successes": 2}, "c": {"trials": 2, "successes": 0},
    }  # fmt: skip
    assert found["pass"][1]["value"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["pass"][1]["stderr"] == pytest.approx(0.5 / 3**0.5)
    assert found["pass"][2]["value"] == pytest.approx(1 / 3)
    assert (found["n"], found["conversations"], found["broken"]) == (3, 6, 1)
    assert (found["tool_calls"], found["tool_call_success"]) == (4, 0.75)
    assert found["endings"] == {"user_stop": 5, "too_many_errors": 1, scores.BROKEN: 1}


def broken(kind: str, error: str, place: str) -> dict[str, Any]:
    """As tau2 1.0.1 records it (seen there with the scripted models ``garbled`` and ``empty``)."""
    trace = f'File "/x/src/tau2/{place}", line 1, in f\n{kind}: {error}\n'
    info = {"error": error, "error_type": kind, "error_traceback": trace, "failed_after_attempts": 4}
    return simulation("a", 0, None, scores.BROKEN, info=info)


@pytest.mark.parametrize(
    ("run", "failed"),
    [
        (broken("JSONDecodeError", "Expecting value: line 1 column 7 (char 6)", "agent/llm_agent.py"), True),
        (broken("ValidationError", "arguments: Input should be a valid dictionary", "agent/llm_agent.py"), True),
        (broken("ValueError", "AssistantMessage must have either content or tool_calls.", "orchestrator.py"), True),
        (broken("JSONDecodeError", "Expecting value", "evaluator/evaluator_nl_assertions.py"), False),
        (broken("ValueError", "UserMessage must have either content or tool_calls.", "orchestrator.py"), False),
        (broken("APIConnectionError", "Connection refused", "agent/llm_agent.py"), False),
    ],
)
def test_the_agents_own_faults_are_failures_and_those_of_others_are_not(run: dict[str, Any], failed: bool) -> None:
    found = scores.score_domain({"simulations": [run]})
    assert (found["unreadable"], found["broken"], found["n"]) == (int(failed), int(not failed), int(failed))
    assert found["tasks"] == ({"a": {"trials": 1, "successes": 0}} if failed else {})


def test_results_in_a_folder_of_simulations_are_read_too(tmp_path: Path) -> None:
    """tau2's "dir" format; a file that is being written beside has a dot in front."""
    (tmp_path / "simulations").mkdir()
    (tmp_path / "results.json").write_text(json.dumps({"info": {}, "tasks": [], "simulation_index": []}))
    for name in ("one", "two"):
        (tmp_path / "simulations" / f"{name}.json").write_text(json.dumps(simulation(name, 0, 1.0)))
    (tmp_path / "simulations" / ".sim_x.json").write_text("{")
    found = scores.read_results(tmp_path)
    assert scores.score_domain(found)["tasks"].keys() == {"one", "two"}


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"info": {}, "tasks": [], "simulations": [3]}'])
def test_what_is_no_result_of_tau2_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ConfigError, match=r"must be results of tau2 1.x"):
        scores.read_results(tmp_path)


# -- the real one --


@pytest.fixture
def real(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    python = os.environ.get("LIGHTNING_OPT_TAU2")
    if not python:
        pytest.skip("LIGHTNING_OPT_TAU2 names no Python with Sierra's tau2")
    ask = [python, "-c", "from tau2.utils.utils import DATA_DIR; print(DATA_DIR)"]
    data = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())

    def run(domain: str, model: str, tasks: int) -> dict[str, Any]:
        listed = json.loads((data / "tau2" / "domains" / domain / "tasks.json").read_text())
        with served(Script(listed)) as url:
            words = [f"url={url}", f"model={model}", f"domains={domain}", f"tasks={tasks}", "trials=2"]
            sides = ["user=user", f"user_url={url}", "judge=judge", f"judge_url={url}", f"tau2={python}"]
            assert evaluate_agent.main([*words, *sides, f"out={tmp_path / model}"]) == 0
        return json.loads((tmp_path / model / "results.json").read_text())["summary"][f"tau2_{domain}"]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "value"), [("gold", 1.0), ("silent", 0.0), ("wrong", 0.0), ("garbled", 0.0), ("empty", 0.0)]
)
def test_real_tau2_agrees(real: Callable[..., dict[str, Any]], model: str, value: float) -> None:
    entry = real("retail", model, 2)
    assert (entry["value"], entry["n"], entry["broken"]) == (value, 2, 0)
    assert entry["tool_call_success"] == {"gold": pytest.approx(1.0, abs=0.2), "wrong": 0.0}.get(model)
    assert entry["unreadable"] == (4 if model in ("garbled", "empty") else 0)
