"""Stand-in: of LiteLLM only what our probe asks it."""

from __future__ import annotations

import os
from typing import Any


def validate_environment(model: str) -> dict[str, Any]:
    missing = [] if "/" in model or "OPENAI_API_KEY" in os.environ else ["OPENAI_API_KEY"]
    return {"keys_in_environment": not missing, "missing_keys": missing}
