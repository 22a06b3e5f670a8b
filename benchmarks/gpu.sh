#!/bin/sh
# What only a GPU can say, in one command, offline, in at most 8 minutes: build, property tests, sanitizers, times.
# Run: make gpu   or   PYTHON=python3 sh benchmarks/gpu.sh      (never run on a GPU yet)
# You should see the tests pass, three sanitizers report 0 errors, a line for each shape; results/gpu.jsonl grows.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export OMP_NUM_THREADS=4

MINIREFT_CUDA=1 "$PYTHON" setup.py -q build_ext --inplace
timeout 200 "$PYTHON" -m pytest -q -m gpu

if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck initcheck; do
    echo "compute-sanitizer $tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PYTHON" benchmarks/gpu.py --suite
  done
else
  echo "no compute-sanitizer here: memory, races and initialisation were NOT checked"
fi

timeout 150 "$PYTHON" benchmarks/gpu.py --write
