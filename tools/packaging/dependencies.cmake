# What personalize_runtime.hpp needs, as personalize::xsimd and personalize::zstd. Shared by the
# build and by the installed package.
include(CMakeFindDependencyMacro)

if(NOT TARGET personalize::xsimd)
  # Without a version: xsimd's package accepts only its own major one, and every later one will do.
  find_dependency(xsimd)
  if(xsimd_VERSION VERSION_LESS 8.1)
    message(FATAL_ERROR "personalize_runtime needs xsimd 8.1 or newer, found ${xsimd_VERSION}")
  endif()
  # Only its headers: xsimd 8.1's own target also names xtl, which is optional and often not there.
  get_target_property(personalize_xsimd_include xsimd INTERFACE_INCLUDE_DIRECTORIES)
  add_library(personalize::xsimd INTERFACE IMPORTED)
  set_target_properties(personalize::xsimd PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${personalize_xsimd_include}"
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${personalize_xsimd_include}")
endif()

if(NOT TARGET personalize::zstd)
  find_package(zstd CONFIG QUIET)
  add_library(personalize::zstd INTERFACE IMPORTED)
  foreach(personalize_zstd IN ITEMS zstd::libzstd zstd::libzstd_shared zstd::libzstd_static)
    if(TARGET ${personalize_zstd})
      set_target_properties(personalize::zstd PROPERTIES
        INTERFACE_LINK_LIBRARIES ${personalize_zstd})
      break()
    endif()
  endforeach()
  if(NOT TARGET ${personalize_zstd})
    find_library(PERSONALIZE_ZSTD_LIBRARY zstd REQUIRED)
    find_path(PERSONALIZE_ZSTD_INCLUDE zstd.h REQUIRED)
    set_target_properties(personalize::zstd PROPERTIES
      INTERFACE_LINK_LIBRARIES "${PERSONALIZE_ZSTD_LIBRARY}"
      INTERFACE_INCLUDE_DIRECTORIES "${PERSONALIZE_ZSTD_INCLUDE}"
      INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${PERSONALIZE_ZSTD_INCLUDE}")
  endif()
endif()
