#!/usr/bin/env bash
# Two translation units that both include the header: compiled, linked and run.
# usage: compile.sh COMPILER [FLAG...]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

libraries=(-lzstd)
[[ " $* " == *" -DPERSONALIZE_NO_ZSTD "* ]] && libraries=()
"$@" -std=c++20 -O0 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror -I "$here/../.." \
  "$here/first.cpp" "$here/second.cpp" -o "$out/program" "${libraries[@]}"
"$out/program"
