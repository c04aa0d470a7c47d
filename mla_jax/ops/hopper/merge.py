"""The merge of a batch row that several parts of the decode kernel worked on, at the kernel's end.

Each of them has stored a normalised piece in float32, up to 64 query rows of R, and its
log-sum-exp. Every warpgroup of the parts that end with this row waits for all pieces and then
merges some of the query rows. (`ops.merge` joins results of two calls instead, by XLA.)

Letters: R latent width.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper.schedule import FEW_ROWS, TILE, Column

LOG2E = math.log2(math.e)
LOWEST = -1e30  # first running maximum: finite, so that exp2(old - new) is never NaN
# For up to 2, up to 4, up to 31, and more pieces: into how many units a query row is cut, how many
# units are merged at once, and how many pieces.
_FEW, _AT_ONCE = (2, 4, 31), ((1, 8, 2), (1, 4, 4), (1, 2, 8), (2, 1, 32))
# The same for few query rows, of up to 4, up to 16 and of more pieces. Where these are few, each
# warpgroup has several rows; where they are many, there are more warpgroups than rows.
_OF_FEW_ROWS = (4, 16), ((1, 4, 2), (4, 1, 16), (4, 1, 36))


def like(operand, shape, dtype):
    """The type of a result that varies over the same mesh axes as an operand of the kernel."""
    kind = getattr(jax.typeof(operand), "mat", None)  # only under shard_map
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def piece(part, tile, began_before, shape):
    """Where a part's piece of a row begins: every part has room for two pieces.

    A part shares at most its first row, which began before it, and its last.
    """
    return (jnp.where(began_before, part, shape.parts + part) * shape.tiles + tile) * TILE


def merge(part, tile, wg, refs, shape, meet=None):
    """Merges this warpgroup's share of the part's last row, if the part has that with others.

    A shared first row is the last row of a part before, which merges it.

    Args:
        part, tile, wg: which warpgroup this is.
        refs: the kernel's arrays by name.
        shape: what the kernel is compiled for.
        meet: waits until all pieces of a row are stored (`mosaic.meet_global`); None where they
            already are.
    """
    row, shared = (refs["part"][part, i] for i in (Column.LAST_ROW, Column.LAST_ROW_SHARED))
    pl.when(shared > 0)(lambda: _merge_share(row, part, tile, wg, refs, shape, meet))


def _merge_share(row, part, tile, wg, refs, shape, meet):
    """Some query rows of a batch row: their pieces weighted by exp2(lse), added in order."""
    out, lse, part_out, part_lse = (refs[x] for x in ("out", "lse", "part_out", "part_lse"))
    first, last = refs["row_parts"][0, row], refs["row_parts"][1, row]
    count = last - first + 1
    beyond = refs["part"][last, Column.LAST_ROW] > row  # the last of them ends with another row
    sharers = 2 * (count - beyond.astype(jnp.int32))
    if meet is not None:
        meet(refs["arrivals"], row * shape.tiles + tile, 2 * count, sharers)

    def merge_units(cuts, units_at_once, pieces_at_once):
        cuts = cuts if shape.rank % (128 * cuts) == 0 else 1
        width = shape.rank // cuts
        vector = next(v for v in (4, 2, 1) if width % (128 * v) == 0)
        layout = plgpu.Layout.WG_STRIDED((width,), vector)
        live = cuts * jnp.minimum(shape.rows - tile * TILE, TILE)
        each = lax.div(live + sharers - 1, sharers)
        lo = (2 * (part - first) + wg) * each
        hi = jnp.minimum(lo + each, live)

        def body(i, _):
            # Units past the end repeat the last one, and write the same values twice.
            units = [jnp.minimum(lo + i * units_at_once + j, hi - 1) for j in range(units_at_once)]
            mine = [(lax.div(u, cuts), pl.ds(lax.rem(u, cuts) * width, width)) for u in units]

            def add(n, carry):
                index = [n * pieces_at_once + u for u in range(pieces_at_once)]
                owner = [jnp.minimum(i, count - 1) + first for i in index]
                at = [piece(o, tile, o > first, shape) for o in owner]
                values = [
                    plgpu.load(part_out.at[a + r, columns], layout=layout)
                    for a in at
                    for r, columns in mine
                ]
                weights = [
                    jnp.where(i < count, part_lse[a + r], -jnp.inf)
                    for i, a in zip(index, at, strict=True)
                    for r, _ in mine
                ]
                loaded = list(zip(weights, values, strict=True))
                new = []
                for j, (value, weight, m) in enumerate(carry):
                    pairs = loaded[j::units_at_once]
                    m_new = functools.reduce(jnp.maximum, [x for x, _ in pairs], m)
                    alpha = jnp.exp2(m - m_new)
                    value, weight = value * alpha, weight * alpha
                    for x, v in pairs:
                        w = jnp.exp2(x - m_new)
                        value, weight = value + v * w, weight + w
                    new.append((value, weight, m_new))
                return tuple(new)

            zero = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
            start = tuple((zero, jnp.float32(0), jnp.float32(LOWEST)) for _ in mine)
            steps = lax.div(count + (pieces_at_once - 1), jnp.int32(pieces_at_once))
            merged = lax.fori_loop(0, steps, add, start)
            for (r, columns), (value, weight, m) in zip(mine, merged, strict=True):
                some = weight != 0  # NaN is a sum of weights, too
                safe = jnp.where(some, weight, 1.0)
                to = row * shape.rows + tile * TILE + r
                out[to, columns] = (value * jnp.where(some, 1.0 / safe, 0.0)).astype(shape.dtype)
                lse[to] = jnp.where(some, (m + jnp.log2(safe)) * (1.0 / LOG2E), -jnp.inf)
            return ()

        @pl.when(hi > lo)
        def _():
            turns = lax.div(hi - lo + (units_at_once - 1), jnp.int32(units_at_once))
            lax.fori_loop(0, turns, body, ())

    # Registers bound the loads in flight; these are loads of the many pieces of one unit, or of
    # the few pieces of several units.
    few, ways = _OF_FEW_ROWS if shape.rows <= FEW_ROWS else (_FEW, _AT_ONCE)
    kind = sum((count > most).astype(jnp.int32) for most in few)
    lax.switch(kind, [functools.partial(merge_units, *at_once) for at_once in ways])
