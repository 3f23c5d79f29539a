#!/usr/bin/env bash
# The GPU check, in three runs, for machines that are lent by the minute. Look at what one wrote before the next.
#   bash tests/benchmarks/gpu_check.sh 1   (<= 300 s)  does it run, is it right
#   bash tests/benchmarks/gpu_check.sh 2   (<= 330 s)  speed beside others, profile
#   bash tests/benchmarks/gpu_check.sh 3   (<= 120 s)  what is left: ideas, running out of memory
# From the top of the checkout. Everything goes to $OUT; each stage writes its own JSON as it goes, so that a stop loses little.
# Wheels that a bare machine with torch lacks may lie in .whl/ at the top of the checkout.
# DEVICE=cpu is a smoke run of every stage. May be set too: PYTHON, MODELS, MODELS_PROFILE, WORKERS (processes of the GPU tests),
# PATIENCE (a whole number that every time limit is multiplied by).
set -u -o pipefail
here="$(cd "$(dirname "$0")" && pwd)"
cd "$here/../.."
export OUT="${OUT:-out}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
export NUMBA_CACHE_DIR="${TMPDIR:-/tmp}/numba" PYTHONPATH="$PWD/src:$PWD/adapters${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"
DEVICE="${DEVICE:-cuda}" PYTHON="${PYTHON:-python3}" WORKERS="${WORKERS:-6}" PATIENCE="${PATIENCE:-1}"
if [ -d .whl ]; then
  site="${TMPDIR:-/tmp}/site"
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl || exit 3
  # Receipts ask importlib.metadata for the version of the package; a checkout that is not installed has none.
  mkdir -p "$site"/cellfm_hub-0.1.0.dist-info
  printf 'Metadata-Version: 2.1\nName: cellfm-hub\nVersion: 0.1.0\n' > "$site"/cellfm_hub-0.1.0.dist-info/METADATA
  export PYTHONPATH="$site:$PYTHONPATH"
fi

stage() { # stage LIMIT SECONDS NAME [OPTIONS]: begins nothing new after SECONDS, is stopped after LIMIT
  local limit=$(($1 * PATIENCE)) seconds=$(($2 * PATIENCE)) name=$3
  shift 3
  timeout --signal=INT "$limit" "$PYTHON" "$here/gpu_check.py" "$name" --seconds "$seconds" --device "$DEVICE" --out "$OUT" "$@" 2>&1 |
    grep -v -i "warn" | tee "$OUT/$name.log" | cut -c1-1500
}

case "${1:-1}" in
1)
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv 2>/dev/null
  stage 120 100 correct
  # The project's own GPU tests: six processes; flex compiles in each. -x is left out: all failures are wanted.
  timeout --signal=INT $((170 * PATIENCE)) "$PYTHON" -m pytest -m gpu tests/test_gpu.py -q -n "$WORKERS" -p no:cacheprovider \
    --basetemp "${TMPDIR:-/tmp}/gpu-tests" -W ignore::DeprecationWarning 2>&1 |
    tee "$OUT/test_gpu.log" | grep -E "^(FAILED|ERROR|[0-9]+ |=+ |E  )|centred" | tail -60
  ;;
2)
  stage 235 190 encoders --models "${MODELS:-scgpt-human,geneformer-v1-10m,geneformer-v2-104m,dnabert2-117m,nt-v2-500m-multi-species,uce-4l,scfoundation-01b}"
  stage 90 75 profile --models "${MODELS_PROFILE:-geneformer-v1-10m,scgpt-human,dnabert2-117m,nt-v2-500m-multi-species}"
  ;;
3)
  stage 30 30 oom
  stage 90 80 ideas
  ;;
*)
  echo "gpu_check.sh $1: expected 1, 2 or 3" >&2
  exit 2
  ;;
esac
ls -la "$OUT"
