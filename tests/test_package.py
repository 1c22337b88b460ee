"""What is installed: the extension's dependencies, the tree's rooms, the version."""

import importlib.metadata
import pathlib
import re
import shutil
import subprocess

import pytest
import ringkern

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_extension_needs_no_cuda_nccl_or_torch():
    if not shutil.which("readelf"):
        pytest.skip("readelf is not installed (Debian: binutils)")
    from ringkern import _C

    printed = subprocess.run(
        ["readelf", "-d", _C.__file__], check=True, capture_output=True, text=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", printed)
    assert needed, printed
    allowed = ("libstdc++", "libgcc_s", "libc.", "libm.", "libpthread", "ld-linux")
    assert all(name.startswith(allowed) for name in needed), needed


def test_the_version_is_one():
    assert importlib.metadata.version("ringkern") == ringkern.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {ringkern.__version__}" in changelog


def test_every_variable_is_in_the_readme_and_read_in_env_only():
    from ringkern import env

    readme = (ROOT / "README.md").read_text()
    for name in env.VARIABLES:
        assert name in readme, name
    for path in (ROOT / "python/ringkern").glob("*.py"):
        for name in re.findall(r"RINGKERN_[A-Z_]+", path.read_text()):
            assert name in env.VARIABLES, f"{path.name}: {name}"


def test_files_stay_short():
    for pattern in ("python/ringkern/*.py", "kernels/*.py", "csrc/*", "tests/*.py", "bench/*.py"):
        for path in ROOT.glob(pattern):
            count = len(path.read_text().splitlines()) if path.is_file() else 0
            assert count <= 400, f"{path.name}: {count} lines"


def test_links_in_documents_exist():
    for document in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if "://" not in target:
                assert (ROOT / target).exists(), f"{document.name}: {target}"
