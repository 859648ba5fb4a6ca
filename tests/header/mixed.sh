#!/usr/bin/env bash
# Two units that use the header, one compiled for this processor and one for any: only the second
# runs, on an emulated processor of 2008, in both orders of linking. What the units share must not be
# what only this processor can run.
# usage: mixed.sh COMPILER [FLAG...]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
command -v qemu-x86_64 >/dev/null || { echo "SKIPPED: qemu-x86_64 is not here (package qemu-user)"; exit 77; }
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

libraries=(-lzstd)
[[ " $* " == *" -DPERSONALIZE_NO_ZSTD "* ]] && libraries=()
"$@" -std=c++20 -O1 -I "$here/../.." -DRUNS=1 -c "$here/mixed.cpp" -o "$out/plain.o" &
"$@" -std=c++20 -O1 -I "$here/../.." -DRUNS=0 -march=native -c "$here/mixed.cpp" -o "$out/native.o" &
wait -n
wait -n

# Of any name, whether it runs below or not.
weak() { nm "$1" | awk 'NF == 3 && $2 ~ /^[WVu]$/ { print $3 }' | sort; }
comm -12 <(weak "$out/plain.o") <(weak "$out/native.o") >"$out/shared"
newer=$(objdump -d --no-show-raw-insn "$out/native.o" | awk '
  NR == FNR { shared[$1]; next }
  /^[0-9a-f]+ <.*>:$/ { name = substr($2, 2, length($2) - 3); next }
  name in shared && $2 ~ /^(v[a-z]|shlx|shrx|sarx|rorx|mulx|andn|bzhi|pext|pdep|bls|tzcnt|lzcnt|movbe|bextr|kmov)/ { print name }
' "$out/shared" - | sort -u | c++filt)
[[ -z $newer ]] || { printf 'both units have these, with instructions of this processor:\n%s\n' "$newer" >&2; exit 1; }

for order in "native.o plain.o" "plain.o native.o"; do
  read -ra objects <<<"$order"
  "$@" "${objects[@]/#/$out/}" -o "$out/program" "${libraries[@]}"
  qemu-x86_64 -cpu Nehalem "$out/program" ||
    { echo "linked as $order, the unit for any processor has code of the other" >&2; exit 1; }
done
