"""Builds the C++ extension `xtoken._core` with CMake and Ninja; everything else is in pyproject.toml.

Environment: XTOKEN_WERROR=1 turns compiler warnings into errors, XTOKEN_SANITIZE=1 adds sanitizers,
XTOKEN_BUILD_TYPE picks CMake's build type.
"""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Configures and builds the CMake project once; CMake puts the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        source = Path(__file__).parent.resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(source), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('XTOKEN_BUILD_TYPE', 'Release')}",
            f"-DXTOKEN_SANITIZE={os.environ.get('XTOKEN_SANITIZE', '0')}",
            f"-DXTOKEN_WERROR={os.environ.get('XTOKEN_WERROR', '0')}",
            f"-DXTOKEN_VERSION={self.distribution.get_version()}",
            f"-DXTOKEN_OUTPUT_DIR={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(ext_modules=[Extension("xtoken._core", sources=[])], cmdclass={"build_ext": CMakeBuild})
