#!/usr/bin/env bash
# Every function that an object of personalize::kernels defines must bear the tag of its instruction
# set: of a function without one, the linker may keep this copy for processors that cannot run it.
# usage: kernel_symbols.sh LIBRARY
set -euo pipefail
library=$1
status=0
for pair in sse2:Sse2:sse2 avx2:Avx2:avx2 avx_vnni:AvxVnni:avx2 avx512_vnni:Avx512Vnni:avx512; do
  IFS=: read -r object tag simd <<<"$pair"
  functions=$(nm -C --defined-only "$library" 2>/dev/null |
    awk -v member="$object.cpp.o:" '/:$/ {inside = $0 == member} inside && $2 ~ /^[TtWw]$/')
  [[ -n $functions ]] || continue
  foreign=$(grep -v -e "kernels::$tag" -e "xsimd::.*$simd" -e "${object}_table" <<<"$functions" || true)
  if [[ -n $foreign ]]; then
    echo "$object.cpp defines functions without its tag:"
    echo "$foreign"
    status=1
  fi
  echo "$object: $(wc -l <<<"$functions") symbols"
done
exit $status
