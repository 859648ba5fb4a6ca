#!/usr/bin/env bash
# Installs the package into a fresh prefix and builds a project outside the tree against it, once
# with find_package, once with pkg-config.
# usage: run.sh BUILD_DIR COMPILER
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$1/consumer
rm -rf "$work"
mkdir -p "$work"

cmake -S "$here/../.." -B "$work/package" -DCMAKE_CXX_COMPILER="$2" \
  -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_PREFIX="$work/prefix" -DPERSONALIZE_TOOLS=OFF -DPERSONALIZE_TRAINER=OFF \
  -DPERSONALIZE_TESTS=OFF -DPERSONALIZE_BENCH=OFF -DPERSONALIZE_EXAMPLES=OFF
cmake --build "$work/package"
cmake --install "$work/package"

cmake -S "$here" -B "$work/cmake" -DCMAKE_CXX_COMPILER="$2" -DCMAKE_PREFIX_PATH="$work/prefix"
cmake --build "$work/cmake"
"$work/cmake/consumer"
"$work/cmake/consumer_dispatch"

export PKG_CONFIG_PATH=$work/prefix/share/pkgconfig
read -ra flags < <(pkg-config --cflags --libs personalize_runtime)
"$2" -std=c++20 "$here/main.cpp" -o "$work/consumer" "${flags[@]}"
"$work/consumer"
