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
# In as many pieces as take equally long: most of the time goes into the header.
pieces=("main test_kernels test_model" "test_encoder test_scorer")
objects=()
for piece in "${!pieces[@]}"; do
  source=$build/piece$piece.cpp object=$build/piece$piece.o
  objects+=("$object")
  for name in ${pieces[piece]}; do echo "#include \"$root/tests/$name.cpp\""; done >"$source"
  "${compiler[@]}" -std=c++20 -O2 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror \
    -DPERSONALIZE_NO_ZSTD -isystem "$build/include" -I "$root" -I "$root/tests" \
    -c "$source" -o "$object" &
  if (($(jobs -rp | wc -l) >= jobs)); then wait -n; fi
done
while (($(jobs -rp | wc -l))); do wait -n; done
aarch64-linux-gnu-g++ -static "${objects[@]}" -o "$build/runtime_tests"
cd "$root/tests"
qemu-aarch64 "$build/runtime_tests"
