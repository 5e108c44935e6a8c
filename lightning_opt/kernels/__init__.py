"""How an update runs: one rule written once as plain maths, carried out eager, foreach, compiled or fused.

`Rule` is what an optimizer's file hands in; `run` carries one bucket of tensors out; `choose` says how, and why.
"""

from lightning_opt._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "rule": ["Bucket", "Rule", "apply"],
        "choice": ["Choice", "choose", "possible", "run"],
        "device": ["can_compile", "cpp_compiler"],
        "many": ["Many"],
    },
)
