"""Sierra's tau2 (github.com/sierra-research/tau2-bench, 1.x) in an environment of its own: found, asked, run.

tau2 needs Python 3.12 or 3.13 and its own LiteLLM, so it is never imported here: a few lines run in its interpreter.
Keys reach it by the environment only; what it prints and writes is masked (`plan.secrets`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_opt.evaluation.agents.settings import AgentSettings
from lightning_opt.plan import ConfigError, one_of
from lightning_opt.plan.secrets import mask
from lightning_opt.run_folder import write_json

INSTALL = (
    "must lead to Sierra's tau2 1.x (not PyPI's tau2, which is another project): git clone "
    "https://github.com/sierra-research/tau2-bench, pip install it into a Python 3.12 environment, "
    "and give tau2=THAT_ENVIRONMENT/bin/python"
)
_SECONDS = 10.0

_PROBE = """
import importlib.metadata, importlib.util, json, sys
asked = json.loads(sys.argv[1])
out = {"python": sys.version.split()[0]}
try:
    out["version"] = importlib.metadata.version("tau2")
    out["summary"] = importlib.metadata.metadata("tau2")["Summary"]
except importlib.metadata.PackageNotFoundError:
    pass
out["ours"] = bool(importlib.util.find_spec("tau2") and importlib.util.find_spec("tau2.runner"))
if out["ours"]:
    try:
        import litellm, tau2.config as config
        from tau2.runner.helpers import get_tasks
        models = {"user": asked["user"] or config.DEFAULT_LLM_USER,
                  "judge": asked["judge"] or config.DEFAULT_LLM_NL_ASSERTIONS}
        out["models"] = models
        out["missing_keys"] = {side: [] if asked[side + "_url"] else litellm.validate_environment(name)["missing_keys"]
                               for side, name in models.items()}
        out["tasks"], out["judged"] = {}, {}
        for domain in asked["domains"]:
            tasks = get_tasks(domain, asked["split"], None, asked["tasks"])
            out["tasks"][domain] = [str(task.id) for task in tasks]
            wanted = [task.evaluation_criteria for task in tasks if task.evaluation_criteria]
            out["judged"][domain] = sum(bool(w.nl_assertions) and "NL_ASSERTION" in [b.value for b in w.reward_basis]
                                        for w in wanted)
    except Exception as error:
        out["error"] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(out))
"""

# The judge cannot be named on tau2's command line, so it is named where tau2 reads it.
_RUN = """
import json, sys
judge = json.loads(sys.argv.pop(1))
import tau2.evaluator.evaluator_nl_assertions as judging
if judge["llm"]:
    judging.DEFAULT_LLM_NL_ASSERTIONS = judge["llm"]
    judging.DEFAULT_LLM_NL_ASSERTIONS_ARGS = {**judging.DEFAULT_LLM_NL_ASSERTIONS_ARGS, **judge["args"]}
from tau2.cli import main
main()
"""


@dataclass(frozen=True)
class Tau2:
    """An installed tau2 that can do what was asked.

    Attributes:
        python: its interpreter.
        version: of tau2.
        models: ``user`` and ``judge``: the models that will play them.
        tasks: domain to the names of its tasks.
        judged: domain to how many of them need the judge.
    """

    python: str
    version: str
    models: dict[str, str]
    tasks: dict[str, list[str]]
    judged: dict[str, int]


def interpreter(given: str | None) -> str:
    """The Python of tau2's environment: as given, or beside the command ``tau2`` on PATH.

    Raises:
        ConfigError: there is none.
    """
    found = shutil.which(str(Path(given).expanduser()) if given else "tau2")
    if found is None:
        raise ConfigError("tau2", given, INSTALL)
    if Path(found).name.startswith("python"):
        return found  # not resolved: a virtual environment's is a link to its base's
    for place in (Path(found), Path(found).resolve()):
        beside = place.parent / "python"
        if beside.is_file():
            return str(beside)
    raise ConfigError("tau2", given or found, f"has no python beside it; {INSTALL}")


def find_tau2(settings: AgentSettings) -> Tau2:
    """Asks tau2 for its version, its tasks and its models, and whether their keys are there; some seconds.

    Raises:
        ConfigError: no tau2, another project of that name, another version, tasks that it has not, or a key is missing.
    """
    python = interpreter(settings.tau2)
    asked = {name: getattr(settings, name) for name in ("domains", "split", "tasks", "user_url", "judge_url")}
    asked |= {side: _model(getattr(settings, side), getattr(settings, f"{side}_url")) for side in ("user", "judge")}
    try:
        done = subprocess.run(
            [python, "-c", _PROBE, json.dumps(asked)], capture_output=True, text=True, env=environment(), timeout=300
        )
        told = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        raise ConfigError("tau2", settings.tau2 or python, f"does not answer as Python; {INSTALL}") from None
    if not told["ours"]:
        other = f"holds another project, tau2 {told['version']} ({told.get('summary')}); " if "version" in told else ""
        raise ConfigError("tau2", settings.tau2 or python, other + INSTALL)
    version = str(told.get("version", "unknown"))
    if not version.startswith("1."):
        raise ConfigError("tau2", version, INSTALL)
    if "error" in told:
        raise ConfigError(
            "tau2", settings.tau2 or python, f"fails: {told['error'][:300]} (TAU2_DATA_DIR names its data)"
        )
    _check_keys(settings, told)
    return Tau2(python, version, told["models"], told["tasks"], told["judged"])


def _check_keys(settings: AgentSettings, told: dict[str, Any]) -> None:
    needed = ["user"] + ["judge"] * any(told["judged"].values())
    for side in needed:
        if missing := told["missing_keys"][side]:
            what = {"user": "plays the user", "judge": f"judges {sum(told['judged'].values())} tasks"}[side]
            why = f"{what} and needs {', '.join(missing)} in the environment, or name your own: {side}= and {side}_url="
            raise ConfigError(side, told["models"][side], why)


def served_model(settings: AgentSettings) -> str:
    """The agent's name, once the endpoint has said that it serves it.

    Raises:
        ConfigError: nothing answers at the address, it serves other models, or several and none was named.
    """
    request = urllib.request.Request(f"{settings.url}/models")
    if key := os.environ.get("HOSTED_VLLM_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            names = [str(entry["id"]) for entry in json.load(answer)["data"]]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            why = f"refuses ({error.code}): put the endpoint's key into the environment as HOSTED_VLLM_API_KEY"
            raise ConfigError("url", settings.url, why) from None
        names = []  # an endpoint need not list what it serves
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"must answer ({error}): start it with {serve_command(settings)}"
        raise ConfigError("url", settings.url, why) from None
    if settings.model is None:
        if len(names) != 1:
            raise ConfigError("model", None, f"must be one of {', '.join(sorted(names)) or 'the models it serves'}")
        return names[0]
    if names and settings.model not in names:
        raise ConfigError("model", settings.model, one_of(settings.model, names))
    return settings.model


def serve_command(settings: AgentSettings) -> str:
    """vLLM's command that serves a checkpoint with tool calls (the parser depends on the model's chat format)."""
    name = f" --served-model-name {settings.model}" if settings.model else ""
    return f"vllm serve RUN/model{name} --enable-auto-tool-choice --tool-call-parser hermes"


def run_domain(tau2: Tau2, settings: AgentSettings, domain: str, folder: Path, say: Callable[[str], None]) -> None:
    """Holds the conversations of one domain that `folder` does not have yet; tau2 keeps each as it ends.

    Args:
        tau2: what `find_tau2` found.
        settings: with the served model's name.
        domain: one of `DOMAINS`.
        folder: for tau2's ``results.json`` and ``tau2.log``.
        say: takes lines of progress.

    Raises:
        RuntimeError: tau2 failed; the text has its last words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    judge = {"llm": None, "args": {}}
    if settings.judge:
        judge = {"llm": _model(settings.judge, settings.judge_url), "args": _base(settings.judge_url)}
    user = {"temperature": 0.0, **_base(settings.user_url)}
    agent = {"temperature": settings.temperature, **_base(settings.url)}
    words = {
        "--domain": domain, "--task-split-name": settings.split, "--num-trials": settings.trials,
        "--agent-llm": _model(settings.model, settings.url), "--agent-llm-args": json.dumps(agent),
        "--user-llm": tau2.models["user"], "--user-llm-args": json.dumps(user),
        "--max-steps": settings.max_steps, "--max-concurrency": settings.concurrency, "--seed": settings.seed,
        "--save-to": folder.resolve(),  # tau2 joins it to its own folder, which an absolute path replaces
    }  # fmt: skip
    if settings.tasks is not None:
        words["--num-tasks"] = settings.tasks
    command = [tau2.python, "-c", _RUN, json.dumps(judge), "run", "--auto-resume"]
    command += [str(part) for pair in words.items() for part in pair]
    last = ""
    with (
        (folder / "tau2.log").open("a", encoding="utf-8") as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env=environment(),
        ) as process,
    ):  # fmt: skip
        try:
            for line in process.stdout:
                line = mask(line)
                log.write(line)
                last = line.strip() or last
                if line.startswith(("Status:", "Resuming")):
                    say(f"{domain}: {line.strip()}")
        except BaseException:
            process.terminate()
            raise
        finally:
            _mask_files(folder)
    if process.returncode:
        raise RuntimeError(f"tau2 ended with {process.returncode} in {domain}: {last[:300]} ({folder / 'tau2.log'})")


def environment() -> dict[str, str]:
    """This process's, and LiteLLM's list of prices as installed instead of from the network."""
    return {"LITELLM_LOCAL_MODEL_COST_MAP": "True", **os.environ}


def named(settings: AgentSettings, model: str) -> AgentSettings:
    """The settings with the served model's name."""
    return replace(settings, model=model)


def _model(name: str | None, url: str | None) -> str | None:
    """LiteLLM's name: a model behind an address of its own is asked as vLLM is."""
    return f"hosted_vllm/{name}" if name and url and not name.startswith("hosted_vllm/") else name


def _base(url: str | None) -> dict[str, str]:
    return {"api_base": url} if url else {}


def _mask_files(folder: Path) -> None:
    """An endpoint's error may quote the key it was sent, and tau2 keeps errors."""
    for path in folder.rglob("*.json"):
        with contextlib.suppress(ValueError):  # cut off: nothing that is read again
            found = json.loads(path.read_text("utf-8"))
            if (masked := _masked(found)) != found:
                write_json(path, masked)


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _masked(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_masked(item) for item in value]
    return mask(value) if isinstance(value, str) else value
