#!/usr/bin/env bash
# A Meson project takes the library by the wrap, from the archive that tools/packaging/release makes.
# usage: meson.sh BUILD_DIR COMPILER [OPTION...]   (default: -Dpersonalize_runtime:kernels=false)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$1/meson
export CXX=$2
shift 2
command -v meson >/dev/null || { echo "SKIPPED: meson is not installed"; exit 77; }
rm -rf "$work"
mkdir -p "$work"
cd "$work"

"$here/../../tools/packaging/release" "$work/release"
cp -r release/meson subprojects
cp "$here/main.cpp" .
cat >meson.build <<'END'
project('consumer', 'cpp', default_options : ['cpp_std=c++20', 'optimization=0', 'debug=false'])
executable('consumer', 'main.cpp',
  dependencies : dependency('personalize_runtime', version : '>=0.1'))
kernels = dependency('personalize_kernels', required : false)
if kernels.found()
  executable('consumer_static', 'main.cpp', dependencies : dependency('personalize_runtime_static'))
  executable('consumer_dispatch', 'main.cpp', dependencies : kernels)
endif
END
(($#)) || set -- -Dpersonalize_runtime:kernels=false
meson setup build "$@" >log 2>&1 || { cat log >&2; exit 1; }
ninja -C build
for program in build/consumer{,_dispatch,_static}; do [[ ! -x $program ]] || "$program"; done
