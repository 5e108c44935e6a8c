"""A served checkpoint as a tool-calling agent: what is asked, tau2 in an environment of its own, the scores."""

from lightning_opt._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {"evaluating": ["evaluate_agent"], "settings": ["AgentSettings"]},
)
