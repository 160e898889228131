#!/usr/bin/env bash
# From a bare Debian 12 to a fine-tuned model: installs, builds, trains for a few minutes on the CPU, shows the result.
# usage: quickstart.sh
# Ends with 0 only if the held-out loss fell clearly and the model speaks differently afterwards.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ $# = 0 ] || { printf 'error: quickstart.sh takes no argument; got %s\n' "$1" >&2; exit 2; }

output=$root/out/quickstart
prompt='LOVE, n.'

"$root/scripts/setup.sh" --model
configure_release "$@"
say "build the programs (several minutes the first time)"
cmake --build "$root/build" --parallel "$(nproc)" --target finetune generate evaluate adapter_tool >&2

say "train: LoRA, rank 16, 60 steps; the last 5 % of the text are held out"
rm -rf "$output"
"$root/build/bin/finetune" --model "$(model_file)" --data "$text" --output "$output" \
  --method lora --rank 16 --alpha 32 \
  --steps 60 --batch-size 4 --seq-len 128 --lr 2e-3 --warmup-steps 5 --schedule linear \
  --eval-fraction 0.05 --sample "$prompt" >/dev/null

python3 "$root/scripts/show_run.py" "$output/run.json" --least-fall 0.4
cat <<END

The adapter is in out/quickstart and opens in Hugging Face PEFT. Try it:
  build/bin/generate --model '$(model_file)' --adapter out/quickstart --prompt 'HOPE, n.' --max-new-tokens 60
END
