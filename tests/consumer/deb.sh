#!/usr/bin/env bash
# Makes the .deb packages of what is built, and unpacks that of the library, which pkg-config finds.
# usage: deb.sh BUILD_DIR COMPILER
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$1/deb
command -v dpkg-shlibdeps >/dev/null || { echo "SKIPPED: dpkg-dev is not installed"; exit 77; }
rm -rf "$work"
mkdir -p "$work"
cpack -G DEB --config "$1/CPackConfig.cmake" -B "$work" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
cd "$work"

fail() {
  echo "$*" >&2
  exit 1
}
field() { dpkg-deb -f "$1"_*.deb "$2"; } # field PACKAGE NAME
has() { # has PACKAGE FILE: FILE is in the package, and in no other
  [[ $(for each in *.deb; do
    dpkg-deb -c "$each" | sed -n "s,^.* \./usr/$2\$,${each%%_*},p"
  done) == "$1" ]] || fail "$2 is not in $1"
}

[[ $(field libpersonalize-runtime-dev Depends) == "libxsimd-dev (>= 8.1), libzstd-dev (>= 1.5.4)" ]] ||
  fail "$(field libpersonalize-runtime-dev Depends)"
has libpersonalize-runtime-dev include/personalize_runtime.hpp
has libpersonalize-runtime-dev lib/libpersonalize_kernels.a
if [[ -e $(echo personalize_*.deb) ]]; then
  has personalize bin/personalize
  [[ $(field personalize Depends) == *libzstd1* ]] || fail "$(field personalize Depends)"
  [[ $(field personalize Depends) != *libtorch* ]] || fail "personalize needs libtorch"
fi
if [[ -e $(echo personalize-train_*.deb) ]]; then
  has personalize-train bin/personalize-train
  [[ $(field personalize-train Depends) == *libtorch* ]] || fail "$(field personalize-train Depends)"
  [[ $(field personalize Recommends) == personalize-train ]] || fail "nothing recommends it"
fi

dpkg-deb -x libpersonalize-runtime-dev_*.deb root
read -ra flags < <(PKG_CONFIG_PATH=root/usr/share/pkgconfig pkg-config --cflags personalize_runtime)
[[ " ${flags[*]} " == *" -Iroot/usr/"* ]] || fail "pkg-config: ${flags[*]}"
grep -q " root/usr/[^ ]*/personalize_runtime.hpp" <<<"$("$2" -std=c++20 -M "${flags[@]}" "$here/main.cpp")" ||
  fail "finds another header, or none"
