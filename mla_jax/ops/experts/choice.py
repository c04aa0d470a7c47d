"""A router's choice for few tokens on Hopper GPUs, and the table of the experts that it names.

XLA makes three kernels of a `top_k` and three of `tiles.chosen_experts`, which wait for each other.
Here both are one thread block, which takes little longer than its start. Its first warpgroup
chooses: the best score of every token, K times. Then all warpgroups make the table, each for 64
experts at a time.

For few tokens the product behind the scores leaves sums in parts, as those of XLA do, which takes
one kernel more to add them and to make a softmax of them: here that is done by the same thread
block.

Letters: M tokens, K experts per token, E experts, L parts of a sum.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from mla_jax.ops import guard
from mla_jax.ops.experts.tiles import Chosen
from mla_jax.ops.hopper.merge import like
from mla_jax.ops.hopper.mosaic import kernel, store

ROWS = 64  # rows of a tile, hence the most tokens
MOST_SCORES = 256  # scores of a token: 64 rows of so many fit into registers
MOST_EXPERTS = 512  # experts of a table: a thread block has at most eight warpgroups
_AT_ONCE = 16  # pairs that are loaded before the first is compared
_LOWEST = -(2**31)
_TILE = plgpu.Layout.WGMMA
_ROW, _COLUMN = _TILE.reduce(1), _TILE.reduce(0)


@functools.partial(jax.jit, static_argnames=("count", "interpret"))
def choose(
    scores: Float[Array, "M E"], count: int, *, interpret: Any = None
) -> tuple[Int[Array, "M K"], Chosen]:
    """`lax.top_k(scores, count)[1]` of up to 64 tokens and 256 experts, and its table.

    Scores are in float32; ties and NaN go as there. E is a multiple of 8.
    """
    tokens = scores.shape[0]

    def tile_of(scores_ref, tile, copied):
        plgpu.copy_gmem_to_smem(scores_ref, tile.at[pl.ds(0, tokens)], copied)
        plgpu.barrier_wait(copied)
        return plgpu.load(tile, layout=_TILE, optimized=False)

    return _choose(tile_of, scores, count, interpret, plgpu.Barrier())


@functools.partial(jax.jit, static_argnames=("count", "interpret"))
def choose_by_parts(
    logits: Float[Array, "L M E"], count: int, *, interpret: Any = None
) -> tuple[Int[Array, "M K"], Float[Array, "M K"], Chosen]:
    """`choose` of a softmax of logits that come as parts of their sums, and the scores of that.

    M times E is a multiple of 128.
    """
    terms, tokens, groups = logits.shape
    layout = plgpu.Layout.WG_STRIDED((tokens, groups), math.gcd(tokens * groups // 128, 4))

    def tile_of(logits_ref, tile):
        part = lambda i: plgpu.load(logits_ref.at[i], layout=layout, optimized=False)  # noqa: E731
        total = part(0)
        for i in range(1, terms):
            total += part(i)
        tile[pl.ds(0, tokens)] = total
        found = plgpu.load(tile, layout=_TILE, optimized=False)
        scores = jnp.exp(found - _wide(found.max(1), groups))
        return scores / _wide(scores.sum(1), groups)

    return _choose(tile_of, logits, count, interpret, weighed=True)


def _choose(tile_of, given, count, interpret, *scratch, weighed=False):
    """The choice among scores [M E] that the first warpgroup has, and its table.

    Args:
        tile_of: makes a tile of them of `given` [..., M, E], a tile in shared memory, and scratch.
            Its rows of no token hold anything. Nobody reads what is chosen for them.
        weighed: the chosen scores are results, too.
    """
    tokens, groups = given.shape[-2:]
    places, parts, warpgroups = _cut(tokens * count, groups)

    def body(given_ref, picked_ref, *refs):
        weights_ref, refs = refs[:weighed], refs[weighed:]
        *of_table, met = refs[:6]
        *own, pairs_ref = refs[6:]

        @pl.when(lax.axis_index("wg") == 0)
        def _():
            for k, (at, best) in enumerate(_best(tile_of(given_ref, *own), count)):
                pairs_ref[k] = at
                store(picked_ref.at[:, k], at)
                for ref in weights_ref:
                    store(ref.at[:, k], best)

        _meet(met.at[2])
        load = lambda i: pairs_ref[lax.rem(i, count), lax.div(i, count)]  # noqa: E731
        _table(load, tokens * count, groups, warpgroups, (*of_table, met))

    kinds = (jnp.int32, jnp.float32)[: 1 + weighed]
    *chosen, owner, rank, arrivals = _launch(
        body,
        [*(((ROWS, count), kind) for kind in kinds), *_of_table(places, parts)],
        [
            *_scratch(parts, warpgroups),
            plgpu.SMEM((ROWS, groups), jnp.float32),
            *scratch,
            plgpu.SMEM((count, ROWS), jnp.int32),
        ],
        warpgroups,
        "choose_experts",
        interpret,
        given,
    )
    return *(of_rows[:tokens] for of_rows in chosen), Chosen(owner, rank, arrivals)


def _best(scores, count):
    """The places and the values [64] of the best scores of a tile's rows, one after the other."""
    groups = scores.shape[1]
    # Integers in the order of the numbers, -NaN first and NaN last.
    key = jnp.maximum(_turned(lax.bitcast_convert_type(scores, jnp.int32)), _LOWEST + 1)
    index = plgpu.broadcasted_iota(jnp.int32, key.shape, 1, layout=_TILE)
    for _ in range(count):
        best = key.max(1)
        # The first index of several is the largest distance from the end.
        at = groups - jnp.where(key == _wide(best, groups), groups - index, 0).max(1)
        key = jnp.where(index == _wide(at, groups), _LOWEST, key)
        yield at, lax.bitcast_convert_type(_turned(best), jnp.float32)


def _turned(bits):
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@functools.partial(jax.jit, static_argnames=("groups", "interpret"))
def chosen_experts(experts: Int[Array, "M K"], groups: int, *, interpret: Any = None) -> Chosen:
    """`tiles.chosen_experts` of up to 512 experts."""
    flat = experts.reshape(-1).astype(jnp.int32)

    def body(flat_ref, *refs):
        _table(lambda i: flat_ref[i], flat.size, groups, parts, refs)

    places, parts = _sizes(flat.size, groups)
    table = _of_table(places, parts)
    made = _launch(body, table, _scratch(parts, parts), parts, "chosen_experts", interpret, flat)
    return Chosen(*made)


def _sizes(pairs, groups):
    """How many tiles the places and the experts fill."""
    return -(-min(groups, pairs) // ROWS), -(-groups // ROWS)


def _cut(pairs, groups):
    """The tiles of places and of experts, and the warpgroups, of a choice and its table."""
    places, parts = _sizes(pairs, groups)
    warpgroups = min(parts, 2)  # with more, a thread has no room for a tile of many scores
    return places, -(-parts // warpgroups) * warpgroups, warpgroups


def _of_table(places, parts):
    """Shapes and dtypes of `Chosen`."""
    return [((count * ROWS,), jnp.int32) for count in (places, parts + 1, 1)]


def _scratch(parts, warpgroups):
    return [
        plgpu.SMEM((parts * ROWS,), jnp.int32),
        plgpu.SMEM((parts * ROWS,), jnp.int32),
        plgpu.Barrier(num_arrivals=warpgroups, num_barriers=3),
    ]


def _launch(body, outputs, scratch, warpgroups, name, interpret, operand):
    made = kernel(
        body,
        out_type=[like(operand, *kind) for kind in outputs],
        scratch_types=scratch,
        grid=(1,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="wg",
        kernel_name=name,
        interpret=interpret,
    )
    return guard.unsplit(made, name, interpret)(operand)


def _table(load, pairs, groups, warpgroups, refs):
    """Writes `Chosen` of the experts `load(0)` to `load(pairs - 1)`; all warpgroups call it.

    `refs` are those of its arrays and what `_scratch` says.
    """
    owner_ref, rank_ref, arrivals_ref, named_ref, place_ref, met = refs
    wg, parts = lax.axis_index("wg"), named_ref.shape[0] // ROWS
    tiles = [turn * warpgroups + wg for turn in range(parts // warpgroups)]
    rows = [_iota() + tile * ROWS for tile in tiles]
    mine = [pl.ds(tile * ROWS, ROWS) for tile in tiles]

    def mark(first, count, named):
        for expert in [load(first + i) for i in range(count)]:
            named = [jnp.where(row == expert, 1, n) for row, n in zip(rows, named, strict=True)]
        return named

    whole, named = pairs // _AT_ONCE, [_filled(0)] * len(tiles)
    named = lax.fori_loop(0, whole, lambda i, n: mark(i * _AT_ONCE, _AT_ONCE, n), named)
    named = mark(whole * _AT_ONCE, pairs % _AT_ONCE, named)
    named = [jnp.where(row < groups, n, 0) for row, n in zip(rows, named, strict=True)]
    for at, n in zip(mine, named, strict=True):
        named_ref[at] = n
    _meet(met.at[0])
    for row, at, n in zip(rows, mine, named, strict=True):
        before = total = _filled(0)
        for part in range(parts):
            there, index = _columns(named_ref, part)
            before += jnp.where(index < _wide(row), there, 0).sum(1)
            total += there.sum(1)
        store(rank_ref.at[at], before)
        place_ref[at] = jnp.where(n > 0, before, -1)

    @pl.when(wg == 0)
    def _():
        store(rank_ref.at[pl.ds(parts * ROWS, ROWS)], total)
        store(arrivals_ref, _filled(0))

    _meet(met.at[1])
    for tile, row, at in zip(tiles, rows, mine, strict=True):

        @pl.when(tile * ROWS < owner_ref.shape[0])
        def _(row=row, at=at):
            owner = _filled(0)
            for part in range(parts):
                place, index = _columns(place_ref, part)
                owner += jnp.where(place == _wide(row), index, 0).sum(1)
            store(owner_ref.at[at], owner)


def _filled(value):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.int32), _ROW)


def _iota():
    return plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (ROWS,), 0), _ROW)


def _wide(row, width=ROWS):
    return lax.broadcast_in_dim(row, (ROWS, width), [0])


def _columns(ref, part):
    """64 numbers in shared memory as columns of a tile, and their indices."""
    values = plgpu.load(ref.at[pl.ds(part * ROWS, ROWS)], layout=_COLUMN, optimized=False)
    index = plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), 1, layout=_TILE) + part * ROWS
    return lax.broadcast_in_dim(values, (ROWS, ROWS), [1]), index


def _meet(barrier):
    """Waits until all warpgroups are here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
