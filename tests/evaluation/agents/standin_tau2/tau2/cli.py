"""Stand-in for ``tau2 run``: talks to the endpoints it is given and writes ``results.json`` as tau2 1.0.1 does."""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from tau2.evaluator import evaluator_nl_assertions as judging
from tau2.runner.helpers import raw_tasks

_KEYS = {"hosted_vllm": "HOSTED_VLLM_API_KEY", "openai": "OPENAI_API_KEY"}


def main() -> None:
    parser = argparse.ArgumentParser()
    run = parser.add_subparsers(required=True).add_parser("run")
    for name in ("domain", "task-split-name", "agent-llm", "user-llm", "save-to"):
        run.add_argument(f"--{name}", required=True)
    for name in ("num-trials", "num-tasks", "max-steps", "max-concurrency", "seed"):
        run.add_argument(f"--{name}", type=int)
    for name in ("agent-llm-args", "user-llm-args"):
        run.add_argument(f"--{name}", type=json.loads, required=True)
    run.add_argument("--auto-resume", action="store_true")
    hold(parser.parse_args())


def hold(asked: argparse.Namespace) -> None:
    path = Path("/nowhere/simulations") / asked.save_to / "results.json"  # an absolute path replaces tau2's folder
    tasks = raw_tasks(asked.domain, asked.num_tasks)
    seeds = [random.Random(asked.seed + trial).randint(0, 10**6) for trial in range(asked.num_trials)]
    if path.exists():
        assert asked.auto_resume
        kept = json.loads(path.read_text())
        kept["simulations"] = [s for s in kept["simulations"] if s["termination_reason"] != "infrastructure_error"]
        print(f"Resuming run from {len(kept['simulations'])} runs.", flush=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {
            "timestamp": "now",
            "info": information(asked),
            "tasks": tasks,
            "simulations": [],
            "simulation_index": None,
        }
    done = {(s["trial"], s["task_id"], s["seed"]) for s in kept["simulations"]}
    left = int(os.environ.get("STANDIN_DIES_AFTER", 10**6))
    for trial, seed in enumerate(seeds):
        for task in tasks:
            if (trial, task["id"], seed) in done:
                continue
            if left == 0:
                sys.exit("the machine went away")
            left -= 1
            kept["simulations"].append(conversation(asked, task, trial, seed))
            path.write_text(json.dumps(kept, indent=2))
            print(f"Status: {len(kept['simulations'])}/{len(seeds) * len(tasks)} complete.", flush=True)
    path.write_text(json.dumps(kept, indent=2))


def information(asked: argparse.Namespace) -> dict[str, Any]:
    return {
        "git_commit": "unknown", "num_trials": asked.num_trials, "max_steps": asked.max_steps, "max_errors": 10,
        "user_info": {"implementation": "user_simulator", "llm": asked.user_llm, "llm_args": asked.user_llm_args},
        "agent_info": {"implementation": "llm_agent", "llm": asked.agent_llm, "llm_args": asked.agent_llm_args},
        "environment_info": {"domain_name": asked.domain, "policy": "", "tool_defs": None}, "seed": asked.seed,
    }  # fmt: skip


def conversation(asked: argparse.Namespace, task: dict[str, Any], trial: int, seed: int) -> dict[str, Any]:
    run: dict[str, Any] = {
        "id": str(uuid.uuid4()), "task_id": task["id"], "timestamp": "now", "start_time": "now", "end_time": "now",
        "duration": 0.0, "agent_cost": 0.0, "user_cost": 0.0, "trial": trial, "seed": seed, "mode": "half_duplex",
    }  # fmt: skip
    try:
        messages, reason = talk(asked, task, seed)
        info = judged(task, messages)
    except OSError as error:
        text = f"{error} {error.read().decode() if hasattr(error, 'read') else ''}"
        run["info"] = {"error": text, "error_type": type(error).__name__, "failed_after_attempts": 1}
        return run | {"termination_reason": "infrastructure_error", "reward_info": None, "messages": []}
    return run | {"termination_reason": reason, "reward_info": info, "messages": messages}


def talk(asked: argparse.Namespace, task: dict[str, Any], seed: int) -> tuple[list[dict[str, Any]], str]:
    told = task["user_scenario"]["instructions"]
    scenario = {"role": "system", "content": "\n".join(str(part) for part in told.values())}
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": "Hi! How can I help you today?", "tool_calls": None}
    ]
    tools = {action["name"] for action in task["evaluation_criteria"]["actions"]}
    while len(messages) < asked.max_steps:
        said = ask(asked.user_llm, asked.user_llm_args, [scenario, *spoken(messages, swap=True)], seed)
        messages.append({"role": "user", "content": said["content"], "tool_calls": None})
        if "###STOP###" in said["content"]:
            return messages, "user_stop"
        while len(messages) < asked.max_steps:
            answer = ask(asked.agent_llm, asked.agent_llm_args, spoken(messages), seed)
            calls = [called(call) for call in answer.get("tool_calls") or []]
            messages.append({"role": "assistant", "content": answer["content"], "tool_calls": calls or None})
            if not calls:
                break
            for call in calls:
                known = call["name"] in tools
                content = "{}" if known else f"Error: Tool '{call['name']}' not found."
                messages.append(
                    {"id": call["id"], "role": "tool", "content": content, "requestor": "assistant", "error": not known}
                )
    return messages, "max_steps"


def called(call: dict[str, Any]) -> dict[str, Any]:
    arguments = json.loads(call["function"]["arguments"])
    return {"id": call["id"], "name": call["function"]["name"], "arguments": arguments, "requestor": "assistant"}


def spoken(messages: list[dict[str, Any]], swap: bool = False) -> list[dict[str, Any]]:
    """As an endpoint wants them; the user hears only what is said, and is the assistant of its own side."""
    if swap:
        other = {"assistant": "user", "user": "assistant"}
        heard = [message for message in messages if message["role"] != "tool" and message["content"]]
        return [{"role": other[message["role"]], "content": message["content"]} for message in heard]
    return [{key: message[key] for key in ("role", "content")} for message in messages]


def ask(model: str, options: dict[str, Any], messages: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    provider, _, name = model.rpartition("/")
    base = options.get("api_base") or os.environ["OPENAI_API_BASE"]
    body = {"model": name, "messages": messages, "seed": seed, "temperature": options.get("temperature")}
    request = urllib.request.Request(f"{base}/chat/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    request.add_header("Authorization", f"Bearer {os.environ.get(_KEYS[provider or 'openai'], 'fake-api-key')}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["choices"][0]["message"]


def judged(task: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
    wanted = task["evaluation_criteria"]
    made = [(call["name"], call["arguments"]) for message in messages for call in message.get("tool_calls") or []]
    checks = [
        {"action": action, "action_match": (action["name"], action["arguments"]) in made, "action_reward": 1.0}
        for action in wanted["actions"]
    ]
    reward = float(all(check["action_match"] for check in checks))
    if wanted["nl_assertions"]:
        assert judging.DEFAULT_LLM_NL_ASSERTIONS
        if options := judging.DEFAULT_LLM_NL_ASSERTIONS_ARGS.get("api_base"):
            content = f"expectedOutcomes: {wanted['nl_assertions']}"
            told = ask(
                judging.DEFAULT_LLM_NL_ASSERTIONS, {"api_base": options}, [{"role": "user", "content": content}], 0
            )
            reward *= all(result["metExpectation"] for result in json.loads(told["content"])["results"])
    time.sleep(0.001)
    return {"reward": reward, "action_checks": checks, "reward_basis": wanted["reward_basis"]}
