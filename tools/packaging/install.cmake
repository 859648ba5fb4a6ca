# What `cmake --install` lays down: the library, as CMake package and for pkg-config; the command.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

target_include_directories(personalize_runtime INTERFACE
  "$<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>")
set(installed personalize_runtime)
if(PERSONALIZE_KERNELS)
  list(APPEND installed personalize_kernels personalize_runtime_static)
  set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/personalize_runtime")
  set(independent "")
else()
  set(package_dir "${CMAKE_INSTALL_DATADIR}/cmake/personalize_runtime")
  set(independent ARCH_INDEPENDENT)
endif()
configure_package_config_file(tools/packaging/config.cmake.in personalize_runtimeConfig.cmake
  INSTALL_DESTINATION "${package_dir}")
write_basic_package_version_file(personalize_runtimeConfigVersion.cmake
  COMPATIBILITY SameMinorVersion ${independent})
install(TARGETS ${installed} EXPORT personalize_runtimeTargets
  DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT library)
install(EXPORT personalize_runtimeTargets NAMESPACE personalize::
  DESTINATION "${package_dir}" COMPONENT library)
install(FILES personalize_runtime.hpp
  DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" COMPONENT library)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/personalize_runtimeConfig.cmake"
              "${CMAKE_CURRENT_BINARY_DIR}/personalize_runtimeConfigVersion.cmake"
              tools/packaging/dependencies.cmake
  DESTINATION "${package_dir}" COMPONENT library)
install(FILES LICENSE DESTINATION "${CMAKE_INSTALL_DATADIR}/doc/personalize_runtime"
  COMPONENT library)

# The prefix is where the .pc file lies when it is read, not where the build was told to install.
set(pc_dir "${CMAKE_INSTALL_DATADIR}/pkgconfig")
set(pc_includedir "\${prefix}/${CMAKE_INSTALL_INCLUDEDIR}")
if(IS_ABSOLUTE "${CMAKE_INSTALL_INCLUDEDIR}")
  set(pc_includedir "${CMAKE_INSTALL_INCLUDEDIR}")
endif()
if(IS_ABSOLUTE "${pc_dir}")
  set(pc_prefix "${CMAKE_INSTALL_PREFIX}")
else()
  file(RELATIVE_PATH pc_prefix "/${pc_dir}" "/")
  string(REGEX REPLACE "/$" "" pc_prefix "\${pcfiledir}/${pc_prefix}")
endif()
set(pc_requires "")
set(pc_definitions "")
if(PERSONALIZE_WITH_XSIMD)
  list(APPEND pc_requires "xsimd >= 8.1")
else()
  string(APPEND pc_definitions " -DPERSONALIZE_NO_XSIMD")
endif()
if(PERSONALIZE_WITH_ZSTD)
  list(APPEND pc_requires "libzstd >= 1.5.4")
else()
  string(APPEND pc_definitions " -DPERSONALIZE_NO_ZSTD")
endif()
list(JOIN pc_requires ", " pc_requires)
configure_file(tools/packaging/personalize_runtime.pc.in personalize_runtime.pc @ONLY)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/personalize_runtime.pc"
  DESTINATION "${pc_dir}" COMPONENT library)

if(PERSONALIZE_TOOLS)
  install(TARGETS personalize DESTINATION "${CMAKE_INSTALL_BINDIR}" COMPONENT command)
  install(FILES LICENSE DESTINATION "${CMAKE_INSTALL_DATADIR}/doc/personalize" COMPONENT command)
  if(PERSONALIZE_TRAINER)
    install(TARGETS personalize-train DESTINATION "${CMAKE_INSTALL_BINDIR}" COMPONENT trainer)
    install(FILES LICENSE DESTINATION "${CMAKE_INSTALL_DATADIR}/doc/personalize-train"
      COMPONENT trainer)
  endif()
endif()
if(PROJECT_IS_TOP_LEVEL)
  include(tools/packaging/debian.cmake)
endif()
