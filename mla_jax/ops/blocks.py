"""Which blocks of slots a block of queries meets, and which of these need no mask.

A query sees the slots from its start to its end that carry its segment's id. Blocks are summed up
by their smallest and largest start, end and id, so that blocks that cannot see each other are never
visited, and blocks that see each other in full are never masked. Of every block a kernel keeps a
hull, the blocks of the other side from `first` to `last`, and within it a run that needs no mask,
from `open` to `close`; blocks outside the run are masked element by element, which is right for any
ids. All of it is arithmetic on [B T] integers.

Letters: B batch, T query tokens, S slots.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool

_FAR = 2**30


def cut(x, size):
    """[b n] to [b n/size size]; the last block repeats its last entry."""
    more = -x.shape[1] % size
    x = jnp.pad(x, [(0, 0), (0, more)], mode="edge")
    return x.reshape(x.shape[0], -1, size)


def visible(rows, ids, slots, query_rows, slot_rows):
    """Per pair of blocks: whether any, and whether every query may see any, every slot."""
    start, end, *of_query = (cut(x, query_rows) for x in rows)
    alive = start < end
    first = jnp.arange(-(-slots // slot_rows), dtype=jnp.int32)[None, None] * slot_rows
    past = first + slot_rows
    column = lambda x: x[:, :, None]  # noqa: E731
    some = column(jnp.where(alive, end, 0).max(2)) > first
    some &= column(jnp.where(alive, start, _FAR).min(2)) < past
    whole = (column(jnp.where(alive, end, 0).min(2)) >= past) & (column(start.max(2)) <= first)
    if ids is not None:
        low, high = of_query[0].min(2), of_query[0].max(2)
        block = cut(ids, slot_rows)[:, : first.shape[2]]
        slot_low, slot_high = block.min(2)[:, None], block.max(2)[:, None]
        some &= (column(low) <= slot_high) & (column(high) >= slot_low)
        whole &= (column(high) == slot_low) & (column(low) == slot_high)
    return some, whole & some


def runs(some: Bool[Array, "b tiles n"], whole: Bool[Array, "b tiles n"], live):
    """first, open, close, last and `live` of each tile: the first run of whole blocks is kept."""
    count = some.shape[2]
    index = jnp.arange(count, dtype=jnp.int32)[None, None]
    first = jnp.where(some, index, count).min(2)
    last = jnp.where(some, index + 1, 0).max(2)
    first = jnp.minimum(first, last)
    opened = jnp.where(whole, index, count).min(2)
    close = jnp.where(~whole & (index >= opened[..., None]), index, count).min(2)
    opened, close = jnp.minimum(opened, last), jnp.minimum(close, last)
    live = jnp.broadcast_to(live[:, None], first.shape)
    return jnp.stack([first, opened, close, last, live], axis=2)
