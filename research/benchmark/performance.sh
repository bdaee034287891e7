#!/bin/sh
# All measurements of docs/performance.md: research/benchmark/performance.sh cpu, or gpu. What is finished is not run again.
# Each writes one report to docs/performance; then tables and figures are made of them and put into the page.
#   PYTHON  what runs mixlm, .venv/bin/python unless it is set; the figures need its matplotlib
#   ONLY    names of the measurements to take, with blanks between them
#   TIMES   repeats of each, where others are wanted
set -eu
cd "$(dirname "$0")/../.."
kind=${1:-cpu}
out=docs/performance
python=${PYTHON:-.venv/bin/python}
export OMP_WAIT_POLICY=PASSIVE PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"

measure() {
    name=$1
    shift
    case " ${ONLY:-$name} " in *" $name "*) ;; *) return 0 ;; esac
    if [ -s "$out/$name.json" ]; then
        echo "$name: finished before"
        return 0
    fi
    # --repeats is always the last option below.
    [ -z "${TIMES:-}" ] || set -- $(echo "$@" | sed "s/--repeats [0-9]*\$/--repeats $TIMES/")
    echo "== $name: python -m research.benchmark $*"
    begin=$(date +%s)
    "$python" -m research.benchmark "$@" --output "$out/$name.json"
    echo "== $name: $(($(date +%s) - begin)) s"
}

mkdir -p "$out"
case $kind in
cpu)
    measure cpu-methods --methods all --rivals --tokens 64 --repeats 5
    measure cpu-shapes -m shape:qwen2.5-1.5b -m shape:qwen2.5-0.5b --methods all --rivals --tokens 32 --repeats 3
    measure cpu-speculative -m shape:llama-160m -m shape:qwen2.5-3b --agreement 0.8 --block 4 --methods mixture,speculative,single --tokens 64 --repeats 5
    measure cpu-drafted -m shape:llama-160m -m shape:qwen2.5-3b --agreement 0.8 --methods greedy,drafted --tokens 64 --repeats 3
    measure cpu-one-size -m gemma-3-270m -m gemma-3-270m --each --tokens 64 --repeats 5
    measure cpu-batch-demo --sweep batch --at 1,4,16,64 --tokens 32 --repeats 3
    measure cpu-batch-two -m shape:smollm2-360m -m shape:smollm2-360m#2 --sweep batch --at 1,4,16 --tokens 32 --repeats 3
    measure cpu-batch-three -m shape:smollm2-360m -m shape:smollm2-360m#2 -m shape:smollm2-360m#3 --sweep batch --at 1,4,16 --methods conventional,mixture --tokens 32 --repeats 3
    measure cpu-context --sweep context --at 256,512,1024,2048,4096,8192 --tokens 16 --repeats 3
    measure cpu-members -m shape:smollm2-360m --sweep members --at 1,2,3,4,6,8 --tokens 32 --repeats 3
    measure cpu-weights -m shape:qwen2.5-1.5b -m shape:llama-68m --agreement 0.8 --sweep weights --methods mixture,speculative --tokens 32 --repeats 3
    measure cpu-devices --sweep devices --tokens 32 --repeats 3
    ;;
gpu)
    measure gpu-methods -m shape:qwen2.5-3b -m shape:qwen2.5-1.5b --dtype bfloat16 --device cuda --methods all --rivals --tokens 256 --repeats 5
    measure gpu-eager -m shape:qwen2.5-3b -m shape:qwen2.5-1.5b --dtype bfloat16 --device cuda --graphs off --tokens 256 --repeats 5
    measure gpu-speculative -m shape:qwen2.5-0.5b -m shape:qwen2.5-7b --dtype bfloat16 --device cuda --agreement 0.8 --methods mixture,speculative,single --tokens 256 --repeats 5
    measure gpu-batch -m shape:qwen2.5-3b -m shape:qwen2.5-3b#2 --dtype bfloat16 --device cuda --sweep batch --at 1,4,16,64 --tokens 64 --repeats 3
    measure gpu-context -m shape:qwen2.5-3b -m shape:qwen2.5-1.5b --dtype bfloat16 --device cuda --sweep context --at 256,1024,4096,8192 --tokens 64 --repeats 3
    measure gpu-members -m shape:qwen2.5-1.5b --dtype bfloat16 --device cuda --sweep members --at 1,2,4,8 --tokens 64 --repeats 3
    measure gpu-weights -m shape:qwen2.5-3b -m shape:qwen2.5-0.5b --dtype bfloat16 --device cuda --agreement 0.8 --sweep weights --methods mixture,speculative --tokens 64 --repeats 3
    measure gpu-devices -m shape:qwen2.5-3b -m shape:qwen2.5-1.5b --dtype bfloat16 --sweep devices --tokens 256 --repeats 5
    ;;
*)
    echo "usage: research/benchmark/performance.sh cpu|gpu" >&2
    exit 2
    ;;
esac
"$python" -m research.benchmark.page
