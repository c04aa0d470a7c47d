"""The TPU kernel: its operands and buffers, and the loop over the blocks of all rows.

`walk.py` says which blocks there are, `copies.py` brings them to VMEM, and `compute.py` is their
arithmetic. A step of the loop holds two independent halves, so that the scheduler can fill the
waits of one with work of the other:

    score  block j+1: queries x keys on the matrix unit, running maximum -> scores, top, fade
    mix    block j:   exp2, sum, weights x latents on the matrix unit    -> total, mixed

Where a chip has two cores, a row that straddles their halves of the blocks is merged by lse.

HBM layout: XLA lays an array of 64 channels per slot out slot-minor, so k_rope goes in as [B P S];
that transpose is a bitcast of what is stored, and its lanes hold no padding. XLA's tiles have 8
rows. Arrays go in, and VMEM buffers are, as [.. /8 8 ..], so that the compiler uses the same tile
in VMEM, where it may prefer 16 rows, and a copy moves whole tiles (on tpu7x the other way takes
three times as long).

Letters: B batch, T query tokens, S cache slots, N heads, R latent, P rotary channels, M = T N
queries of a row, padded to whole tiles, C slots of a block, G pages of a pool.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mla_jax.ops.tpu.compute import Compute
from mla_jax.ops.tpu.copies import MOST_ROWS, Copies, clear_ref
from mla_jax.ops.tpu.planning import LANES, TILE, Plan, rows_held
from mla_jax.ops.tpu.walk import Place, Sizes, Walk


def launch(pattern, q_rope, latent, k_rope, lengths, scale, plan: Plan, known=None, table=None):
    """The kernel call: out [B M/8 8 R], lse [B M/128 128] and, of two cores, parts of a shared row.

    With a table [B pages] the cache is a pool, latent [G 128 R] and k_rope [G 128 P].

    With `lengths` None, control flow depends on nothing in memory: every row is full, or of length
    known(row). libtpu's static profiler needs that, as it takes a length read at run time for 0.
    """
    (batch, tokens, heads, rank), (count, held_slots, rope) = pattern.shape, k_rope.shape
    slots = held_slots if table is None else table.shape[1] * LANES
    dtype, queries = latent.dtype, tokens * heads
    rows = -(-queries // 16) * 16  # M: whole tiles, in either dtype
    groups = -(-rows // LANES)

    def by_row(x):
        x = x.reshape(batch, queries, x.shape[-1])
        x = jnp.pad(x, ((0, 0), (0, rows - queries), (0, 0)))
        return x.reshape(batch, rows // TILE, TILE, x.shape[-1])

    arrays = {
        "pattern": by_row(pattern),
        "latent": latent.reshape(count, held_slots // TILE, TILE, rank),
    }
    if rope:
        arrays["q_rope"] = by_row(q_rope)
        tiles = jnp.swapaxes(k_rope, 1, 2).reshape(count, rope // TILE, TILE, -1, LANES)
        arrays["k_rope"] = jnp.swapaxes(tiles, 2, 3)
    if lengths is not None:
        arrays["lengths"] = lengths.astype(jnp.int32).reshape(-1)
    if table is not None:
        arrays["table"] = table.astype(jnp.int32).reshape(-1)

    # The cache is read from HBM even where XLA would have moved part of it to VMEM before.
    scalars = ("lengths", "table")
    operands = [
        x if name in scalars else pltpu.with_memory_space_constraint(x, pltpu.HBM)
        for name, x in arrays.items()
    ]
    make = shaped(arrays.values())
    results = {
        "out": make((batch, rows // TILE, TILE, rank), dtype),
        "lse": make((batch, groups, LANES), jnp.float32),
    }
    if plan.cores > 1:  # each core's part of the row that they share
        results |= {
            "part": make((plan.cores, rows, rank), jnp.float32),
            "part_lse": make((plan.cores, groups, LANES), jnp.float32),
        }
    vmem, pieces = pltpu.VMEM, plan.block // plan.piece
    held = rows_held(batch, pieces, plan.ring)
    scratch = {
        "pattern": vmem((held, rows // TILE, TILE, rank), dtype),
        "latent": vmem((plan.ring, plan.block // TILE, TILE, rank), dtype),
        "scores": vmem((rows, plan.block), jnp.float32),
        "top": vmem((2, pieces, rows, LANES), jnp.float32),
        "fade": vmem((pieces, rows, LANES), jnp.float32),
        "peak": vmem((pieces, rows, LANES), jnp.float32),  # top again, for a constant index
        "total": vmem((pieces, rows, LANES), jnp.float32),
        "mixed": vmem((pieces, rows, rank), jnp.float32),
        "out": vmem((2, pieces, rows // TILE, TILE, rank), dtype),
        "lse": vmem((2, pieces, groups, LANES), jnp.float32),
        "loaded": pltpu.SemaphoreType.DMA((plan.ring,)),
        "stored": pltpu.SemaphoreType.DMA(()),
    }
    if rope:
        scratch["q_rope"] = vmem((held, rows // TILE, TILE, rope), dtype)
        scratch["k_rope"] = vmem((plan.ring, rope // TILE, plan.block // LANES, TILE, LANES), dtype)
    if plan.cores > 1:
        scratch["part"] = vmem((rows, rank), jnp.float32)
        scratch["part_lse"] = vmem((groups, LANES), jnp.float32)
    sizes = Sizes(
        batch=batch,
        tokens=tokens,
        heads=heads,
        slots=slots,
        per_query=lengths is not None and lengths.ndim == 2,
        scale=scale * math.log2(math.e),
        plan=plan,
        held=held,
        known=known,
    )

    def kernel(*refs):
        names = [*arrays, *results]
        Core(sizes, dict(zip(names, refs, strict=False)), refs[len(names)]).run()

    work = batch * slots * rows
    size = jnp.dtype(dtype).itemsize
    specs = {name: pl.BlockSpec(memory_space=pl.ANY) for name in (*arrays, *results)}
    specs |= {name: pl.BlockSpec(memory_space=pltpu.SMEM) for name in scalars}
    return pl.pallas_call(
        kernel,
        grid=(plan.cores,),
        in_specs=[specs[name] for name in arrays],
        out_specs=[specs[name] for name in results],
        out_shape=list(results.values()),
        scratch_shapes=[scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=plan.vmem_bytes,
            # The interpreter makes both checks. That of semaphores stands at the kernel's end, and
            # libtpu's profiler does not know it on tpu7x; that of bounds takes 100 cycles a block.
            disable_semaphore_checks=True,
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * work * (2 * rank + rope),
            transcendentals=work,
            bytes_accessed=batch * (slots * (rank + rope) + rows * (2 * rank + rope)) * size,
        ),
        name="mla_decode",
    )(*operands)


class Core:
    """One core's work: the loop over its blocks, and the copies of results from VMEM to HBM."""

    def __init__(self, sizes: Sizes, hbm: dict[str, Any], vmem: dict[str, Any]):
        self.plan, self.hbm, self.vmem = sizes.plan, hbm, vmem
        self.walk = Walk(sizes, hbm.get("lengths"))
        self.copies = Copies(self.walk, hbm, vmem)
        self.compute = Compute(self.walk, vmem, self.copies.keys, self.copies.parts)
        self.last = self.walk.pieces - 1  # number of a block's last piece

    def run(self):
        pl.when(self.walk.count > 0)(self.loop)

    def loop(self):
        walk, copies, compute = self.walk, self.copies, self.compute
        ring, last, zero = self.plan.ring, walk.count - 1, jnp.int32(0)
        parts, first = copies.copy_first()
        for name in ("total", "mixed"):  # from which the first row goes on
            clear_ref(self.vmem[name].at[self.last])
        places, copied = [walk.first, first[-1]], []
        for step in range(1, ring - 1):
            count, following = copies.copy_block(jnp.int32(step), places[-1])
            copied.append(count)
            places.append(following)
        copies.unpoison()
        whole = walk.whole(walk.first)
        arrive = functools.partial(copies.wait_first, parts, first)
        _either(whole, lambda w: compute.score(zero, walk.first, w, functools.partial(arrive, w)))
        # Only now is the semaphore of the newest block free, and a place for its queries.
        newest = jnp.int32(ring - 1)
        begun = copies.uncopied(newest, places[-1])
        count, beyond = copies.copy_rest(newest, walk.pieces, walk.buffer(newest), begun)
        places, copied = [*places, beyond], [*copied, count]

        def body(j, state):
            places, copied, stores, whole = state  # places from block j on, copies from j + 1 on
            now, after, following, *_ = places
            copies.wait_block(j + 1, copied[0], walk.buffer(j + 1))
            wholes = whole, walk.whole(after)
            pl.when(~wholes[1])(lambda: copies.clear_ends(j + 1, after, following, 0))

            def both(mixed, scored):
                # Weights come first: they leave the buffer of scores, and no half waits for the
                # other.
                weighed = compute.weigh(j, now, mixed)
                compute.score(j + 1, after, scored)
                compute.mix(j, weighed, results=not mixed)
                # Copies into the buffer that is free now come last, since the scheduler keeps the
                # order of accesses to memory.
                return copies.copy_some(j + ring, places[-1])

            begun = _either(wholes[0], lambda w: _either(wholes[1], functools.partial(both, w)))
            if walk.pieces > MOST_ROWS:
                begun = copies.copy_rest(j + ring, walk.pieces, walk.buffer(j + ring), begun)
            count, beyond, *_ = begun
            places, copied = [*places[1:], beyond], [*copied[1:], count]
            self.wait_stored(stores)
            return places, copied, self.finish(j, now, after, wholes[0]), wholes[1]

        state = (places, copied, zero, whole)
        (now, after, *_), _, stores, whole = lax.fori_loop(0, last, body, state)
        _either(whole, lambda w: compute.mix(last, compute.weigh(last, now, w), results=True))
        self.wait_stored(stores)
        stores = self.finish(last, now, after, whole, results=True)
        if self.plan.cores > 1:
            goes_on = (after.piece > 0) & (after.row < walk.batch)
            pl.when(goes_on)(lambda: self.store_part(self.last))
        self.wait_stored(stores)

    def store(self, step, row, number):
        """Starts the copies of a row's result; stores it if it is only a part of the row's."""

        def go():
            for name in ("out", "lse"):
                source = self.vmem[name].at[step & 1, number]
                target = self.hbm[name].at[row]
                pltpu.make_async_copy(source, target, self.vmem["stored"]).start()

        if self.plan.cores == 1:
            go()
        else:
            lax.cond(row < self.walk.own, lambda: self.store_part(number), go)

    def store_part(self, number):
        """Stores this core's part of a row that two cores share."""
        parts = zip(("part", "part_lse"), self.compute.normalized(number), strict=True)
        for name, value in parts:
            self.vmem[name][...] = value
            pltpu.sync_copy(self.vmem[name], self.hbm[name].at[self.walk.core])

    def finish(self, step, start, following, whole, results=False):
        """Stores the results of the rows that end in a block; returns how many copies that takes.

        The results of a block that is not whole are in VMEM already; those of a whole block are
        only where `results` says so.
        """
        walk = self.walk
        ends = jnp.minimum(following.row, walk.batch)

        @pl.when(whole & (following.row > start.row))
        def _():
            if not results:
                self.compute.result(step, self.last)
            self.store(step, start.row, self.last)

        def each(row, number):
            number += walk.left(Place(row, jnp.where(row == start.row, start.piece, 0)))
            self.store(step, row, number - 1)
            return number

        @pl.when(~whole)
        def _():
            lax.fori_loop(start.row, ends, each, jnp.int32(0))

        return ends - (start.row if self.plan.cores == 1 else jnp.maximum(start.row, walk.own))

    def wait_stored(self, copies):
        @pl.when(copies > 0)
        def _():
            for name in ("out", "lse"):
                stored = self.vmem[name].at[0, pl.ds(0, copies)]
                pltpu.make_async_copy(stored, stored, self.vmem["stored"]).wait()


def _either(flag, do):
    """do(True) or do(False), as a flag says at run time."""
    return lax.cond(flag, lambda: do(True), lambda: do(False))


def shaped(operands):
    """jax.ShapeDtypeStruct for results that vary over the mesh axes that some operand does."""
    manual: Any = [getattr(jax.typeof(x), "manual_axis_type", None) for x in operands]
    manual = [m for m in manual if m is not None]
    if not manual:
        return jax.ShapeDtypeStruct
    axes = frozenset().union(*(m.varying for m in manual))
    return functools.partial(jax.ShapeDtypeStruct, manual_axis_type=type(manual[0])(varying=axes))
