"""The merge of a batch row that several parts of the decode kernel worked on, by these same parts.

Each left a normalised piece [64, R] in float32 and its log-sum-exp; every warpgroup of theirs waits
for all and then merges some of the query rows.

Letters: R latent width.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.pallas_gpu import mosaic
from mla_jax.ops.pallas_gpu.schedule import TILE

LOG2E = math.log2(math.e)
LOWEST = -1e30  # first running maximum: finite, so that exp2(old - new) is never NaN
_MERGE = ((1, 8), (4, 2))  # query rows and pieces at once, for many pieces and for few


def like(operand, shape, dtype):
    kind = getattr(jax.typeof(operand), "mat", None)  # under shard_map, what it varies over
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def piece(part, tile, began_before, shape):
    """Where a part's piece of a row begins: a part shares at most its first and its last row."""
    return (jnp.where(began_before, part, shape.parts + part) * shape.tiles + tile) * TILE


def merge(
    part, tile, wg, row_first, row_parts, parts, arrivals, out, lse, part_out, part_lse, shape
):
    """Merges this warpgroup's share of the rows that the part had with others."""
    share = functools.partial(
        _merge_share, part=part, tile=tile, wg=wg, row_first=row_first, row_parts=row_parts,
        arrivals=arrivals, out=out, lse=lse, part_out=part_out, part_lse=part_lse, shape=shape,
    )  # fmt: skip
    first, last, first_shared, last_shared = (parts[part, i] for i in (2, 5, 6, 7))
    pl.when(first_shared > 0)(lambda: share(first))
    pl.when((last > first) & (last_shared > 0))(lambda: share(last))


def _merge_share(
    row, *, part, tile, wg, row_first, row_parts, arrivals, out, lse, part_out, part_lse, shape
):
    """Some query rows of a batch row: their pieces weighted by exp2(lse), added in order."""
    count, first = row_parts[row], row_first[row]
    if shape.native:
        mosaic.wait_global(arrivals, row * shape.tiles + tile, 2 * count)
    live = jnp.minimum(shape.rows - tile * TILE, TILE)
    each = lax.div(live + 2 * count - 1, 2 * count)
    lo = (2 * (part - first) + wg) * each
    hi = jnp.minimum(lo + each, live)
    vector = 4 if shape.rank % 512 == 0 else 2 if shape.rank % 256 == 0 else 1
    layout = plgpu.Layout.WG_STRIDED((shape.rank,), vector)

    def merge(rows_at_once, pieces_at_once):
        def body(i, _):
            # Rows past the end repeat the last one: the same values are written twice.
            mine = [jnp.minimum(lo + i * rows_at_once + j, hi - 1) for j in range(rows_at_once)]

            def add(n, carry):
                loaded = []
                for u in range(pieces_at_once):
                    index = n * pieces_at_once + u
                    owner = jnp.minimum(index, count - 1) + first
                    at = piece(owner, tile, owner > first, shape)
                    for r in mine:
                        x = jnp.where(index < count, part_lse[at + r], -jnp.inf)
                        loaded.append((x, plgpu.load(part_out.at[at + r], layout=layout)))
                new = []
                for j, (value, weight, m) in enumerate(carry):
                    pairs = loaded[j::rows_at_once]
                    m_new = functools.reduce(jnp.maximum, [x for x, _ in pairs], m)
                    alpha = jnp.exp2(m - m_new)
                    value, weight = value * alpha, weight * alpha
                    for x, v in pairs:
                        w = jnp.exp2(x - m_new)
                        value, weight = value + v * w, weight + w
                    new.append((value, weight, m_new))
                return tuple(new)

            zero = plgpu.layout_cast(jnp.zeros((shape.rank,), jnp.float32), layout)
            start = tuple((zero, jnp.float32(0), jnp.float32(LOWEST)) for _ in mine)
            steps = lax.div(count + (pieces_at_once - 1), jnp.int32(pieces_at_once))
            for r, (value, weight, m) in zip(
                mine, lax.fori_loop(0, steps, add, start), strict=True
            ):
                some = weight > 0
                safe = jnp.where(some, weight, 1.0)
                to = row * shape.rows + tile * TILE + r
                out[to] = (value * jnp.where(some, 1.0 / safe, 0.0)).astype(shape.dtype)
                lse[to] = jnp.where(some, (m + jnp.log2(safe)) * (1.0 / LOG2E), -jnp.inf)
            return ()

        @pl.when(hi > lo)
        def _():
            lax.fori_loop(
                0, lax.div(hi - lo + (rows_at_once - 1), jnp.int32(rows_at_once)), body, ()
            )

    # Eight loads in flight: over the pieces of a row, or over rows of few pieces.
    lax.cond(count >= 8, lambda: merge(*_MERGE[0]), lambda: merge(*_MERGE[1]))
    if shape.native:
        mosaic.leave_global(arrivals, row * shape.tiles + tile, 4 * count - 1)


def merge_interpreted(out, lse, part_out, part_lse, schedule, shape, common):
    """The merge as a kernel of its own: the interpreter runs one thread block after the other."""

    def body(*refs):
        part_out, part_lse, row_first, row_parts, parts, out, lse = refs
        part, tile, wg = (lax.axis_index(name) for name in ("part", "tile", "wg"))

        @pl.when(parts[part, 1] > parts[part, 0])
        def _():
            merge(
                part, tile, wg, row_first, row_parts, parts, None, out, lse, part_out, part_lse,
                shape,
            )  # fmt: skip

    results = [like(x, x.shape, x.dtype) for x in (out, lse)]
    merged = plgpu.kernel(body, out_type=results, **common)(
        part_out, part_lse, schedule.row_first, schedule.row_parts, schedule.part,
    )  # fmt: skip
    split = jnp.repeat(schedule.row_parts > 1, shape.rows, total_repeat_length=out.shape[0])
    return jnp.where(split[:, None], merged[0], out), jnp.where(split, merged[1], lse)
