#!/usr/bin/env bash
# Fetches into .whl what a GPU machine without a registry lacks: Linux x86-64, CPython 3.12, PyTorch, Lightning and the
# usual scientific packages already there. Versions are those of constraints.txt. Run it where pip works.
#
#   bash benchmarks/gpu_wheels.sh            then take .whl along, and there: bash benchmarks/on_gpu.sh
#   EXTRA="zstandard wandb" bash benchmarks/gpu_wheels.sh
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
LIMIT_MIB=${LIMIT_MIB:-64} # what may travel in one call, the working tree included

WHEELS="hydra-core omegaconf transformers grain array_record portpicker datasets dill multiprocess
  lm_eval evaluate nltk defusedxml more-itertools pytablewriter DataProperty mbstrdecoder tabledata tcolorpy typepy
  pathvalidate chardet"
SOURCES="antlr4-python3-runtime rouge_score sqlitedict word2number" # no wheels of theirs exist; all are plain Python
PEERS="lion-pytorch pytorch_optimizer torch-optimi"                 # what benchmarks/optimizer_step compares with

platforms=()
for tag in manylinux_2_{28,27,24,17}_x86_64 manylinux2014_x86_64 manylinux1_x86_64; do platforms+=(--platform "$tag"); done
rm -rf .whl
mkdir .whl
# shellcheck disable=SC2086  # lists of names
"$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
  --implementation cp "${platforms[@]}" -c constraints.txt -d .whl $WHEELS $PEERS ${EXTRA:-}
# shellcheck disable=SC2086
"$PYTHON" -m pip wheel --quiet --disable-pip-version-check --no-deps -c constraints.txt -w .whl $SOURCES

if ls .whl | grep -v -e '-any\.whl$' -e 'x86_64\.whl$'; then
  echo "these were built for this machine, not for the GPU's" >&2
  exit 1
fi
whl=$(du -sk .whl | cut -f1)
tree=$(git ls-files -z --cached --others --exclude-standard -- ':!.whl' 2>/dev/null | du -ck --files0-from=- 2>/dev/null | tail -1 | cut -f1)
echo "$(ls .whl | wc -l) wheels, $((whl / 1024)) MiB; the working tree $((${tree:-0} / 1024)) MiB"
if (((whl + ${tree:-0}) / 1024 >= LIMIT_MIB)); then
  echo "together more than $LIMIT_MIB MiB: leave some out" >&2
  exit 1
fi
git check-ignore -q .whl 2>/dev/null || echo "git does not ignore .whl yet: echo /.whl/ >>.git/info/exclude"
