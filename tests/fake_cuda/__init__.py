"""qpref's CUDA branches on fake tensors: shapes, dtypes, devices, bytes, launches and waits are real, values are not.

Importing this loads the device guard, which has to be in the process before torch.
"""

import ctypes
import sys

from tests.fake_cuda.build_guard import build

assert "torch" not in sys.modules, "the device guard has to be loaded before torch is imported"
GUARD = ctypes.CDLL(str(build()))
