#!/usr/bin/env bash
# Trains every method on SmolLM2 and the quickstart's text with the same budget and writes a section of docs/results.md.
# usage: compare_methods.sh [--hf-python PYTHON --hf-train SCRIPT --hf-model FOLDER] [OPTION of compare_methods.py...]
# With the three hf options PEFT's figures stand beside graft's. About an hour on 2 cores; started again after a stop it
# goes on where it was. Runs are kept in out/compare.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

script=compare_methods.py
if [ "${1:-}" = --script ]; then
  script=$2
  shift 2
fi
"$root/scripts/setup.sh" --model
configure_release
say "build finetune"
cmake --build "$root/build" --parallel "$(nproc)" --target finetune >&2
say "train every row with every learning rate"
python3 "$root/scripts/$script" --finetune "$root/build/bin/finetune" --model "$(model_file)" \
  --text "$text" --output "$root/docs/results.md" --work "$root/out/compare" "$@"
say "docs/results.md has its section"
