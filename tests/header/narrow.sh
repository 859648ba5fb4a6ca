#!/usr/bin/env bash
# The program of tests/platforms with 64 and with 32 bits, which qemu runs (not every 64-bit system
# does): the same slates, with the scalar kernels, and what does not fit 32 bits is refused.
# usage: narrow.sh COMPILER COMPILER_FOR_32_BITS
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

build() {  # build COMPILER PROGRAM FLAG...
  "$1" -std=c++20 -O0 -ffp-contract=off -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror \
    -DPERSONALIZE_NO_ZSTD -DPERSONALIZE_NO_XSIMD "${@:3}" "$here/../platform/slate.cpp" -o "$out/$2"
}
build "$1" wide &
build "$2" narrow -static &
wait -n
wait -n
cd "$out"
./wide write model.pzm
./wide run model.pzm . >wide.txt
qemu-i386 ./narrow run model.pzm . >narrow.txt
cmp wide.txt narrow.txt
