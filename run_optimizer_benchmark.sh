#!/usr/bin/env bash
# The article's AdamW against Lion on GLM-4.5-Air, where its readers look for it:
#   ./run_optimizer_benchmark.sh --model_size nano --epochs 10      # a small one, for 2 cores
# Sizes: nano | mini | air | 120b (the article's word for air). --help says the rest; PYTHON=... picks the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
exec "$PYTHON" -m recipes.glm45_air_adamw_vs_lion "$@"
