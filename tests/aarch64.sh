#!/usr/bin/env bash
# Compiles the tests of the numeric rooms for 64-bit ARM (NEON) and runs them under qemu.
# usage: tests/aarch64.sh [BUILD_DIR]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$root/build/aarch64}
jobs=$(nproc)

# Only these two: the whole of /usr/include would bring in the headers of this machine's own libc.
mkdir -p "$build/include"
ln -sfn /usr/include/xsimd "$build/include/xsimd"
ln -sfn /usr/include/doctest "$build/include/doctest"

compiler=(aarch64-linux-gnu-g++)
command -v ccache >/dev/null && compiler=(ccache "${compiler[@]}")
objects=()
for name in main test_kernels test_model test_encoder test_scorer; do
  [[ -e $root/tests/$name.cpp ]] || continue
  object=$build/$name.o
  objects+=("$object")
  "${compiler[@]}" -std=c++20 -O2 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror \
    -DPERSONALIZE_NO_ZSTD -isystem "$build/include" -I "$root" \
    -c "$root/tests/$name.cpp" -o "$object" &
  if (($(jobs -rp | wc -l) >= jobs)); then wait -n; fi
done
while (($(jobs -rp | wc -l))); do wait -n; done
aarch64-linux-gnu-g++ -static "${objects[@]}" -o "$build/runtime_tests"
cd "$root/tests"
qemu-aarch64 "$build/runtime_tests"
