"""Rows of a table of words, whose words may be split over devices.

Letters: W words, D hidden size, B batch, T tokens.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mla_jax import sharding


def embed(table: Float[Array, "W D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Each token's row, NaN for one that does not exist; on a mesh, it lies where its token does.

    Every device looks up the words that it has, and what they found is summed.

    >>> embed(jnp.eye(2), jnp.array([[1, 0, 2]]))[0, :, 0]
    Array([ 0.,  1., nan], dtype=float32)
    """
    mesh = sharding.mesh_of(table, tokens)
    if mesh is None:
        return jnp.take(table, tokens, axis=0)
    words, rows = sharding.spec(table)[0], sharding.spec(tokens)[0]
    free = sharding.without(rows, words)
    shared = tuple(axis for axis in words if axis in rows)
    others = sharding.without(words, shared)

    def own(table, tokens):
        table, tokens = sharding.varying((table, tokens), free + words)
        first = lax.axis_index(words) * len(table) if words else 0
        inside = (tokens >= first) & (tokens < first + len(table))
        x = jnp.where(inside[..., None], table[jnp.where(inside, tokens - first, 0)], 0)
        if shared:
            x = lax.psum_scatter(x, shared, scatter_dimension=0, tiled=True)
        return lax.psum(x, others) if others else x

    at = (sharding.pspec(words), sharding.pspec(free))
    island = sharding.island(own, mesh, at, sharding.pspec(free + shared))
    x = island(sharding.move(table, words, mesh=mesh), sharding.move(tokens, free, mesh=mesh))
    x = sharding.move(x, rows)
    exists = (tokens >= 0) & (tokens < table.shape[0])
    return jnp.where(exists[..., None], x, jnp.nan)
