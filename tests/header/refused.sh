#!/usr/bin/env bash
# Compilers and flags that the header cannot be built with: an #error in a sentence, and no other.
# usage: refused.sh COMPILER
set -euo pipefail
header=$(cd "$(dirname "$0")/../.." && pwd)/personalize_runtime.hpp

refused() {  # refused SENTENCE FLAG...: the compiler's first error
  local sentence=$1 errors
  shift
  if errors=$("$compiler" -std=c++20 -fsyntax-only -Wfatal-errors -x c++ "$@" "$header" 2>&1); then
    echo "compiles with $*" >&2
    exit 1
  fi
  grep 'error' <<<"$errors" | head -n 1 | grep -q "$sentence" ||
    { echo "$* is refused otherwise: $errors" | head -n 5 >&2; exit 1; }
}

compiler=$1
old=$(mktemp -d)
trap 'rm -rf "$old"' EXIT
mkdir -p "$old/xsimd"
echo '#define ZSTD_VERSION_NUMBER 10503' >"$old/zstd.h"
printf '#define XSIMD_VERSION_M%s\n' 'AJOR 8' 'INOR 0' >"$old/xsimd/xsimd.hpp"
refused "needs GCC or Clang" -D_MSC_VER=1940 -U__clang__
refused "needs a little-endian target" -U__BYTE_ORDER__ -D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__
refused "cannot be built with -ffast-math" -ffast-math
refused "cannot be built with -ffast-math" -ffinite-math-only
refused "needs zstd 1.5.4 or newer" -DPERSONALIZE_NO_XSIMD -I "$old"
refused "needs xsimd 8.1 or newer" -I "$old"
