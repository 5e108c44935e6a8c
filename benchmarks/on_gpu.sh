#!/usr/bin/env bash
# Every GPU test and every benchmark, each within its share of 8 minutes on one H100; results packed into few files.
#
#   bash benchmarks/on_gpu.sh                           all of it, in full
#   ONLY="mfu optimizer_step" bash benchmarks/on_gpu.sh some of it
#   MFU="--models llama_1_2b --seconds 20" ONLY=mfu bash benchmarks/on_gpu.sh
#   DEVICE=cpu QUICK=1 bash benchmarks/on_gpu.sh        does the script itself run? no GPU needed
#
# mfu takes the time that is left and has more parts than fit: copy its mfu-parts.json to benchmarks/results/, and the
# next call measures only what is missing there.
#
# What fails or takes too long is said and does not stop the rest; the exit code is then 1. $OUT (default on_gpu_out)
# receives on_gpu.md, on_gpu.json, mfu-parts.json and on_gpu.tar.gz, which holds every page, picture and log.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} QUICK=${QUICK:-} OUT=${OUT:-on_gpu_out} MFU=${MFU:-} ONLY=${ONLY:-}
LIMIT=${LIMIT:-${QUICK:+1200}} LIMIT=${LIMIT:-470} # seconds for all
BENCHMARKS="optimizer_step train_loop data_loading memory checkpointing callback_overhead protections"
declare -A SHARE=([tests]=100 [optimizer_step]=120 [train_loop]=60 [data_loading]=20 [memory]=45 [checkpointing]=40
  [callback_overhead]=20 [protections]=50 [mfu]=$LIMIT) # seconds at most: 455 before mfu; a page is written with every row or table
declare -A WORK=(                      # what fits into that, by estimate
  [optimizer_step]="--sets 27M 124M --rounds 9"
  [train_loop]="--rounds 4 --warm 1"
  [data_loading]="--lengths 4096 --rounds 3 --block-s 0.3"
  [memory]="--optimizers torch-adamw adamw lion"
  [checkpointing]="--modes off full --rounds 3"
  [callback_overhead]="--rounds 8"
  [protections]="--rounds 2 --warm 1 --block 20"
)
[[ -n $QUICK ]] && for name in "${!SHARE[@]}"; do SHARE[$name]=150 WORK[$name]=--quick; done
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [[ $DEVICE == cpu ]]; then
  export CUDA_VISIBLE_DEVICES=""
else
  nvidia-smi --query-gpu=name,memory.total,driver_version,power.limit --format=csv,noheader || {
    echo "no NVIDIA GPU here: DEVICE=cpu QUICK=1 tries the script without one" >&2
    exit 2
  }
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
results=$work/results site=$work/site
mkdir -p "$results" "$OUT"
if compgen -G ".whl/*.whl" >/dev/null; then
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --target "$site" .whl/*.whl || exit 2
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
"$PYTHON" - "$DEVICE" <<'PY' || exit 2
import importlib.metadata as metadata
import platform
import sys

needed = ["torch", "lightning", "torchmetrics", "transformers", "hydra-core", "omegaconf", "safetensors", "tokenizers"]
useful = ["grain", "datasets", "lm_eval", "accelerate", "pytest", "triton", "lion-pytorch", "torch-optimi", "pytorch_optimizer", "bitsandbytes"]


def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


found = {name: version(name) for name in needed + useful}
print(f"Python {platform.python_version()},", ", ".join(f"{name} {number}" for name, number in found.items() if number))
missing = [name for name, number in found.items() if number is None]
if missing:
    print("missing:", ", ".join(missing), "(fetch them with: bash benchmarks/gpu_wheels.sh, and take .whl along)")
if any(found[name] is None for name in needed):
    sys.exit(1)
import torch

if sys.argv[1] != "cpu" and not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no CUDA GPU")
PY

failed=() started=$SECONDS
wanted() { [[ -z $ONLY || " $ONLY " == *" $1 "* ]]; }
step() { # name, command ...: within its share and what is left
  local name=$1 left=$((LIMIT - SECONDS + started)) began=$SECONDS code
  shift
  local share=${SHARE[$name]}
  ((share > left)) && share=$left
  if ((share < 10)); then
    echo "$name: SKIPPED, the time is up"
    failed+=("$name")
    return
  fi
  timeout -k 10 "$share" "$@" >"$results/$name.log" 2>&1
  code=$?
  if ((code == 0)); then
    echo "$name: ok, $((SECONDS - began)) s"
    return
  fi
  failed+=("$name")
  ((code == 124 || code == 137)) && echo "$name: TOOK LONGER than its $share s" || echo "$name: FAILED with $code"
  tail -n 15 "$results/$name.log" | sed 's/^/    /'
}

if wanted tests; then
  mapfile -t files < <(grep -rlE "mark\.gpu" tests --include='test_*.py' | sort)
  step tests "$PYTHON" -m pytest -m gpu -p no:cacheprovider -rs --durations=10 "${files[@]}"
  grep -E "passed|failed|skipped|error" "$results/tests.log" | tail -n 1
fi
for name in $BENCHMARKS; do
  wanted "$name" || continue
  if [[ ! -e benchmarks/$name.py ]]; then
    echo "$name: there is no such benchmark yet"
    continue
  fi
  # shellcheck disable=SC2086  # words
  step "$name" "$PYTHON" -m "benchmarks.$name" ${WORK[$name]} --out "$results"
done

# shellcheck disable=SC2086  # $MFU is words
if wanted mfu; then # what time is left; parts that were measured before, and travelled along, are not measured again
  if [[ -n $QUICK ]]; then
    step mfu "$PYTHON" -m benchmarks.mfu --quick --out "$results" $MFU
  else
    cp benchmarks/results/mfu-parts.json "$results/" 2>/dev/null
    step mfu "$PYTHON" -m benchmarks.mfu --seconds 6 --limit 90 --budget $((LIMIT - SECONDS + started - 95)) \
      --out "$results" $MFU
  fi
  grep -E "^[a-z0-9_]+ (ours|trainer)" "$results/mfu.log" 2>/dev/null
fi

"$PYTHON" - "$results" "$OUT" <<'PY'
import json
import sys
from pathlib import Path

results, out = map(Path, sys.argv[1:])
pages = sorted(results.glob("*.md"))
(out / "on_gpu.md").write_text("\n\n".join(page.read_text(encoding="utf-8") for page in pages), encoding="utf-8")
found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))}
(out / "on_gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
print(f"{len(pages)} pages, {len(found)} JSON files:", ", ".join(found))
PY
cp "$results/mfu-parts.json" "$OUT/" 2>/dev/null
tar -czf "$OUT/on_gpu.tar.gz" -C "$results" .
echo "written to $OUT in $((SECONDS - started)) s"
if ((${#failed[@]})); then
  echo "not done: ${failed[*]}"
  exit 1
fi
