import os

# The GPU kernels' interpreter runs every warpgroup in a thread of XLA's pool: more than small
# machines have.
os.environ.setdefault("NPROC", "16")

import jax
import numpy as np
import pytest

collect_ignore_glob = ["testdata/*"]  # scripts that need torch made what is there

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng():
    return np.random.default_rng(0)
