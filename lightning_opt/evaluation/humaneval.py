"""HumanEval's metric without `evaluate.load` (which needs the hub and isolates nothing): programs run in our sandbox.

pass@k: "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, section 2.1, equation 1.
lm-eval calls `build_predictions` for all problems together and then `pass_at_k` for one after another, both by name
from the task file that `offline` writes.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_opt.evaluation.document_records import bits_per_byte
from lightning_opt.evaluation.quiet import metered
from lightning_opt.evaluation.sandbox import Limits, shared

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

_ahead: list[_Ahead] = []


class _Ahead:
    """Runs programs before they are asked for, and keeps what came of them until they are.

    Args:
        seconds: time limit of a program.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._passed: dict[str, deque[bool]] = defaultdict(deque)

    def run(self, programs: Sequence[str]) -> None:
        with metered(f"{len(programs):,} programs to run", len(programs)) as meter:
            verdicts = shared(Limits(seconds=self.seconds)).run(programs, lambda: meter.advance(1))
        for program, verdict in zip(programs, verdicts, strict=True):
            self._passed[program].append(verdict.passed)

    def passed(self, programs: Sequence[str]) -> list[bool] | None:
        """Whether they passed; None where that is not known of all."""
        if any(programs.count(program) > len(self._passed[program]) for program in programs):
            return None
        return [self._passed[program].popleft() for program in programs]


@contextlib.contextmanager
def all_at_once(seconds: float) -> Iterator[None]:
    """Inside, the programs of all problems run as soon as they are written, side by side, and say how far it is.

    Args:
        seconds: time limit of a program.
    """
    _ahead.append(_Ahead(seconds))
    try:
        yield
    finally:
        _ahead.pop()


def estimate_pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased chance that one of k programs drawn without replacement from `samples` is right.

    Args:
        samples: programs written for the problem.
        correct: how many of them passed.
        k: programs drawn, at most `samples`.

    Raises:
        ValueError: more drawn or more correct than there are.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} programs, {correct} correct: 1 <= k <= samples and correct <= samples")
    none_right = 1.0
    for drawn in range(k):
        none_right *= max(samples - correct - drawn, 0) / (samples - drawn)
    return 1.0 - none_right


def pass_at_k(
    references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] | int = 1, seconds: float = 5.0
) -> dict[str, float]:
    """Mean pass@k over problems.

    Args:
        references: test code per problem, ending in the call that runs it.
        predictions: programs per problem, each the prompt with one completion.
        k: one or more numbers of draws.
        seconds: time limit of a program.

    Returns:
        ``{"pass@1": value, ...}`` for every k that the number of programs allows.
    """
    programs = [_whole(program, test) for test, some in zip(references, predictions, strict=True) for program in some]
    passed = iter(_passed(programs, seconds))
    counts = [(len(some), sum(next(passed) for _ in some)) for some in predictions]
    draws = [k] if isinstance(k, int) else list(k)
    return {
        f"pass@{draw}": sum(estimate_pass_at_k(total, right, draw) for total, right in counts) / len(counts)
        for draw in draws
        if all(total >= draw for total, _ in counts)
    }


def _passed(programs: list[str], seconds: float) -> list[bool]:
    known = _ahead[-1].passed(programs) if _ahead and _ahead[-1].seconds == seconds else None
    return [verdict.passed for verdict in shared(Limits(seconds=seconds)).run(programs)] if known is None else known


def _whole(program: str, test: str) -> str:
    return f"{program}\n{test}"


def build_predictions(resps: list[list[str]], docs: list[dict[str, Any]]) -> list[list[str]]:
    """Programs to run: every problem's prompt with each of its completions (lm-eval's `create_test` filter)."""
    found = [
        [document["prompt"] + completion for completion in completions]
        for completions, document in zip(resps, docs, strict=True)
    ]
    if _ahead:
        tests = [f"{document['test']}\ncheck({document['entry_point']})" for document in docs]  # the task's own target
        _ahead[-1].run([_whole(program, test) for test, some in zip(tests, found, strict=True) for program in some])
    return found


def solution_bits(lm: TemplateLM, problems: Sequence[Mapping[str, Any]]) -> list[float]:
    """Bits per byte of each problem's own solution after its prompt: where no program passes, it tells models apart."""
    from lm_eval.api.instance import Instance

    pairs = [(problem["prompt"], problem["canonical_solution"]) for problem in problems]
    asked = [
        Instance("loglikelihood", {}, pair, 0, ("humaneval_solutions", place, 1)) for place, pair in enumerate(pairs)
    ]
    found = lm.loglikelihood(asked) if asked else []
    return [bits_per_byte(value, solution) for (value, _), (_, solution) in zip(found, pairs, strict=True)]
