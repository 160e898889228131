#!/usr/bin/env bash
# Everything that only a GPU can tell, in one run: builds with the kernels, runs every CUDA test on the device, the small
# ones under compute-sanitizer too, and times a LoRA layer against its frozen products and against PEFT. Needs a CUDA
# toolkit, cmake, ninja and a LibTorch >= 2.11 with CUDA (LIBTORCH_ROOT, or the torch of python3); no network. The other
# headers and libraries of docs/dependencies.md are taken from .deps/gpu where they are not installed.
# usage: gpu_check.sh [BUILD_FOLDER]      results: BUILD_FOLDER/gpu_check.json
#        gpu_check.sh --pack              fills .deps/gpu from this machine's packages, for a machine that has none
# exit code: 0 all passed, 1 something failed, 77 there is no GPU on this machine
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
pack=$deps/gpu

# Everything but CUDA and LibTorch, which brings fmt: headers, and static libraries, so that nothing is looked for when a
# program starts.
pack_dependencies() {
  local header library
  mkdir -p "$pack/include" "$pack/lib"
  for header in nlohmann CLI catch2 pcre2.h utf8proc.h; do
    cp -r "/usr/include/$header" "$pack/include/"
  done
  for library in pcre2-8 utf8proc; do
    cp "$(c++ -print-file-name="lib$library.a")" "$pack/lib/"
  done
  say "$pack: $(du -sh "$pack" | cut -f1); copy it along with the project"
}

if [ "${1:-}" = --pack ]; then
  pack_dependencies
  exit
fi
build=${1:-$root/build-cuda}

if ! command -v nvidia-smi >/dev/null || ! gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1) ||
  [ -z "$gpu" ]; then
  echo "gpu_check: no GPU on this machine; nothing was checked"
  exit 77
fi
command -v nvcc >/dev/null || die "nvcc must be on PATH; got none"

say "GPU: $gpu"
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
torch=$(libtorch_root)
if [ -n "$torch" ]; then export LIBTORCH_ROOT=$torch; fi
targets=(cuda_device_kernels cuda_device_library cuda_layer finetune)
(cd "$root" && cmake --preset cuda -B "$build" -DCMAKE_CUDA_ARCHITECTURES="$capability-real" -DCMAKE_PREFIX_PATH="$pack" >&2)
cmake --build "$build" --target "${targets[@]}" >&2

logs=$build/gpu_check
mkdir -p "$logs"
failed=()
# check NAME COMMAND...: runs it, keeps its output, remembers a failure.
check() {
  local name=$1 start=$SECONDS
  shift
  if "$@" >"$logs/$name.log" 2>&1; then
    say "$name passed ($((SECONDS - start)) s)"
  else
    say "$name FAILED: $(tail -n 3 "$logs/$name.log" | tr '\n' ' ')"
    failed+=("$name")
  fi
}

# The same ten steps on both devices, on the GPU also as a graph: the largest relative difference of a step's loss.
compare_devices() {
  local goldens=$root/tests/goldens/programs run device
  for run in cpu cuda "cuda --cuda-graph"; do
    device=${run/ --cuda-/_}
    rm -rf "$logs/finetune_$device"
    # shellcheck disable=SC2086  # a device and perhaps a flag
    "$build/bin/finetune" --model "$goldens/tiny" --data "$goldens/text.txt" --steps 10 --batch-size 2 --seq-len 32 \
      --dropout 0.1 --device $run --output "$logs/finetune_$device" --quiet
    grep -o '"loss":[0-9.]*' "$logs/finetune_$device/metrics.jsonl" | cut -d: -f2 >"$logs/losses_$device"
  done
  paste "$logs/losses_cpu" "$logs/losses_cuda" "$logs/losses_cuda_graph" | awk '
    { for (i = 2; i <= 3; ++i) { d = ($1 - $i) / $1; if (d < 0) d = -d; if (d > worst) worst = d } }
    END { print "largest relative difference of a loss: " worst + 0; exit !(NR == 10 && NF == 3 && worst < 1e-4) }'
}

check kernels "$build/bin/cuda_device_kernels"
check library "$build/bin/cuda_device_library"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    check "$tool" timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$build/bin/cuda_device_kernels" "[dropout],[decoder]"
  done
else
  say "no compute-sanitizer on PATH; left out"
fi
check finetune compare_devices
check timing "$build/bin/cuda_layer"
cat "$logs/timing.log" >&2
if python3 -c 'import peft, torch' 2>/dev/null; then
  check peft timeout 120 python3 "$root/scripts/gpu_check_peft.py"
  cat "$logs/peft.log" >&2
else
  say "no PEFT for python3; left out"
fi

json_lines() { if [ -f "$1" ]; then grep '^{' "$1" | paste -sd, || true; fi; }
quoted() { if [ $# -gt 0 ]; then printf '"%s"\n' "$@" | paste -sd,; fi; }
cat >"$build/gpu_check.json" <<JSON
{"gpu": "$gpu", "capability": $capability, "failed": [$(quoted "${failed[@]}")],
 "timing": [$(json_lines "$logs/timing.log")],
 "peft": [$(json_lines "$logs/peft.log")]}
JSON
say "results in $build/gpu_check.json"
[ ${#failed[@]} = 0 ]
