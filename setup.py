"""Builds the extensions `xtoken._core` and `xtoken._cuda` with CMake and Ninja; all else is in pyproject.toml.

Environment: XTOKEN_CUDA=1 demands the CUDA kernels and XTOKEN_CUDA=0 leaves them out; without it they are built for a
torch with CUDA, where nvcc is found. XTOKEN_CUDA_ARCHS lists their architectures ("80;90"). XTOKEN_WERROR=1 turns
compiler warnings into errors, XTOKEN_SANITIZE=1 adds sanitizers, XTOKEN_BUILD_TYPE picks CMake's build type,
XTOKEN_BUILD_DIR a folder to keep, so that the next build is an incremental one; for modules built in place (pip install
-e) that is build/cmake.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def find_nvcc() -> str | None:
    """CUDA's compiler: on the path, in CUDA_HOME, or where its installer puts it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in homes if home)]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def cuda_of_torch() -> str | None:
    """CUDA's version of the torch that is installed where this is to be; None for one without, or if there is none.

    A build in isolation has no torch of its own, so its file is read, not imported.
    """
    for folder in dict.fromkeys([sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path]):
        file = Path(folder or ".") / "torch" / "version.py"
        if file.is_file():
            found = re.search(r"^cuda\b[^=\n]*= *['\"]([\d.]+)['\"]", file.read_text(encoding="utf-8"), re.MULTILINE)
            return found[1] if found else None
    return None


def cuda_compiler() -> str | None:
    """What to compile CUDA kernels with; None if there are to be none. Says which, and why."""
    wanted = os.environ.get("XTOKEN_CUDA", "")
    if wanted not in {"", "0", "1"}:
        raise SystemExit(f"XTOKEN_CUDA: expected 0, 1 or nothing, got {wanted!r}")
    nvcc, cuda = find_nvcc(), cuda_of_torch()
    if wanted == "1" and nvcc is None:
        raise SystemExit("XTOKEN_CUDA=1: nvcc is not on the path, nor in $CUDA_HOME/bin or /usr/local/cuda/bin")
    if wanted:
        reason = f"XTOKEN_CUDA={wanted}"
    elif cuda is None:
        reason = "no torch with CUDA is installed here; XTOKEN_CUDA=1 builds them"
    else:
        reason = f"torch has CUDA {cuda}, and nvcc is {nvcc or 'not found'}"
    is_built = wanted == "1" or (not wanted and cuda is not None and nvcc is not None)
    print(f"xtoken: CUDA kernels are {'' if is_built else 'not '}built: {reason}", file=sys.stderr)
    return nvcc if is_built else None


NVCC = cuda_compiler()


class CMakeBuild(build_ext):
    """Configures and builds the CMake project once; CMake puts the modules where setuptools expects them."""

    def run(self) -> None:
        self.built = False
        # setuptools builds modules elsewhere, and copies them to their place.
        self.kept = "build/cmake" if self.inplace or getattr(self, "editable_mode", False) else None
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if self.built:
            return
        source = Path(__file__).parent.resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(os.environ.get("XTOKEN_BUILD_DIR") or self.kept or self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(source), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('XTOKEN_BUILD_TYPE', 'Release')}",
            f"-DXTOKEN_SANITIZE={os.environ.get('XTOKEN_SANITIZE', '0')}",
            f"-DXTOKEN_WERROR={os.environ.get('XTOKEN_WERROR', '0')}",
            f"-DXTOKEN_VERSION={self.distribution.get_version()}",
            f"-DXTOKEN_OUTPUT_DIR={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DXTOKEN_CUDA={'ON' if NVCC else 'OFF'}",
        ]  # fmt: skip
        if NVCC:
            configure.append(f"-DCMAKE_CUDA_COMPILER={NVCC}")
        # What an earlier build was told must not stay in a folder that is kept.
        archs = os.environ.get("XTOKEN_CUDA_ARCHS")
        configure.append(f"-DXTOKEN_CUDA_ARCHS={archs}" if NVCC and archs else "-UXTOKEN_CUDA_ARCHS")
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        self.built = True


EXTENSIONS = ["xtoken._core", *(["xtoken._cuda"] if NVCC else [])]
setup(ext_modules=[Extension(name, sources=[]) for name in EXTENSIONS], cmdclass={"build_ext": CMakeBuild})
