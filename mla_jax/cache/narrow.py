"""Arrays narrower than 128 channels on TPU: writing tokens in place, and cutting slots out.

There such an array is laid out slot-minor, and a scatter would copy all of it to another layout and
back. Here tokens go in one after the other, or, where a row's tokens follow each other, 128 slots
at a time, as lanes lie.

Letters: B batch rows, T new tokens, G rows or pages of the array, W slots of each, P channels.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from mla_jax import sharding, target

_LANES = 128
_TILE = 8  # channels of a tile
_SINGLY = 8  # tokens of a row up to which one goes in after the other

# (batch row, slot of it) -> row of the array, slot there, and whether there is such a slot.
Place = Callable[[Int[Array, ""], Int[Array, ""]], tuple[Array, Array, Array]]


def serves(held: Array, at: Array, follow: bool = True) -> bool:
    """Whether an array is one that `write` is for, and so is what comes.

    `follow` says that the tokens of a row follow each other: else many go in by a scatter.
    """
    if not _is_narrow(held, *at.shape):
        return False
    return at.shape[1] <= _SINGLY or (follow and held.shape[1] % _LANES == 0)


def write(
    held: Shaped[Array, "G W P"], new: Shaped[Array, "B T P"], at: Int[Array, "B T"], place: Place
) -> Shaped[Array, "G W P"]:
    """The array with new tokens at the slots `at` of their rows.

    What goes to a slot that does not exist is dropped: what is read in its stead is written back.
    """
    mesh = sharding.mesh_of(new, at)
    if mesh is not None and sharding.mesh_of(held) is None:
        # An array made before there was a mesh: of any other operation, too, the result is on it.
        held = jax.sharding.reshard(held, jax.NamedSharding(mesh, jax.P()))
    if at.shape[1] <= _SINGLY:
        return _singly(held, new, at, place)
    run = at[:, :1] + jnp.arange(at.shape[1], dtype=at.dtype)[None]
    # Tokens that are dropped come last in a row, and their slots lie past all that there are.
    exists = place(jnp.arange(len(at), dtype=at.dtype)[:, None], at)[2]
    follows = (at == run) | ~exists
    return jax.lax.cond(
        follows.all(),
        lambda held: _by_lanes(held, new, at, place),
        lambda held: _singly(held, new, at, place),
        held,
    )


def lies_in_tiles(held: Array, size: int) -> bool:
    """Whether `cut` is for an array, and for so many of its slots."""
    if not _is_narrow(held, size):
        return False
    return held.shape[2] % _TILE == 0 and held.shape[1] % _LANES == 0 and size % _LANES == 0


def cut(held: Shaped[Array, "G W P"], start: Array | int, size: int) -> Shaped[Array, "G s P"]:
    """Slots start to start + size, both multiples of 128: by tiles, as they lie.

    A slice along lanes that begins anywhere would make XLA copy all of the array to another layout
    first.
    """
    rows, slots, width = held.shape
    tiles = jnp.swapaxes(held, 1, 2).reshape(rows, width // _TILE, _TILE, slots // _LANES, _LANES)
    tiles = jnp.swapaxes(tiles, 2, 3)
    part = jax.lax.dynamic_slice_in_dim(tiles, start // _LANES, size // _LANES, axis=2)
    part = jax.lax.optimization_barrier(part)
    return jnp.swapaxes(jnp.swapaxes(part, 2, 3).reshape(rows, width, size), 1, 2)


def _is_narrow(held, *sizes):
    """Whether an array lies with slots last, and all sizes are known."""
    device = target.current()
    # On Auto axes XLA's partitioner would gather all of the array for each part of it.
    if device.platform != "tpu" or device.auto or held.ndim != 3 or held.shape[2] % _LANES == 0:
        return False
    return all(isinstance(size, int) for size in (*held.shape, *sizes))


def _singly(held, new, at, place):
    batch, tokens, width = new.shape

    def step(i, held):
        b, t = i // tokens, i % tokens
        row, slot, exists = place(b, at[b, t])
        where = (row, slot, jnp.int32(0))
        fresh = jax.lax.dynamic_slice(new, (b, t, 0), (1, 1, width))
        kept = jax.lax.dynamic_slice(held, where, (1, 1, width))
        return jax.lax.dynamic_update_slice(held, jnp.where(exists, fresh, kept), where)

    return jax.lax.fori_loop(0, batch * tokens, step, held)


def _by_lanes(held, new, at, place):
    batch, tokens, width = new.shape
    count = (tokens + 2 * _LANES - 2) // _LANES  # of 128 slots that a row's tokens may touch
    wide = ((0, 0), (_LANES, 2 * _LANES), (0, 0))
    new = jnp.pad(new, wide)
    run = at[:, :1] + jnp.arange(tokens, dtype=at.dtype)[None]
    counts = jnp.pad((at == run)[..., None], wide)

    def step(i, held):
        b = i // count
        first = (at[b, 0] // _LANES + i % count) * _LANES
        row, slot, exists = place(b, first)
        where = (row, slot, jnp.int32(0))
        begin = first - at[b, 0] + _LANES
        fresh = jax.lax.dynamic_slice(new, (b, begin, 0), (1, _LANES, width))
        counted = jax.lax.dynamic_slice(counts, (b, begin, 0), (1, _LANES, 1))
        kept = jax.lax.dynamic_slice(held, where, (1, _LANES, width))
        return jax.lax.dynamic_update_slice(held, jnp.where(counted & exists, fresh, kept), where)

    return jax.lax.fori_loop(0, batch * count, step, held)
