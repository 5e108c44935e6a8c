"""Scores of a trained model by lm-eval: HellaSwag, MMLU and HumanEval, after training and by the command line.

`check` looks at the configuration without torch; `evaluate` scores a model in memory; `sandbox` runs generated code.
"""

from lightning_opt._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "suites": ["check", "check_samples"],
        "score": ["evaluate"],
        "sandbox": ["Limits", "Rooms", "Sandbox", "SandboxError", "Verdict"],
        "offline": ["write_tasks"],
        "sampling": ["SampleScorer"],
        "agents": ["AgentSettings", "evaluate_agent"],
    },
)
