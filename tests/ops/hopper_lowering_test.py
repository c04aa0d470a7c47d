"""The jax that is installed lowers the Hopper kernels, of which interpreters say nothing."""

import pathlib
import subprocess
import sys

import pytest
from common import slow

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "aot_gpu.py"


@pytest.mark.parametrize(("options", "calls"), [(["--few"], 8), slow([], 14)], ids=["few", "all"])
def test_kernels_lower_where_there_is_no_gpu(options, calls):
    command = [sys.executable, SCRIPT, "--lower", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"lowers {calls} calls" in done.stdout
