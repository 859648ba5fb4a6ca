#!/usr/bin/env bash
# Every function that an object of personalize::kernels defines must bear the tag of its instruction
# set: of a function without one, the linker may keep this copy for processors that cannot run it.
# usage: kernel_symbols.sh LIBRARY OBJECT...   (objects: sse2 avx2 avx_vnni avx512_vnni neon neon_dot)
set -euo pipefail
library=$1
shift
# The tag of the kernels, and xsimd's name for the registers that they work on.
declare -A tags=([sse2]=Sse2:sse2 [avx2]=Avx2:avx2 [avx_vnni]=AvxVnni:avx2
  [avx512_vnni]=Avx512Vnni:avx512 [neon]=Neon:neon [neon_dot]=NeonDot:neon)

status=0
fail() {
  echo "FAILED: $*"
  status=1
}
(($# > 0)) || fail "no objects are named"
for object in "$@"; do
  if [[ -z ${tags[$object]:-} ]]; then
    fail "$object is none of ${!tags[*]}"
    continue
  fi
  IFS=: read -r tag simd <<<"${tags[$object]}"
  functions=$(nm -C --defined-only "$library" 2>/dev/null |
    awk -v member="$object.cpp.o:" '/:$/ {inside = $0 == member} inside && $2 ~ /^[TtWw]$/')
  if [[ -z $functions ]]; then
    fail "$library has no object $object.cpp.o with functions"
    continue
  fi
  foreign=$(grep -v -e "kernels::$tag\b" -e "xsimd::.*$simd" -e "${object}_table" <<<"$functions" || true)
  [[ -z $foreign ]] || fail "$object.cpp defines functions without its tag:"$'\n'"$foreign"
  echo "$object: $(wc -l <<<"$functions") symbols"
done
exit $status
