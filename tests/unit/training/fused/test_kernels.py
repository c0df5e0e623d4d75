"""Triton's kernels without a GPU: what they compute, by Triton's interpreter, and that they can be compiled for one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(script, tmp_path, **variables):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, str(HERE / script)], env=environment, capture_output=True, text=True)


@needs_triton
@pytest.mark.parametrize("script", ["interpreted.py", "interpreted_loss.py"])
def test_kernels_equal_torchs_operations(tmp_path, script):
    done = run(script, tmp_path, TRITON_INTERPRET="1")
    assert done.returncode == 0 and "cases agree" in done.stdout, done.stdout + done.stderr


@needs_triton
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    done = run("compiled.py", tmp_path, TRITON_INTERPRET="0")
    assert done.returncode == 0 and "kernels compiled" in done.stdout, done.stdout + done.stderr
