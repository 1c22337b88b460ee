"""Builds ringkern: pure Python, plus csrc/ as the module ringkern._C, through CMake."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()
INIT = (ROOT / "python/ringkern/__init__.py").read_text()


class CMakeBuild(build_ext):
    """Hands the extension to CMake; CMAKE_ARGS and CMAKE_BUILD_PARALLEL_LEVEL are honoured."""

    def build_extension(self, ext):
        build = pathlib.Path(self.build_temp).resolve()
        target = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build.mkdir(parents=True, exist_ok=True)
        # A cache of another build environment names programs that are gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", build], check=True)
        subprocess.run(["cmake", "--install", build, "--prefix", target], check=True)


setup(
    version=re.search(r'^__version__ = "(.+)"', INIT, re.M)[1],
    packages=["ringkern", "ringkern.kernels"],
    package_dir={"": "python"},
    package_data={"ringkern": ["_C.pyi", "py.typed"]},
    ext_modules=[Extension("ringkern._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
