"""Triton kernels compile for a GPU, also where there is none (tests/compile_triton.py)."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_kernels_compile_for_a_gpu(tmp_path):
    """What the interpreter accepts, the compiler may refuse: a name that changes its shape within a branch did."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.compile_triton"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"attend_tiles", "begin_kernel", "write_kernel", "combine"} <= set(done.stdout.split())
