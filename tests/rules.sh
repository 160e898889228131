#!/usr/bin/env bash
# What the design promises about the sources and a compiler does not check (docs/design.md, sections 2 and 7).
# usage: rules.sh SOURCE
set -euo pipefail
cd "$1"
failures=0
report() {
  echo "rules: $*" >&2
  failures=$((failures + 1))
}

# Lowest first: a folder includes itself and those before it.
layers=(core ops nn init adapters io moe attach train)
allowed=
for layer in "${layers[@]}"; do
  allowed+=${allowed:+|}$layer
  while IFS= read -r line; do
    report "a layer includes only what stands below it; got $line"
  done < <(grep -rnE '#include <graft/[a-z]+/' "include/graft/$layer" "src/$layer" |
    grep -vE "<graft/($allowed)/" || true)
done

known=" ${layers[*]} "
for folder in include/graft/*/ src/*/; do
  name=$(basename "$folder")
  [[ $known == *" $name "* ]] || report "every folder must be a layer of the list; got $folder"
done

while IFS= read -r line; do
  report "public headers include neither fmt nor json.hpp nor torch/torch.h; got $line"
done < <(grep -rnE '#include [<"](fmt/|nlohmann/json\.hpp|torch/(torch|all)\.h)' include |
  grep -v '^include/graft/graft\.h:' || true)

while IFS= read -r file; do
  report "a header must hold #pragma once; got $file"
done < <(grep -rL '^#pragma once' --include='*.h' include src cuda examples tests || true)

while read -r lines file; do
  if [ "$file" != total ] && [ "$lines" -gt 400 ]; then report "no file over 400 lines; got $lines in $file"; fi
done < <(find include src cuda examples tests cmake scripts -type f \
  -regex '.*\.\(h\|cpp\|cu\|cmake\|sh\|py\)' -print0 | xargs -0 wc -l)

while IFS= read -r line; do
  report "kernels know CUDA, philox.h and each other; got $line"
done < <(grep -rnE '#include <' cuda |
  grep -vE '<(cuda_(bf16|fp16|runtime)\.h|driver_types\.h|graft/core/philox\.h|cstddef|cstdint|type_traits)>' || true)

if [ $failures != 0 ]; then exit 1; fi
echo "rules: all kept"
