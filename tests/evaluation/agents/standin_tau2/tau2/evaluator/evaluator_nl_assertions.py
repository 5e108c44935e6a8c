"""Stand-in: where tau2 reads its judge from."""

from tau2.config import DEFAULT_LLM_NL_ASSERTIONS  # noqa: F401

DEFAULT_LLM_NL_ASSERTIONS_ARGS = {"temperature": 0.0}
