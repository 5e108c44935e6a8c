"""An OpenAI-compatible chat endpoint on this machine whose models follow a script instead of weights.

Models: ``gold`` is an agent that makes the calls that a task's own file lists, then says what the file wants said;
``silent`` is one that only ever says "..."; ``wrong`` calls a tool that is not there and is then silent; ``garbled``
calls one with arguments that are no JSON; ``empty`` answers with nothing at all;
``user`` names its task and then hangs up; ``judge`` finds every assertion met. Written from the OpenAI chat completions
reference; used for tau2 itself and for our stand-in of its command line.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STOP = "###STOP###"


def _words(text: str) -> str:
    return " ".join(text.split())


class Script:
    """What each model answers.

    Args:
        tasks: tau2's tasks (``tasks.json``).

    Attributes:
        heard: bodies of the requests, without their messages.
        keys: Authorization headers, in order.
    """

    def __init__(self, tasks: list[dict[str, Any]]) -> None:
        self.tasks = {str(task["id"]): task for task in tasks}
        self.heard: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    def answer(self, model: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The next assistant message."""
        if model == "user":
            said = [m for m in messages if m["role"] == "assistant"]
            return {"content": STOP if said else f"TASK {self._task_of(messages)} please"}
        if model == "gold":
            return self._gold(messages)
        if model == "wrong" and not any(m["role"] == "tool" for m in messages):
            return {"content": None, "tool_calls": [_call(0, "no_such_tool", {"x": 1})]}
        if model == "garbled":
            call = _call(0, "find_user", {})
            return {"content": None, "tool_calls": [call | {"function": {"name": "find_user", "arguments": '{"a": '}}]}
        if model == "empty":
            return {"content": ""}
        if model in ("silent", "wrong"):
            return {"content": "..."}
        listed = messages[-1]["content"].split("expectedOutcomes:")[-1].strip()
        met = [
            {"expectedOutcome": outcome, "reasoning": "scripted", "metExpectation": True}
            for outcome in eval(listed, {"__builtins__": {}})  # a list of strings as Python prints it
        ]
        return {"content": json.dumps({"results": met})}

    def _task_of(self, messages: list[dict[str, Any]]) -> str:
        scenario = _words(messages[0]["content"])
        for name, task in self.tasks.items():
            told = task["user_scenario"]["instructions"]
            told = told if isinstance(told, str) else told["reason_for_call"] + "\n" + (told["known_info"] or "")
            if all(_words(line) in scenario for line in told.splitlines()):
                return name
        raise LookupError("no task has this scenario")

    def _gold(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        first = next(m["content"] for m in messages if m["role"] == "user")
        wanted = self.tasks[re.search(r"TASK (\S+)", first)[1]]["evaluation_criteria"]
        actions = [a for a in wanted["actions"] or [] if a.get("requestor", "assistant") == "assistant"]
        done = sum(m["role"] == "tool" for m in messages)
        if done < len(actions):
            return {"content": None, "tool_calls": [_call(done, actions[done]["name"], actions[done]["arguments"])]}
        return {"content": "Done. " + " ".join(wanted.get("communicate_info") or [])}


def _call(index: int, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


@contextlib.contextmanager
def served(script: Script) -> Iterator[str]:
    """Serves the script on the loopback address; gives the URL that ends in ``/v1``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            models = [
                {"id": name, "object": "model"}
                for name in ("gold", "silent", "wrong", "garbled", "empty", "user", "judge")
            ]
            self._send({"object": "list", "data": models} if self.path.endswith("/models") else None)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            script.keys.append(self.headers.get("Authorization"))
            script.heard.append({name: value for name, value in body.items() if name != "messages"})
            try:
                message = {"role": "assistant", **script.answer(body["model"], body["messages"])}
            except PermissionError as error:
                return self._send({"error": {"message": str(error)}}, 401)
            reason = "tool_calls" if message.get("tool_calls") else "stop"
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            choice = {"index": 0, "finish_reason": reason, "message": message}
            return self._send(
                {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
                | {"usage": usage}
            )

        def _send(self, answer: dict[str, Any] | None, status: int = 200) -> None:
            content = json.dumps(answer).encode()
            self.send_response(404 if answer is None else status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
