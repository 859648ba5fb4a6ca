#!/usr/bin/env bash
# The project within another one's build, by add_subdirectory and by FetchContent: it builds and
# installs nothing that the other did not ask for, sets nothing of the other's, takes the other's
# xsimd and zstd, and resolves its own switches.
# usage: subproject.sh BUILD_DIR COMPILER
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$1/subproject
compiler=$2
rm -rf "$work"
mkdir -p "$work"

fail() {
  echo "$*" >&2
  exit 1
}

# project NAME: a folder with standard input as CMakeLists.txt and main.cpp, which says which zstd
# it was linked with; becomes the current folder.
project() {
  mkdir "$work/$1"
  cd "$work/$1"
  {
    echo 'cmake_minimum_required(VERSION 3.25)'
    echo 'project(parent VERSION 7.8.9.10 LANGUAGES CXX)'
    echo "set(personalize_source \"$root\")"
    cat
  } >CMakeLists.txt
  cat >main.cpp <<'END'
#include <cstdio>
#ifdef PERSONALIZE_NO_ZSTD
int main() { std::puts("none"); }
#else
#include <zstd.h>
int main() { std::printf("%u\n", ZSTD_versionNumber()); }
#endif
END
}

configure() { # configure FLAG...: quietly, into build/
  cmake -G Ninja -S . -B build -DCMAKE_CXX_COMPILER="$compiler" "$@" >log 2>&1 || {
    cat log >&2
    return 1
  }
}

build() { # build [TARGET]: what configure made
  cmake --build build --target "${1:-all}" >log 2>&1 || {
    cat log >&2
    return 1
  }
}

refused() { # refused SENTENCE FLAG...
  local sentence=$1
  shift
  ! cmake -G Ninja -S . -B build -DCMAKE_CXX_COMPILER="$compiler" "$@" >log 2>&1 ||
    fail "configured with $*"
  grep -qF "$sentence" <<<"$(tr -s '\n ' ' ' <log)" || fail "$* is refused otherwise: $(cat log)"
}

# A zstd as zstd's own build makes it before 1.5.6: targets that do not say where their header is.
zstd_sources() { # zstd_sources FOLDER VERSION
  local release=${2##*.}
  mkdir -p "$1/lib" "$1/build/cmake/lib"
  cat >"$1/lib/zstd.h" <<END
#pragma once
#define ZSTD_VERSION_MAJOR    1
#define ZSTD_VERSION_MINOR    5
#define ZSTD_VERSION_RELEASE  $release
#define ZSTD_VERSION_NUMBER 105$(printf %02d "$release")
extern "C" unsigned ZSTD_versionNumber();
END
  cat >"$1/lib/zstd.cpp" <<'END'
#include "zstd.h"
extern "C" unsigned ZSTD_versionNumber() { return ZSTD_VERSION_NUMBER; }
END
  cat >"$1/build/cmake/lib/CMakeLists.txt" <<'END'
include_directories(../../../lib)
if(ZSTD_BUILD_STATIC)
  add_library(libzstd_static STATIC ../../../lib/zstd.cpp)
endif()
if(ZSTD_BUILD_SHARED)
  add_library(libzstd_shared SHARED ../../../lib/zstd.cpp)
endif()
set_target_properties(${made} PROPERTIES OUTPUT_NAME zstd)
END
}

installs() { # installs EXPECTED...: the files that an installation of build/ lays down
  rm -rf prefix
  cmake --install build --prefix "$PWD/prefix" >/dev/null
  [[ $(find prefix -type f -printf '%P\n' | sort | xargs) == "$*" ]] ||
    fail "installed: $(find prefix -type f)"
}

system_zstd=$("$compiler" -x c++ -o "$work/version" - -lzstd <<<'#include <zstd.h>
#include <cstdio>
int main() { std::printf("%u\n", ZSTD_versionNumber()); }' && "$work/version")

echo "== add_subdirectory and FetchContent"
for way in add_subdirectory FetchContent; do
  project $way <<'END'
set(CMAKE_CXX_STANDARD 23)
set(BUILD_SHARED_LIBS ON)
add_executable(program main.cpp)
install(TARGETS program)
get_cmake_property(names VARIABLES)
foreach(name IN LISTS names)
  set(before_${name} "${${name}}")
endforeach()
if(way STREQUAL "FetchContent")
  include(FetchContent)
  FetchContent_Declare(personalize_runtime SOURCE_DIR "${personalize_source}")
  FetchContent_MakeAvailable(personalize_runtime)
else()
  add_subdirectory("${personalize_source}" personalize)
endif()
# Only what bears the project's name, or is FetchContent's or find_package's record; newer zstd's
# package looks for threads.
get_cmake_property(names VARIABLES)
foreach(name IN LISTS names)
  if(NOT name MATCHES "^(before_|names|name$|PERSONALIZE_|personalize|FETCHCONTENT|Fetch|_|[a-z]+_DIR$|CMAKE_HAVE_LIBC_PTHREAD$|CMAKE_MATCH_|CMAKE_FILES_DIRECTORY)"
     AND NOT PERSONALIZE_INSTALL AND NOT "${${name}}" STREQUAL "${before_${name}}")
    message(SEND_ERROR "${name} was \"${before_${name}}\", is \"${${name}}\"")
  endif()
endforeach()
foreach(property IN ITEMS COMPILE_OPTIONS COMPILE_DEFINITIONS INCLUDE_DIRECTORIES LINK_LIBRARIES TESTS)
  get_directory_property(value ${property})
  if(value)
    message(SEND_ERROR "${property} of the folder is \"${value}\"")
  endif()
endforeach()
if(linked)
  target_link_libraries(program PRIVATE ${linked})
else()
  target_compile_definitions(program PRIVATE PERSONALIZE_NO_ZSTD)
endif()
END
  configure -Dway=$way
  build
  [[ -z $(find build -name '*personalize*' -type f -name '*.[ao]') ]] || fail "$way: all builds it"
  [[ -z $(find build -name 'CTestTestfile.cmake' -path '*personalize*/tests/*') ]] || fail "$way: tests"
  installs bin/program
  configure -Dway=$way -Dlinked=personalize::runtime
  build
  installs bin/program
  [[ $(build/program) == "$system_zstd" ]] || fail "$way: zstd $(build/program)"
done
grep -q 'libpersonalize_kernels.a' build/build.ninja || fail "no kernels to link"

echo "== its installation, asked for"
configure -Dway=FetchContent -DPERSONALIZE_INSTALL=ON -DPERSONALIZE_KERNELS=OFF
installs bin/program include/personalize_runtime.hpp \
  share/cmake/personalize_runtime/{dependencies,personalize_runtimeConfig,personalize_runtimeConfigVersion,personalize_runtimeTargets}.cmake \
  share/doc/personalize_runtime/LICENSE share/pkgconfig/personalize_runtime.pc
configure -Dway=FetchContent -DPERSONALIZE_INSTALL=ON -DPERSONALIZE_KERNELS=ON
[[ $(ninja -C build -n all) == *libpersonalize_kernels.a* ]] || fail "kernels are installed and not built"

echo "== the other project's zstd"
project zstd <<'END'
foreach(library IN LISTS ours)
  list(APPEND made ${library})
  string(TOUPPER ${library} kind)
  string(REPLACE "LIBZSTD_" "ZSTD_BUILD_" kind ${kind})
  set(${kind} ON)
endforeach()
add_subdirectory(zstd/build/cmake/lib)
if(alias)
  add_library(${alias} ALIAS ${ours})
endif()
add_subdirectory("${personalize_source}" personalize)
add_executable(program main.cpp)
target_link_libraries(program PRIVATE personalize::runtime ${link})
END
zstd_sources zstd 1.5.42
one_zstd() { # one_zstd LINKED FLAG...: the program has the project's zstd, as LINKED, and no other
  local linked=$1 libraries
  shift
  rm -rf build
  configure "$@"
  build
  [[ $(build/program) == 10542 ]] || fail "$*: zstd $(build/program)"
  libraries=$(grep -o '[^ ]*libzstd\.[^ ]*' <(sed -n '/LINK_LIBRARIES/p' build/build.ninja) | sort -u)
  [[ $libraries == *"/$linked" && $(wc -l <<<"$libraries") == 1 && $libraries != /usr/* ]] ||
    fail "$*: links $libraries"
}
one_zstd libzstd.a -Dours=libzstd_static -Dlink=libzstd_static
one_zstd libzstd.so -Dours=libzstd_shared -Dlink=libzstd_shared
one_zstd libzstd.a "-Dours=libzstd_static;libzstd_shared"
one_zstd libzstd.so "-Dours=libzstd_static;libzstd_shared" -DBUILD_SHARED_LIBS=ON
one_zstd libzstd.a -Dours=libzstd_static -Dalias=zstd::libzstd_static
one_zstd libzstd.a -Dours=libzstd_static -Dalias=personalize::zstd "-DCMAKE_CXX_FLAGS=-I$PWD/zstd/lib"
rm -rf build zstd
zstd_sources zstd 1.5.3
refused "needs zstd 1.5.4 or newer, and found 1.5.3" -Dours=libzstd_static

echo "== the other project's xsimd"
project xsimd <<'END'
add_library(xsimd INTERFACE)
target_include_directories(xsimd INTERFACE "$<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/own>")
set(CMAKE_DISABLE_FIND_PACKAGE_xsimd ON)
add_subdirectory("${personalize_source}" personalize)
add_library(object OBJECT object.cpp)
target_link_libraries(object PRIVATE personalize::runtime)
END
mkdir -p own/xsimd/config
printf '#define XSIMD_VERSION_%s\n' 'MAJOR 99' 'MINOR 0' 'PATCH 0' >own/xsimd/config/xsimd_config.hpp
printf '#include "config/xsimd_config.hpp"\n' >own/xsimd/xsimd.hpp
printf '#include <xsimd/xsimd.hpp>\nstatic_assert(XSIMD_VERSION_MAJOR == 99);\n' >object.cpp
configure
build object
sed -i 's/MAJOR 99/MAJOR 8/' own/xsimd/config/xsimd_config.hpp
refused "needs xsimd 8.1 or newer, and found 8.0.0"

echo "== neither"
project neither <<'END'
add_subdirectory("${personalize_source}" personalize)
add_executable(program main.cpp)
target_link_libraries(program PRIVATE personalize::runtime)
get_property(names DIRECTORY "${personalize_source}" PROPERTY BUILDSYSTEM_TARGETS)
message(STATUS "targets: ${names}")
END
hidden=(-DCMAKE_DISABLE_FIND_PACKAGE_xsimd=ON -DCMAKE_DISABLE_FIND_PACKAGE_zstd=ON
  -DCMAKE_FIND_ROOT_PATH="$PWD/empty" -DCMAKE_FIND_ROOT_PATH_MODE_LIBRARY=ONLY
  -DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY)
refused "needs xsimd 8.1 or newer, and found none" "${hidden[@]}"
refused "needs zstd 1.5.4 or newer, and found none" "${hidden[@]}" -DPERSONALIZE_WITH_XSIMD=OFF
configure "${hidden[@]}" -DPERSONALIZE_WITH_XSIMD=OFF -DPERSONALIZE_WITH_ZSTD=OFF
build
[[ $(build/program) == none ]] || fail "zstd $(build/program) where there is none"
grep -q 'DEFINES = .*-DPERSONALIZE_NO_XSIMD' build/build.ninja || fail "PERSONALIZE_NO_XSIMD is not set"

echo "== switches"
cd "$work"
switches() { # switches EXPECTED FLAG...: the targets of the project at the top, of those that matter
  local expected=$1 targets
  shift
  rm -rf switches
  cmake -G Ninja -S "$root" -B switches -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_BUILD_TYPE=Release "$@" >log 2>&1 ||
    { cat log; fail "$*: not configured"; }
  targets=$(ninja -C switches -t targets all |
    sed -nE 's/^(personalize_kernels|personalize|personalize-train|first_slate|bench_runtime|runtime_tests): phony$/\1/p' | sort -u | xargs)
  [[ $targets == "$expected" ]] || fail "$*: has $targets, not $expected"
}
switches "personalize_kernels" -DPERSONALIZE_LIBRARY_ONLY=ON
switches "" -DPERSONALIZE_LIBRARY_ONLY=ON -DPERSONALIZE_KERNELS=OFF
switches "personalize_kernels" -DPERSONALIZE_LIBRARY_ONLY=ON -DPERSONALIZE_TOOLS=ON
grep -q 'PERSONALIZE_TOOLS is off: it needs NOT PERSONALIZE_LIBRARY_ONLY' log || fail "$(cat log)"
switches "first_slate personalize_kernels" -DPERSONALIZE_TOOLS=OFF -DPERSONALIZE_TESTS=OFF -DPERSONALIZE_BENCH=OFF
switches "first_slate" -DPERSONALIZE_WITH_XSIMD=OFF -DPERSONALIZE_WITH_ZSTD=OFF -DPERSONALIZE_TRAINER=ON
grep -q 'PERSONALIZE_TRAINER is off: it needs PERSONALIZE_TOOLS' log || fail "$(cat log)"
