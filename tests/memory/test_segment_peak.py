"""The planner against a simulated GPU without flash attention; each run is a process, since fake CUDA changes torch."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_planner_is_within_two_percent_where_a_gpu_has_no_flash_attention():
    """Llama-3.2-1B's shape in fp16 on compute capability 7.5, 3,115 tokens, nothing recomputed."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.fake_cuda.step", "--shape", "1B", "--prompt", "180",
               "--response", "300", "--dtype", "fp16", "--capability", "7.5"]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^(\w+) +(\S+)$", done.stdout, re.MULTILINE))
    assert found["attention"] == "qpref_segments"
    assert abs(float(found["planner_error_percent"])) <= 2
