#!/usr/bin/env bash
# Installs what is missing, builds everything and runs all tests. Ends with 0 only if every one passed.
# usage: test.sh [CTEST_ARGUMENT...]     for example: test.sh -R io
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

"$root/scripts/setup.sh"
configure_release -DGRAFT_TESTS=ON -DGRAFT_EXAMPLES=ON
say "build (parallel: $(nproc))"
cmake --build "$root/build" --parallel "$(nproc)"
say "test"
status=0
ctest --test-dir "$root/build" --parallel "$(nproc)" --output-on-failure --no-tests=error "$@" || status=$?

if ! { command -v nvidia-smi && nvidia-smi -L; } >/dev/null 2>&1; then
  say "skipped: 1 group, CUDA (this machine has no NVIDIA GPU)"
fi
exit $status
