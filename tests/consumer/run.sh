#!/usr/bin/env bash
# Installs the library as it is built into a prefix, moves the prefix, and builds a project outside
# the tree against it, with find_package and with pkg-config.
# usage: run.sh BUILD_DIR COMPILER
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$1/consumer
compiler=$2
rm -rf "$work"
mkdir -p "$work"
cd "$work"

fail() {
  echo "$*" >&2
  exit 1
}

# Neither the prefix of the configuration nor that of the installation is where it ends.
cmake --install "$1" --prefix "$work/installed" --component library >log
! grep -rqF "$work/installed" installed || fail "names where it was installed: $(grep -rlF "$work/installed" installed)"
DESTDIR=$work/staged cmake --install "$1" --prefix /opt/personalize --component library >log
diff -r installed staged/opt/personalize
mv staged/opt/personalize "$work/prefix"
rm -r installed staged

cmake -G Ninja -S "$here" -B cmake -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_PREFIX_PATH="$work/prefix"
cmake --build cmake
cmake/consumer
cmake/consumer_dispatch
cmake/consumer_static
shown=$(nm -DC --defined-only cmake/libplugin.so)
[[ $shown == *" T main"* && $shown != *" T personalize::"* ]] || fail "a plugin shows $shown"
[[ $(ldd cmake/consumer) == *libzstd.so* || ! -e $("$compiler" -print-file-name=libzstd.so) ]] ||
  fail "links an installed zstd statically unasked"

export PKG_CONFIG_PATH=$work/prefix/share/pkgconfig
read -ra flags < <(pkg-config --cflags personalize_runtime)
grep -q " $work/prefix/.*/personalize_runtime.hpp" <<<"$("$compiler" -std=c++20 -M "${flags[@]}" "$here/main.cpp")" ||
  fail "pkg-config leads to another header, or to none"
read -ra flags < <(pkg-config --libs personalize_runtime)
"$compiler" -x c++ -o program - "${flags[@]}" <<<'#include <zstd.h>
int main() { return ZSTD_versionNumber() == ZSTD_VERSION_NUMBER ? 0 : 1; }'
./program
[[ $(pkg-config --modversion personalize_runtime) == "$(<cmake/version)" ]] ||
  fail "pkg-config's version is not CMake's"

# A zstd that is too old is no error of CMake's, but a package that is not found, with the reason.
mkdir old
printf '#define ZSTD_VERSION_%s\n' 'MAJOR 1' 'MINOR 4' 'RELEASE 9' >old/zstd.h
touch old/libzstd.a
! cmake -G Ninja -S "$here" -B refused -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_PREFIX_PATH="$work/prefix" \
  -DPERSONALIZE_ZSTD_LIBRARY="$work/old/libzstd.a" -DPERSONALIZE_ZSTD_INCLUDE="$work/old" >log 2>&1 ||
  fail "takes zstd 1.4.9"
grep -q 'be NOT FOUND.*needs zstd 1.5.4 or newer, and found 1.4.9' <<<"$(tr -s '\n ' ' ' <log)" || fail "$(cat log)"
