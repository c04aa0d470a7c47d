"""Whole rows of a store whose rows and slots lie on several devices: for `insert` and `fork`.

Letters: B batch rows, S slots of a row, T of them that are given.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from mla_jax import sharding
from mla_jax.cache.dense import Dense
from mla_jax.cache.stripes import Stripes


def row(store: Dense, index: Int[Array, ""]) -> dict[str, Array]:
    """Every array's slots of one row in their order, [S ...], whole on every device."""
    mesh, (rows, slots) = _axes(store)

    def own(arrays, index):
        batch, size = next(iter(arrays.values())).shape[:2]
        here = jnp.arange(batch, dtype=jnp.int32)
        if rows:
            here += lax.axis_index(rows) * batch
        local = jnp.clip(index - here[0], 0, batch - 1)
        ids = _slots(rows, slots, batch, size)[local]

        def whole(held):
            # As integers: zeros added to them change no bit.
            bits = lax.bitcast_convert_type(held[local], f"uint{8 * held.dtype.itemsize}")
            bits = jnp.where(here[local] == index, bits, jnp.zeros_like(bits))
            bits = jnp.zeros((store.slots, *bits.shape[1:]), bits.dtype).at[ids].set(bits)
            bits = lax.psum(bits, rows + slots) if rows + slots else bits
            return lax.bitcast_convert_type(bits, held.dtype)

        return jax.tree.map(whole, arrays)

    specs = (sharding.pspec(rows, slots), jax.P())
    return sharding.island(own, mesh, specs, jax.P())(store.arrays, index)


def give(store: Dense, new: dict[str, Array], chosen: Bool[Array, "B"]) -> Dense:
    """The store with these arrays [T ...] in the first T slots of the chosen rows."""
    mesh, (rows, slots) = _axes(store)

    def own(arrays, new, chosen):
        ids = _slots(rows, slots, *next(iter(arrays.values())).shape[:2])

        def put(held, fresh):
            given = chosen[:, None] & (ids < len(fresh))
            given = given.reshape(*given.shape, *[1] * (held.ndim - 2))
            return jnp.where(given, fresh.at[ids].get(mode="clip"), held)

        return jax.tree.map(put, arrays, new)

    whole = sharding.pspec(rows, slots)
    island = sharding.island(own, mesh, (whole, jax.P(), sharding.pspec(rows)), whole)
    new = jax.tree.map(lambda x: sharding.move(x, mesh=mesh), new)
    arrays = island(store.arrays, new, sharding.move(chosen, rows, mesh=mesh))
    return dataclasses.replace(store, arrays=arrays)


def _axes(store):
    array = next(iter(store.arrays.values()))
    return sharding.mesh_of(array), sharding.spec(array)[:2]


def _slots(rows, slots, batch, size):
    """What a device's rows call its slots, [B S]."""
    if slots:
        return Stripes.here(rows, slots, batch).slots(size)
    return jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[None], (batch, size))
