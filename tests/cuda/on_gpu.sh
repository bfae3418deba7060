#!/usr/bin/env bash
# All that needs an NVIDIA GPU, in one run from a checkout: install for the GPU found, test, sanitize, bench. Writes into
# build/on-gpu the logs, summary.txt, the bench's report, and report.md, which puts predictions beside what was measured;
# exits non-zero if anything failed or was missing.
#
#   tests/cuda/on_gpu.sh
#
# Needs a driver, nvcc and compute-sanitizer (the CUDA toolkit; on the PATH or in /usr/local/cuda/bin), g++ and python3
# with venv. The test extra pins torch, and pip's default torch on Linux has CUDA. Where the driver is too old for it:
#   TORCH_INDEX=https://download.pytorch.org/whl/cu126 tests/cuda/on_gpu.sh
# Without a network, an interpreter that has what pyproject.toml's test extra and build-system name (torch >= 2.10):
#   PYTHON=/opt/torch/bin/python tests/cuda/on_gpu.sh
# What lives elsewhere: the tests that need no GPU (.ci/run), what each stage can show (docs/cuda.md).
# shellcheck disable=SC2329  # functions are called by name, by step
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
out=$PWD/build/on-gpu
rm -rf "$out" && mkdir -p "$out" || exit 1
export PATH=$PATH:/usr/local/cuda/bin FUSIONSUM_REQUIRE_NATIVE=1
unset FUSIONSUM_BACKEND FUSIONSUM_TEST_DEVICE
failures=0

# step NAME COMMAND...: its output goes to NAME.log, its result and its last line to the summary.
step() {
  local name=$1 log=$out/$1.log start=$SECONDS result=passed
  shift
  printf '== %s\n' "$name"
  if ! "$@" >"$log" 2>&1; then
    result=FAILED
    failures=$((failures + 1))
    tail -n 60 "$log"
  fi
  printf '%-18s %-6s %4d s  %s\n' "$name" "$result" $((SECONDS - start)) "$(tail -n 1 "$log")" |
    tee -a "$out/summary.txt"
  [ "$result" = passed ]
}

finish() {
  printf '\n== summary\n'
  cat "$out/summary.txt"
  [ ! -e "$out/bench/bench.md" ] || cat "$out/bench/bench.md"
  "${PYTHON:-python3}" -m tests.cuda.report "$out" && printf 'report: %s\n' "$out/report.md"
  printf '%d failed; logs in %s\n' "$failures" "$out"
  exit $((failures > 0))
}

tools() {
  local tool missing=0
  for tool in nvidia-smi nvcc compute-sanitizer g++; do
    command -v "$tool" || { echo "missing: $tool" && missing=1; }
  done
  nvidia-smi && nvcc --version && return "$missing"
}

install() {
  local capabilities architectures
  capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader) || return 1
  architectures=$(tr -d '. ' <<<"$capabilities" | sort -un | paste -sd ';')
  local options=(-C cmake.define.FUSIONSUM_CUDA=ON -C "cmake.define.FUSIONSUM_CUDA_ARCHITECTURES=$architectures")
  if [ -n "${PYTHON:-}" ]; then
    "$python" -m pip install . --no-deps --no-build-isolation --target "$out/site" "${options[@]}"
    return
  fi
  python3 -m venv "$out/venv" || return 1
  if [ -n "${TORCH_INDEX:-}" ]; then
    "$python" -m pip install torch==2.13.0 --index-url "$TORCH_INDEX" || return 1
  fi
  "$python" -m pip install ".[test]" "${options[@]}"
}

# Else every test on the GPU would be skipped, and pass.
usable() {
  "$python" - <<'PYTHON'
import torch

import fusionsum as fs

print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPUs")
print(fs.backends()["cuda"])
raise SystemExit(not torch.cuda.is_available() or fs.backends()["cuda"] != "usable")
PYTHON
}

tests() { "$python" -m pytest -q -p no:cacheprovider "$@"; }

# Each allocation its own, for within a block of torch's allocator all is allowed. initcheck must see torch's kernels write.
sanitized() {
  local tool=$1 report=$out/$1.txt
  local options=(--tool "$tool" --error-exitcode 1 --report-api-errors no --log-file "$report")
  [ "$tool" = initcheck ] || options+=(--kernel-regex kns=fusionsum)
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer "${options[@]}" \
    "$python" -m pytest -q -p no:cacheprovider tests/cuda/test_on_gpu.py tests/cuda/test_on_gpu_scores.py \
    -k "every_kernel or several_blocks or every_step" || return 1
  tail -n 1 "$report"
  grep -q 'SUMMARY: 0 ' "$report"
}

python=${PYTHON:-$out/venv/bin/python}
[ -z "${PYTHON:-}" ] || export PYTHONPATH=$out/site
step tools tools
step install install || finish
step usable usable || finish
step info "$python" -m fusionsum

# The offsets' test reserves rows 2^33 bytes apart; of the instruction sets only a CPU knows.
selection="not instruction"
memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | sort -n | head -n 1)
if [ "${memory:-0}" -lt 40000 ]; then
  selection="$selection and not offsets_beyond"
  echo "left out: test_offsets_beyond_two_to_the_31, for which ${memory:-0} MiB are too few" | tee -a "$out/summary.txt"
fi
for file in kernel formula layouts score_kernels losses search; do
  FUSIONSUM_TEST_DEVICE=cuda step "test_$file" tests -k "$selection" "tests/test_$file.py"
done
step test_on_gpu tests -rs tests/cuda/test_on_gpu.py
step test_on_gpu_scores tests -rs tests/cuda/test_on_gpu_scores.py
for tool in memcheck racecheck synccheck initcheck; do
  step "$tool" sanitized "$tool"
done
step bench "$python" -m bench --device cuda --out "$out/bench"
finish
