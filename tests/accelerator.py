"""Where the tests of kernels run: on a GPU where there is one, else in Triton's interpreter."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter takes bfloat16 for integers.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x).removeprefix("torch."))
