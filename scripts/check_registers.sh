#!/usr/bin/env bash
# Compiles every CUDA kernel and holds what ptxas reports against the table below: no spills, no stack, registers
# within the kernel's budget. Needs nvcc, no GPU.
# usage: check_registers.sh [-v] [ARCHITECTURE...]     for example: check_registers.sh -v sm_90
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Most registers a thread, by kernel. A multiprocessor has 65536: a budget of b lets 65536 / b threads run at once.
budgets="
adamw_kernel                      48
clip_scale_kernel                 40
combine_backward_kernel           64
combine_forward_kernel            64
dispatch_forward_kernel           40
dora_backward_kernel              64
dora_magnitude_kernel             40
dora_norm_kernel                  64
dropout_kernel                    40
grad_norm_kernel                  40
lora_backward_kernel             255
lora_expand_kernel               128
lora_outer_kernel                255
lora_shrink_kernel               168
loss_sum_kernel                   40
rms_norm_backward_kernel          64
rms_norm_forward_kernel           64
rms_norm_weight_backward_kernel   64
rope_kernel                       64
router_backward_kernel            40
router_count_kernel               40
router_forward_kernel             64
router_place_kernel               40
router_scan_kernel                40
row_squares_kernel                40
softmax_loss_kernel               64
split_sum_kernel                  40
swiglu_backward_kernel            64
swiglu_forward_kernel             64
"

verbose=
if [ "${1:-}" = -v ]; then verbose=1 && shift; fi
architectures=("$@")
if [ $# = 0 ]; then architectures=(sm_80 sm_90); fi
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

compile() { # FILE ARCHITECTURE LOG
  nvcc -std=c++20 -O3 -cubin -arch="$2" -I"$root/cuda" -I"$root/include" -Werror all-warnings -Xptxas -v \
    -o "$3.cubin" "$1" >"$3.log" 2>&1 || { cat "$3.log" >&2 && return 1; }
}
export -f compile
export root
for file in "$root"/cuda/*.cu; do
  for architecture in "${architectures[@]}"; do
    printf '%s %s %s\n' "$file" "$architecture" "$logs/$(basename "$file" .cu).$architecture"
  done
done | xargs -P "$(nproc)" -L 1 bash -c 'compile "$0" "$1" "$2"'

cat "$logs"/*.log | c++filt | awk -v verbose="$verbose" -v budgets="$budgets" '
  BEGIN {
    count = split(budgets, words)
    for (i = 1; i < count; i += 2) budget[words[i]] = words[i + 1]
  }
  /Compiling entry function/ {
    match($0, /[a-z0-9_]+_kernel[^(]*/)
    instance = substr($0, RSTART, RLENGTH)
    name = instance
    sub(/[^a-z0-9_].*/, "", name)
    match($0, /sm_[0-9a-z]+/)
    architecture = substr($0, RSTART, RLENGTH)
  }
  /bytes stack frame/ && !/^ *0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads/ {
    print "registers: no spills, no stack; got" $0 " in " instance " (" architecture ")"
    failures++
  }
  /Used [0-9]+ registers/ {
    match($0, /Used [0-9]+/)
    used = substr($0, RSTART + 5, RLENGTH - 5) + 0
    kernels++
    if (used > most[name]) most[name] = used
    if (verbose) printf "%4d registers  %-6s %s\n", used, architecture, instance
    if (!(name in budget)) {
      print "registers: every kernel needs a budget; got none for " name
      failures++
    } else if (used > budget[name]) {
      print "registers: at most " budget[name] "; got " used " in " instance " (" architecture ")"
      failures++
    }
  }
  END {
    for (name in most) printf "%-32s at most %3d of %3d registers\n", name, most[name], budget[name]
    if (failures || !kernels) exit 1
    print "registers: " kernels " kernels within their budgets, no spills"
  }'
