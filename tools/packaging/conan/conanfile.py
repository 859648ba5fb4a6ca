"""personalize_runtime for Conan 2, from this checkout: conan create tools/packaging/conan"""
import os
import re

from conan import ConanFile
from conan.errors import ConanInvalidConfiguration
from conan.tools.build import check_min_cppstd
from conan.tools.cmake import CMake, CMakeDeps, CMakeToolchain, cmake_layout
from conan.tools.files import copy, load, rmdir

required_conan_version = ">=2.0"


class PersonalizeRuntime(ConanFile):
    name = "personalize_runtime"
    description = "Sequence-model recommendations inside your own process, in one header"
    license = "MIT"
    topics = ("recommender-system", "sequence-model", "header-only", "simd")
    package_type = "static-library"
    settings = "os", "arch", "compiler", "build_type"
    options = {"with_xsimd": [True, False], "with_zstd": [True, False], "kernels": [True, False]}
    default_options = {"with_xsimd": True, "with_zstd": True, "kernels": True}

    @property
    def _root(self):
        return os.path.join(self.recipe_folder, "..", "..", "..")

    def set_version(self):
        header = load(self, os.path.join(self._root, "personalize_runtime.hpp"))
        self.version = ".".join(
            re.search(rf"^#define PERSONALIZE_VERSION_{part} (\d+)$", header, re.M).group(1)
            for part in ("MAJOR", "MINOR", "PATCH"))

    def export_sources(self):
        for pattern in ("CMakeLists.txt", "LICENSE", "personalize_runtime.hpp", "tools/kernels/*",
                        "tools/runtime/*",
                        "tools/packaging/*.cmake*", "tools/packaging/*.in"):
            copy(self, pattern, self._root, self.export_sources_folder)

    def configure(self):
        if not self.options.with_xsimd:
            del self.options.kernels
        if not self.options.get_safe("kernels"):
            self.package_type = "header-library"

    def layout(self):
        cmake_layout(self)

    def requirements(self):
        if self.options.with_xsimd:
            self.requires("xsimd/[>=8.1]", transitive_headers=True)
        if self.options.with_zstd:
            self.requires("zstd/[>=1.5.4 <2]", transitive_headers=True, transitive_libs=True)

    def validate(self):
        check_min_cppstd(self, 20)
        if self.settings.compiler == "msvc":
            raise ConanInvalidConfiguration(f"{self.name} needs GCC or Clang")

    def package_id(self):
        if not self.info.options.get_safe("kernels"):
            self.info.settings.clear()

    def generate(self):
        toolchain = CMakeToolchain(self)
        toolchain.cache_variables["PERSONALIZE_LIBRARY_ONLY"] = True
        for option, value in (("KERNELS", self.options.get_safe("kernels", False)),
                              ("WITH_XSIMD", self.options.with_xsimd),
                              ("WITH_ZSTD", self.options.with_zstd)):
            toolchain.cache_variables[f"PERSONALIZE_{option}"] = bool(value)
        toolchain.generate()
        CMakeDeps(self).generate()

    def build(self):
        cmake = CMake(self)
        cmake.configure()
        cmake.build()

    def package(self):
        CMake(self).install()
        copy(self, "LICENSE", self.source_folder, os.path.join(self.package_folder, "licenses"))
        # CMakeDeps and PkgConfigDeps write their own, which name Conan's packages.
        rmdir(self, os.path.join(self.package_folder, "share"))
        rmdir(self, os.path.join(self.package_folder, "lib", "cmake"))

    def package_info(self):
        self.cpp_info.set_property("cmake_file_name", "personalize_runtime")
        runtime = self.cpp_info.components["runtime"]
        runtime.set_property("cmake_target_name", "personalize::runtime")
        runtime.set_property("pkg_config_name", "personalize_runtime")
        runtime.bindirs = []
        runtime.libdirs = []
        for library, with_it in (("xsimd", self.options.with_xsimd), ("zstd", self.options.with_zstd)):
            if with_it:
                runtime.requires.append(f"{library}::{library}")
            else:
                runtime.defines.append(f"PERSONALIZE_NO_{library.upper()}")
        if self.options.get_safe("kernels"):
            kernels = self.cpp_info.components["kernels"]
            kernels.set_property("cmake_target_name", "personalize::kernels")
            kernels.libs = ["personalize_kernels"]
            kernels.defines = ["PERSONALIZE_DISPATCH=1"]
            kernels.requires = ["runtime"]
            kernels.bindirs = []
            static = self.cpp_info.components["runtime_static"]
            static.set_property("cmake_target_name", "personalize::runtime_static")
            static.libs = ["personalize_runtime_static"]
            static.defines = ["PERSONALIZE_DECLARATIONS_ONLY"]
            static.requires = ["runtime", "kernels"]
            static.bindirs = []
