#!/usr/bin/env bash
# Installs the wheel and the sdist in DIST, each in an empty environment, and uses it from there.
#
# usage: tests/check_dist.sh DIST
set -euo pipefail
dist=$(realpath "$1")
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for package in "$dist"/*.whl "$dist"/*.tar.gz; do
  echo "installing $(basename "$package") in an empty environment"
  "$python" -m venv --clear "$work/venv"
  "$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
  "$work/venv/bin/python" -m pip install --quiet "$package"
  (
    cd "$work"
    "$work/venv/bin/ringkern" plan --world-size 3 --lengths 20 >/dev/null
    "$work/venv/bin/ringkern" doctor >/dev/null
    "$work/venv/bin/python" - <<'PYTHON'
import torch
import ringkern
from ringkern import _C, kernels

q = torch.randn(1, 5, 2, 8)
out, lse = ringkern.attn_func(q, q, q, causal=True)
assert torch.equal(out[:, 0], q[:, 0])
assert "site-packages" in _C.__file__ and "site-packages" in str(list(kernels.__path__))
assert _C.crc32c(b"123456789") == 0xE3069283
print("works:", _C.__file__.rsplit("/", 1)[1])
PYTHON
  )
done
