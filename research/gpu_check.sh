#!/usr/bin/env bash
# What is to be seen on a GPU, by value, in 9 minutes at most: on a bare machine with Python 3.12, torch and transformers,
# without a network. Each step has a limit of its own; its output is written as it comes, and a second call goes on behind
# the steps that are done.
#
#   research/gpu_check.sh [--out DIR] [--rehearse]   run it; --rehearse: the same code on a CPU, with tiny shapes
#   research/gpu_check.sh --collect                  fetch the wheels that such a machine lacks, into wheels/
set -u
cd "$(dirname "$0")/.."
out=gpu-check rehearse= minutes=${MINUTES:-9}
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$2; shift ;;
    --rehearse) rehearse=--rehearse ;;
    --collect)
      exec python3 -m pip download --quiet --dest wheels --only-binary=:all: --python-version 3.12 --no-deps \
        accelerate annotated-types hypothesis iniconfig markdown-it-py mdurl pluggy psutil pydantic pydantic-core pygments \
        pytest pytest-timeout rich scipy shellingham sortedcontainers tomli-w typer typing-inspection \
        typing-extensions ;;
    *) echo "$0: unknown option $1" >&2; exit 2 ;;
  esac
  shift
done
mkdir -p "$out"
export PYTHONPATH=$PWD/src:$PWD OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}

if [ -z "$rehearse" ] && [ -d wheels ]; then
  # The machine's own torch and transformers stay: wheels only add what it lacks.
  [ -d "$out/venv" ] || python3 -m venv --system-site-packages "$out/venv"
  PYTHON=$out/venv/bin/python
  "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links wheels wheels/*.whl || exit 1
fi

step() {  # NAME SECONDS COMMAND…
  local name=$1 limit=$2 left=$((minutes * 60 - SECONDS)) start=$SECONDS code
  shift 2
  [ -e "$out/$name.done" ] && { echo "$name: done before"; return; }
  [ "$left" -lt 5 ] && { echo "$name: no time left" | tee -a "$out/summary.txt"; return; }
  [ "$limit" -gt "$left" ] && limit=$left
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.txt" 2>&1
  code=$?
  [ "$code" = 0 ] && touch "$out/$name.done"
  echo "$name: exit $code after $((SECONDS - start)) s of $limit" | tee -a "$out/summary.txt"
}

if [ -n "$rehearse" ]; then
  large=shape:llama-68m#2 small=shape:llama-68m device=cpu tokens=4 repeats=1 batch=1,2 contexts=64,128
else
  large=shape:qwen2.5-3b small=shape:qwen2.5-1.5b device=cuda tokens=64 repeats=3 batch=1,16 contexts=512,4096
fi
bench() { echo "$PYTHON -m research.benchmark -m $large -m $small --device $device --tokens $tokens --repeats $repeats"; }

step machine 30 "$PYTHON" -c 'import platform, sys, torch, transformers
print(platform.platform(), sys.version, torch.__version__, transformers.__version__)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA")'
step captured-is-eager 90 "$PYTHON" -m research.scripts.graphs_check $rehearse
step rivals 150 $(bench) --rivals --output "$out/rivals.json"
step batch 120 $(bench) --sweep batch --at $batch --output "$out/batch.json"
step tests 150 "$PYTHON" -m pytest -q -x -p no:cacheprovider -o addopts= \
  tests/engines/test_cuda_graphs.py tests/engines/test_device_topk.py -k "not models"
step eager 60 $(bench) --graphs off --output "$out/eager.json"
step context 90 $(bench) --sweep context --at $contexts --output "$out/context.json"
step speculative 60 $(bench) --agreement 0.8 --methods mixture,speculative --output "$out/speculative.json"
step weights 60 $(bench) --sweep weights --output "$out/weights.json"
echo "results are in $out"
[ -e "$out/captured-is-eager.done" ] && [ -e "$out/rivals.done" ] && [ -e "$out/batch.done" ]
