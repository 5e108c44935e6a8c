"""Stand-in: the names of the models that play the others."""

DEFAULT_LLM_USER = "gpt-4.1-2025-04-14"
DEFAULT_LLM_NL_ASSERTIONS = "gpt-4.1-2025-04-14"
