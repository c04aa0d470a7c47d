"""What whole rows hold, put into other rows: of another cache, or of the same one.

Letters: B batch rows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mla_jax.cache import spread
from mla_jax.cache.dense import Dense
from mla_jax.cache.paged import Paged
from mla_jax.sharding import mesh_of


def inserted(
    cache: Any,
    row: Any,
    index: Int[Array, ""],
    slot: Int[Array, "1 S"],
    chosen: Bool[Array, "B"],
) -> tuple[Dense, ...]:
    """The stores of a `Cache` with what the one row of another holds in row `index`.

    Args:
        cache: with pages taken for the row, where it has any.
        row: a `Cache` of one row of S slots.
        index: past the last row changes nothing.
        slot: of the cache's row, for each slot of the other; one past the last drops it.
        chosen: the index as a choice of rows.
    """

    def put(store, other):
        new = row.view(other).cut(0, row.max_length)
        if cache.pages is None:
            here = {
                name: held.at[index, : row.max_length].set(new[name][0], mode="drop")
                for name, held in store.arrays.items()
            }
            return dataclasses.replace(store, arrays=here)
        table = cache.pages.table.at[index].get(mode="fill", fill_value=cache.pages.count)
        return Paged(store, table[None]).put(slot, new).pool

    def put_parts(store, other):
        split = mesh_of(other) is not None and row.pages is None
        end = row.max_length
        new = spread.row(other, jnp.int32(0)) if split else row.view(other).cut(0, end)
        return spread.give(store, new if split else jax.tree.map(lambda x: x[0], new), chosen)

    on_mesh = cache.pages is None and mesh_of(cache.stores) is not None
    return tuple(map(put_parts if on_mesh else put, cache.stores, row.stores))


def copied(
    stores: tuple[Dense, ...], source: Int[Array, ""], rows: Bool[Array, "B"]
) -> tuple[Dense, ...]:
    """Stores with slots of their own, the chosen rows with what row `source` holds."""
    if mesh_of(stores) is not None:
        return tuple(spread.give(one, spread.row(one, source), rows) for one in stores)

    def copy(held):
        chosen = rows.reshape(-1, *[1] * (held.ndim - 1))
        return jnp.where(chosen, held[source][None], held)

    return jax.tree.map(copy, stores)
