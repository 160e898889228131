#!/usr/bin/env bash
# Installs graft and uses it from the project beside this script, as an outsider would.
# usage: run.sh CASE SOURCE BUILD LIBTORCH [CCACHE]
#   installed     install, move the installed folder, find_package, build, run
#   subdirectory  add_subdirectory: configure, compile main.cpp, check that nothing leaks; GRAFT_CONSUMER_FULL=1 builds
#                 the library again and runs the program as well
#   refusal       a LibTorch of another minor version is refused in words, another patch version is not
set -euo pipefail
case=$1 source=$2 build=$3 libtorch=$4 ccache=${5:-}
[ -x "$ccache" ] || ccache=
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$build/consumer/$case  # always the same, so that the compiler cache knows it
rm -rf "$work"
mkdir -p "$work"
unset CMAKE_PREFIX_PATH LIBTORCH_ROOT

fail() { echo "consumer: $*" >&2; exit 1; }

# configure FOLDER OPTION...: the outside project, quickly compiled.
configure() {
  local folder=$1
  shift
  cmake -G Ninja -S "$here" -B "$folder" -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-O0 \
    ${ccache:+-DCMAKE_CXX_COMPILER_LAUNCHER="$ccache"} "$@"
}

# The package as it may reach another machine: in another folder than it was installed to.
install_and_move() {
  cmake --install "$build" --prefix "$work/first" >/dev/null
  mv "$work/first" "$work/prefix"
  if grep -rIl -e "$work" -e "$source" -e "$build" -e "$libtorch" "$work/prefix"; then
    fail "installed files name folders of this machine"
  fi
}

# A LibTorch that says it has this version.
fake_libtorch() {
  local root=$1 major minor patch
  IFS=. read -r major minor patch <<<"$2"
  mkdir -p "$root"/include/{ATen,c10/core,torch/headeronly,torch/csrc/api/include}
  touch "$root/include/ATen/ATen.h" "$root/include/c10/core/DispatchKey.h"
  printf '#define TORCH_VERSION_%s %s\n' MAJOR "$major" MINOR "$minor" PATCH "$patch" \
    >"$root/include/torch/headeronly/version.h"
  ln -s "$libtorch/lib" "$root/lib"
}

case $case in
installed)
  install_and_move
  configure "$work/build" -DCMAKE_PREFIX_PATH="$work/prefix" -DLIBTORCH_ROOT="$libtorch"
  cmake --build "$work/build"
  "$work/build/consumer" "$work/adapter"
  for file in adapter_config.json adapter_model.safetensors; do
    [ -s "$work/adapter/$file" ] || fail "the program left no $file"
  done
  ;;
subdirectory)
  configure "$work/build" -DGRAFT_SOURCE_DIR="$source" -DLIBTORCH_ROOT="$libtorch" \
    -DCMAKE_EXPORT_COMPILE_COMMANDS=ON
  if grep -E '"file": .*/(examples|tests/[a-z]+)/[a-z_/]*\.cpp"' "$work/build/compile_commands.json" |
    grep -v consumer/main.cpp; then
    fail "add_subdirectory brings in programs or tests"
  fi
  command=$(grep '"command": .*consumer/main.cpp' "$work/build/compile_commands.json")
  [[ $command != *-Wall* && $command != *FMT_HEADER_ONLY* ]] || fail "private options leak: $command"
  if [ -n "${GRAFT_CONSUMER_FULL:-}" ]; then
    cmake --build "$work/build"
    "$work/build/consumer" "$work/adapter"
  else
    cmake --build "$work/build" --target CMakeFiles/consumer.dir/main.cpp.o
  fi
  ;;
refusal)
  install_and_move
  version=$(sed -n 's/^set(_graft_built_with "\(.*\)")$/\1/p' "$work"/prefix/lib*/cmake/graft/graftConfig.cmake)
  IFS=. read -r major minor patch <<<"$version"
  other=$major.$((minor + 1)).$patch
  fake_libtorch "$work/other" "$other"
  if configure "$work/build-other" -DCMAKE_PREFIX_PATH="$work/prefix" -DLIBTORCH_ROOT="$work/other" \
    >"$work/log" 2>&1; then
    fail "LibTorch $other was accepted by a graft that was built with $version"
  fi
  text=$(tr -s ' \n' ' ' <"$work/log")
  for part in "built with LibTorch $version" "LibTorch $other was found" "Set LIBTORCH_ROOT"; do
    [[ $text == *"$part"* ]] || fail "the refusal does not say '$part': $text"
  done
  fake_libtorch "$work/patch" "$major.$minor.$((patch + 1))"
  configure "$work/build-patch" -DCMAKE_PREFIX_PATH="$work/prefix" -DLIBTORCH_ROOT="$work/patch"
  ;;
*)
  fail "CASE must be installed, subdirectory or refusal; got '$case'"
  ;;
esac
