# What personalize_runtime.hpp needs, as personalize::xsimd and personalize::zstd. Shared by the
# build and by the installed package. What the including project has as a target of its own comes
# before what is installed, so that no program holds two; who has one under another name makes it
# the alias personalize::zstd or personalize::xsimd first.

# personalize_unfit(TEXT): ends this file; a package that find_package asks for is "not found" then.
macro(personalize_unfit text)
  if(NOT CMAKE_FIND_PACKAGE_NAME STREQUAL "personalize_runtime")
    message(FATAL_ERROR "${text}")
  endif()
  set(personalize_runtime_FOUND FALSE)
  set(personalize_runtime_NOT_FOUND_MESSAGE "${text}")
  return()
endmacro()

# personalize_library(OUT NAME...): the first of the named targets that is a library, or "".
function(personalize_library out)
  set(${out} "" PARENT_SCOPE)
  foreach(name IN LISTS ARGN)
    if(TARGET ${name})
      get_target_property(type ${name} TYPE)
      if(type MATCHES "LIBRARY")
        set(${out} ${name} PARENT_SCOPE)
        return()
      endif()
    endif()
  endforeach()
endfunction()

# personalize_folders(OUT TARGET FILE): the folders of a target's headers; for a target that does not
# say, as zstd's own before 1.5.6, the one that holds FILE in the sources that it is made of.
function(personalize_folders out target file)
  get_target_property(folders ${target} INTERFACE_INCLUDE_DIRECTORIES)
  if(NOT folders)
    set(folders "")
    get_target_property(source ${target} SOURCE_DIR)
    foreach(folder IN ITEMS "${source}" "${source}/lib" "${source}/include" "${source}/../../../lib")
      if(EXISTS "${folder}/${file}")
        cmake_path(NORMAL_PATH folder)
        set(folders "${folder}")
        break()
      endif()
    endforeach()
  endif()
  set(${out} "${folders}" PARENT_SCOPE)
endfunction()

# personalize_version(OUT FILE FOLDER...): major.minor.patch as FILE defines them, "" where it is
# not to be seen here; the header checks again where it is compiled.
function(personalize_version out file)
  set(version "")
  foreach(folder IN LISTS ARGN)
    string(REGEX REPLACE "^\\$<BUILD_INTERFACE:(.*)>$" "\\1" folder "${folder}")
    if(EXISTS "${folder}/${file}")
      file(STRINGS "${folder}/${file}" lines
        REGEX "^#define +[A-Z]+_VERSION_(MAJOR|MINOR|RELEASE|PATCH) +[0-9]+")
      list(TRANSFORM lines REPLACE "^#define +[A-Z_]+ +([0-9]+).*" "\\1")
      list(JOIN lines "." version)
      break()
    endif()
  endforeach()
  set(${out} "${version}" PARENT_SCOPE)
endfunction()

if(PERSONALIZE_WITH_XSIMD AND NOT TARGET personalize::xsimd)
  personalize_library(personalize_found xsimd xsimd::xsimd)
  if(NOT personalize_found AND NOT PERSONALIZE_XSIMD_INCLUDE)
    # Without a version: xsimd's package accepts only its own major one, and every later one will do.
    find_package(xsimd CONFIG QUIET)
    personalize_library(personalize_found xsimd xsimd::xsimd)
  endif()
  # Only its headers: xsimd 8.1's own target also names xtl, which is optional and often not there.
  if(personalize_found)
    personalize_folders(personalize_include ${personalize_found} xsimd/xsimd.hpp)
  else()
    find_path(PERSONALIZE_XSIMD_INCLUDE xsimd/xsimd.hpp)
    mark_as_advanced(PERSONALIZE_XSIMD_INCLUDE)
    set(personalize_include ${PERSONALIZE_XSIMD_INCLUDE})
  endif()
  if(NOT personalize_include)
    personalize_unfit("personalize_runtime needs xsimd 8.1 or newer, and found none: install it \
(Debian: libxsimd-dev), or build with -DPERSONALIZE_WITH_XSIMD=OFF")
  endif()
  personalize_version(personalize_version xsimd/config/xsimd_config.hpp ${personalize_include})
  if(personalize_version AND personalize_version VERSION_LESS 8.1)
    personalize_unfit("personalize_runtime needs xsimd 8.1 or newer, and found \
${personalize_version} in ${personalize_include}")
  endif()
  add_library(personalize::xsimd INTERFACE IMPORTED)
  set_target_properties(personalize::xsimd PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${personalize_include}"
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${personalize_include}")
endif()

if(PERSONALIZE_WITH_ZSTD AND NOT TARGET personalize::zstd)
  # Where there are both kinds BUILD_SHARED_LIBS tells which is meant. Where it is silent a project's
  # own zstd is taken as static, as all that it builds is then, and an installed one as shared.
  set(personalize_own libzstd_static libzstd_shared)
  set(personalize_installed zstd::libzstd_shared zstd::libzstd_static)
  if(BUILD_SHARED_LIBS)
    list(REVERSE personalize_own)
  elseif(DEFINED BUILD_SHARED_LIBS)
    list(REVERSE personalize_installed)
  endif()
  # zstd::libzstd, which newer ones have beside both, may mean either.
  set(personalize_names libzstd ${personalize_own} ${personalize_installed} zstd::libzstd zstd::zstd
      ZSTD::ZSTD zstd)
  personalize_library(personalize_found ${personalize_names})
  if(NOT personalize_found AND NOT PERSONALIZE_ZSTD_LIBRARY)
    find_package(zstd CONFIG QUIET)
    personalize_library(personalize_found ${personalize_names})
  endif()
  if(personalize_found)
    personalize_folders(personalize_include ${personalize_found} zstd.h)
    set(personalize_link ${personalize_found})
  else()
    find_library(PERSONALIZE_ZSTD_LIBRARY zstd)
    find_path(PERSONALIZE_ZSTD_INCLUDE zstd.h)
    mark_as_advanced(PERSONALIZE_ZSTD_LIBRARY PERSONALIZE_ZSTD_INCLUDE)
    if(NOT PERSONALIZE_ZSTD_LIBRARY OR NOT PERSONALIZE_ZSTD_INCLUDE)
      personalize_unfit("personalize_runtime needs zstd 1.5.4 or newer, and found none: install it \
(Debian: libzstd-dev), or build with -DPERSONALIZE_WITH_ZSTD=OFF")
    endif()
    set(personalize_include ${PERSONALIZE_ZSTD_INCLUDE})
    set(personalize_link ${PERSONALIZE_ZSTD_LIBRARY})
  endif()
  personalize_version(personalize_version zstd.h ${personalize_include})
  if(personalize_version AND personalize_version VERSION_LESS 1.5.4)
    personalize_unfit("personalize_runtime needs zstd 1.5.4 or newer, and found \
${personalize_version} in ${personalize_include}")
  endif()
  add_library(personalize::zstd INTERFACE IMPORTED)
  set_target_properties(personalize::zstd PROPERTIES
    INTERFACE_LINK_LIBRARIES "${personalize_link}"
    INTERFACE_INCLUDE_DIRECTORIES "${personalize_include}"
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${personalize_include}")
endif()
