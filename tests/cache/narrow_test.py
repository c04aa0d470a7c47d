"""Tokens written in place to narrow arrays, as a TPU does it, against the scatter."""

from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_jax import target
from mla_jax.cache import Dense, Paged

CHIP = target.Target("tpu", "TPU v6 lite")
TABLE = jnp.array([[3, 0, 4], [1, 5, 5], [2, 6, 7]], jnp.int32)  # of 5 pages: 5 and more is none
# Slots of the first token of each row, and how many of a row's tokens count.
CASES = {
    "one": ([0, 7, 383], [1, 1, 1], 1),
    "few": ([126, 381, 5], [4, 4, 0], 4),
    "many": ([100, 0, 300], [150, 128, 0], 150),
    "over the end": ([250, 128, 127], [134, 20, 2], 150),
}


@pytest.mark.parametrize("paged", [False, True], ids=["dense", "pages"])
@pytest.mark.parametrize("case", CASES)
def test_writes_what_a_scatter_writes(case, paged, rng):
    start, counts, tokens = CASES[case]
    token = np.arange(tokens)[None]
    at = np.array(start)[:, None] + token
    at = np.where((token < np.array(counts)[:, None]) & (at < 384), at, 384 + token)
    if case == "few":
        at[0] = at[0, ::-1]  # no order is needed
    new = jnp.asarray(rng.standard_normal((3, tokens, 2)), jnp.float32)
    rows = (5, 128, 2) if paged else (3, 384, 2)
    store = Dense({"k_rope": jnp.asarray(rng.standard_normal(rows), jnp.float32)})
    store = Paged(store, TABLE) if paged else store
    want = store.write(jnp.asarray(at, jnp.int32), k_rope=new)
    with mock.patch.object(target, "current", return_value=CHIP):
        got = store.write(jnp.asarray(at, jnp.int32), k_rope=new)
    chex.assert_trees_all_equal(got, want)


@pytest.mark.parametrize(
    ("width", "slots", "in_tiles"), [(16, 384, True), (2, 384, False), (16, 320, False)]
)
def test_a_block_is_cut_from_tiles_where_they_are_whole(width, slots, in_tiles, rng):
    held = jnp.asarray(rng.standard_normal((3, slots, width)), jnp.float32)
    store = Dense({"k_rope": held, "latent": jnp.zeros((3, slots, 128))})
    cut = jax.jit(lambda store, start: store.block(start, 128, pages=True))
    with mock.patch.object(target, "current", return_value=CHIP):
        lowered = cut.lower(store, jnp.int32(0))
        assert ("3x2x3x8x128" in lowered.as_text()) == in_tiles
        got = cut(store, jnp.int32(128))["k_rope"]
    np.testing.assert_array_equal(got, held[:, 128:256])
