"""What a device of a mesh holds, against arrays that lie on one, and what moves, by hand."""

import importlib.util
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from common import gate
from flax import nnx
from mesh_test import CONFIG
from sharding_test import BOTH, mesh

import mla_jax
from mla_jax.models import random_decoder
from mla_jax.sharding import Rules

SIZES = {"data": 2, "model": 4}
INNER = {"N": "model", "F": "model", "W": "model", "E": BOTH}


def test_a_device_holds_what_is_said_and_arrays_are_made_where_they_lie():
    place = Rules(B="data", S="model", **INNER)
    wanted = random_decoder(CONFIG)
    with jax.set_mesh(mesh()):
        model = random_decoder(CONFIG, sharding=place)
        cache = model.init_cache(8, 1024, jnp.float32, sharding=place)
    found = mla_jax.placement(
        CONFIG, mesh=SIZES, sharding=place, batch_size=8, length=1024, dtype="float32"
    )
    here = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    state = nnx.state(model)
    assert (found.weight_bytes, found.cache_bytes) == (here(state), here(cache.stores))
    spots = jax.tree.leaves(place.of(state, mesh()))
    for leaf, spot, one in zip(
        jax.tree.leaves(state), spots, jax.tree.leaves(nnx.state(wanted)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(spot, leaf.ndim)
        assert (jax.device_get(leaf) == jax.device_get(one)).all()


# By hand, of float32: D = 24, N = 4, Q = 12, R = 16, P = 4, K = 3, W = 64; one layer with experts
# and a shared one. 8 rows of one token.
SENT = {
    "data": (Rules(B=BOTH), {}),
    "tensor": (
        Rules(B="data", N="model", F="model"),
        {"attention": 2 * 4 * 24 * 4 * 3 / 4, "mlp": 2 * 4 * 24 * 4 * 3 / 4},
    ),
    "helix": (
        Rules(S="model", N="model"),
        {"attention": 8 * 4 * 4 * (20 + 17) * 3 / 4 + 2 * 8 * 24 * 4 * 3 / 4},
    ),
    "wide": (  # latents in, queries to the rows and mixtures back, sums
        Rules(B=BOTH, N="model"),
        {"attention": 3 * 12 * 4 + 4 * 4 * (20 + 16) * 3 / 4 + 3 * 24 * 4},
    ),
    "wide_inputs": (  # of q_a_proj; then sums of its outputs, to the rows of all four devices
        Rules(B=BOTH, N="model", A="model"),
        {
            "attention": 24 * 4 * 3 / 4 + 2 * 4 * 12 * 4 * 3 / 4
            + 4 * 4 * (20 + 16) * 3 / 4 + 3 * 24 * 4
        },
    ),
    "gathered": (Rules(B="data", E="data"), {"experts": 4 * (2 * 24 * 4 + 3 * 8)}),
    "exchanged": (Rules(B=BOTH, E=BOTH), {"experts": 2 * 3 * 24 * 4 + 7 * 3 * 8}),
    "words": (
        Rules(W="model"), {"words": 2 * 8 * 24 * 4 * 3 / 4 + 4 * 8 * 64 * 3 / 4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SENT)
def test_a_device_sends_what_the_layout_asks_for(name):
    place, wanted = SENT[name]
    found = mla_jax.placement(
        CONFIG, mesh=SIZES, sharding=place, batch_size=8, length=1024, dtype="float32"
    )
    sent = {part: size for part, size in found.link_bytes.items() if size}
    assert sent.keys() == wanted.keys()
    assert all(math.isclose(sent[part], wanted[part]) for part in sent)
    assert found.rows_that_fit(found.weight_bytes / 0.9 - 1) == 0


LIBTPU = pathlib.Path(sys.prefix, "tpu-aot")  # where `./run test` puts it


def compiled(*arguments):
    """What the benchmark prints of programs for a mesh of TPUs."""
    command = [sys.executable, "benchmarks/aot_mesh.py", "--short", *arguments]
    paths = [os.environ.get("PYTHONPATH"), str(LIBTPU)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    env |= {"JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


NEEDS_LIBTPU = pytest.mark.skipif(
    not (LIBTPU / "libtpu").exists() and importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: ./run test does it, where there is one",
)


@NEEDS_LIBTPU
@pytest.mark.slow
@pytest.mark.parametrize("whole", ["wide", "helix"])
def test_what_a_tpu_s_program_moves_is_near_the_closed_form(whole):
    text = compiled("--what", whole, "--alone")
    assert text.count(f"| v6e | deepseek_v3, layers: 1, {whole} |") == 1, text


@NEEDS_LIBTPU
@pytest.mark.parametrize("alone", ["helix", *gate(["data", "tensor"])])
def test_what_a_tpu_s_layer_moves_is_what_its_layout_names(alone):
    """To the number, of an attention layer alone."""
    text = compiled("--what", "--alone", alone)
    assert text.count(f"a layer, {alone}: moves") == 1, text
