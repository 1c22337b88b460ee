"""Builds ringkern: pure Python, plus csrc/ as the module ringkern._C, through CMake."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig

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
        # Without build isolation nobody puts this environment's own cmake and ninja on the path.
        path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
        for command in (
            configure,
            ["cmake", "--build", build],
            ["cmake", "--install", build, "--prefix", target],
        ):
            found = shutil.which("cmake", path=path) or "cmake"
            subprocess.run([found, *command[1:]], check=True, env=os.environ | {"PATH": path})


setup(
    version=re.search(r'^__version__ = "(.+)"', INIT, re.M)[1],
    packages=["ringkern", "ringkern.kernels"],
    package_dir={"": "python"},
    package_data={"ringkern": ["_C.pyi", "py.typed"]},
    ext_modules=[Extension("ringkern._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
