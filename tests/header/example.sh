#!/usr/bin/env bash
# The example in the header's first comment, inside a function: compiled with all warnings.
# usage: example.sh COMPILER
set -euo pipefail
header=$(cd "$(dirname "$0")/../.." && pwd)/personalize_runtime.hpp
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

# From the include to the first line that is not indented.
sed -n '/^\/\/   #include/,/^\/\/ [A-Z]/{s/^\/\/   //p}' "$header" >"$out/example"
[[ $(grep -c 'recommender->' "$out/example") -ge 2 ]] || { echo "no example found" >&2; exit 1; }
{
  grep '^#include\|^namespace' "$out/example"
  echo 'int fail(const std::string&); void show(std::string_view, float, std::string_view);'
  echo 'int example(); int example() {'
  grep -v '^#include\|^namespace' "$out/example"
  echo 'return 0; }'
} >"$out/example.cpp"
"$1" -std=c++20 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror -fsyntax-only \
  -I "$(dirname "$header")" "$out/example.cpp"
