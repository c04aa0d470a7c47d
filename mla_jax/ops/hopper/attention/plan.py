"""Which blocks of slots a tile of queries meets, and which of these need no mask.

A query sees the slots from its start to its end that carry its segment's id; `ops/blocks.py` sums
that up by blocks, once a call for all heads, forward and backward.

Letters: B batch, T query tokens, S slots.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from mla_jax.ops import blocks

ROWS = 64  # rows of a matrix product: of queries, or of slots in the gradient of keys
TILE = 2 * ROWS  # rows of a thread block


class Sizes(NamedTuple):
    """Slots of a block in the forward kernel, in that of dq, and rows of a tile in that of dk."""

    forward: int
    queries: int
    keys: int


class Plan(NamedTuple):
    """What the kernels read beside the operands; made by `make_plan`.

    Attributes:
        bounds: start, end and (with segments) id of every query, padded to whole tiles.
        ids: of every slot, padded to whole tiles; None without segments.
        forward, queries, keys: of each tile `first`, `open`, `close`, `last` in blocks of the other
            side, and the number of slots that any query of the batch row sees.
        dead: whether a block of 64 queries holds one that sees nothing.
    """

    bounds: Int[Array, "b rows padded"]
    ids: Int[Array, "b padded"] | None
    forward: Int[Array, "b tiles 5"]
    queries: Int[Array, "b tiles 5"]
    keys: Int[Array, "b tiles 5"]
    dead: Int[Array, "b blocks"]


def padded(length: int) -> int:
    """Tokens or slots up to whole tiles."""
    return -(-length // TILE) * TILE


def make_plan(
    limits: Int[Array, "b T"],
    slots: int,
    sizes: Sizes,
    *,
    window: int | None = None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
) -> Plan:
    """The plan of one call.

    Args:
        limits: how many slots each query sees; one row serves all batch rows.
        slots: S.
        sizes: of the kernels' blocks.
        window: a query sees only the last `window` slots below its limit.
        segment_ids: of queries and of slots.
    """
    limits = limits.astype(jnp.int32)
    end = jnp.clip(limits, 0, slots)  # of a piece of the slots, limits may lie beyond
    start = jnp.zeros_like(end) if window is None else jnp.maximum(limits - window, 0)
    tokens = end.shape[1]
    # Rows past the last token repeat it: they are never stored, and no tile is masked for them.
    wide = [(0, 0), (0, padded(tokens) - tokens)]
    rows = [jnp.pad(x, wide, mode="edge") for x in (start, end)]
    ids = None
    if segment_ids is not None:
        of_query, of_slot = (x.astype(jnp.int32) for x in segment_ids)
        batch = of_query.shape[0]
        rows = [jnp.broadcast_to(x, (batch, x.shape[1])) for x in rows]
        rows.append(jnp.pad(of_query, wide, mode="edge"))
        ids = jnp.pad(of_slot, [(0, 0), (0, padded(slots) - slots)], mode="edge")
    live = end.max(1)

    def ranges(query_rows: int, slot_rows: int, transposed: bool = False):
        some, whole = blocks.visible(rows, ids, slots, query_rows, slot_rows)
        if transposed:
            some, whole = some.swapaxes(1, 2), whole.swapaxes(1, 2)
        return blocks.runs(some, whole, live)

    start, end = rows[:2]
    return Plan(
        bounds=jnp.stack(rows, axis=1),
        ids=ids,
        forward=ranges(TILE, sizes.forward),
        queries=ranges(TILE, sizes.queries),
        keys=ranges(ROWS, sizes.keys, transposed=True),
        dead=blocks.cut(start >= end, ROWS).any(-1).astype(jnp.int32),
    )


def limits_of(
    batch: int,
    tokens: int,
    slots: int,
    *,
    limits=None,
    lengths=None,
    query_lengths=None,
    causal: bool = True,
) -> Int[Array, "b T"]:
    """How many slots each query sees; one row where all batch rows are alike.

    Args:
        batch, tokens, slots: B, T, S.
        limits: [B T] or [B 1], taken as they are.
        lengths: [B] slots in use; causal queries are the last T of them.
        query_lengths: [B] queries in use: those from there on see nothing.
        causal: whether query t sees the slots up to its own only.
    """
    if limits is None:
        ends = jnp.full((1,), slots, jnp.int32) if lengths is None else lengths
        back = tokens - 1 - lax.iota(jnp.int32, tokens) if causal else jnp.zeros(tokens, jnp.int32)
        limits = ends[:, None] - back[None]
    limits = jnp.broadcast_to(limits, (limits.shape[0], tokens))
    if query_lengths is not None:
        counts = lax.iota(jnp.int32, tokens)[None] < query_lengths[:, None]
        limits = jnp.where(counts, limits, 0)
    return limits
