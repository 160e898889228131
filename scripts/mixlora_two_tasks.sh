#!/usr/bin/env bash
# Trains one MixLoRA and one LoRA of as many parameters on two texts and writes a section of docs/results.md
# (--output FILE: of that one).
# usage: mixlora_two_tasks.sh [OPTION of mixlora_two_tasks.py...]
# About five minutes on 2 cores; started again after a stop it goes on where it was. Runs are kept in out/compare.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

verse=$root/data/songs-poems.txt

get_verse() {
  [ -s "$verse" ] && return
  say "text: unpacking the Debian package fortunes into data/ (nothing is installed)"
  unpack_package fortunes cp usr/share/games/fortunes/songs-poems "$verse"
}

"$root/scripts/setup.sh" --model
get_verse
configure_release
say "build the programs"
cmake --build "$root/build" --parallel "$(nproc)" --target finetune evaluate >&2
say "train both adapters"
python3 "$root/scripts/mixlora_two_tasks.py" --finetune "$root/build/bin/finetune" --evaluate "$root/build/bin/evaluate" \
  --model "$(model_file)" --text "$text" --other "$verse" --output "$root/docs/results.md" --work "$root/out/compare" "$@"
say "the section is written"
