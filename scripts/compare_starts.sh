#!/usr/bin/env bash
# Trains LoRA from every initialiser on SmolLM2 and the quickstart's text and writes a section of docs/results.md.
# usage: compare_starts.sh [OPTION of compare_starts.py...]
# Under an hour on 2 cores; started again after a stop it goes on where it was. Runs are kept in out/compare.
exec "$(dirname "${BASH_SOURCE[0]}")/compare_methods.sh" --script compare_starts.py "$@"
