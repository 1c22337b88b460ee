"""Without Triton: kernels say so, and the CPU path needs none."""

import subprocess
import sys

WANT = "triton: want 3.6 or later, got none: pip install triton"


def test_a_missing_triton_is_named():
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import ringkern, torch
from ringkern import backend
q = torch.ones(1, 3, 1, 16)
print(ringkern.attn_func(q, q, q)[0].sum().item())
print(backend.why_not_triton(torch.device("cuda"), 16, "float32"))
ringkern.attn_func(q, q, q, backend="triton")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["48.0", f"{WANT}."], done
    assert f'UnsupportedError: backend "triton": {WANT}' in done.stderr


def test_every_module_of_kernels_names_a_missing_triton():
    code = """
import importlib, sys
sys.modules["triton"] = None
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(module, error)
"""
    names = ["step", "decode", "merge", "pack", "cut", "softmax", "variant", "target"]
    modules = [f"ringkern.kernels.{name}" for name in names]
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{module} {WANT}" for module in modules], done
