"""The backward kernels: one for the gradient of queries, one for those of keys and values.

With P = exp(S - lse), dP = dO V^T and dS = P (dP - delta), where delta is the sum of dO O over a
row less the gradient of its lse:

    dQ = scale dS K        dK = scale dS^T Q        dV = P^T dO

The first kernel holds queries and walks over slots, as the forward kernel does; the second holds
slots and walks over queries, with S^T and dP^T in place of S and dP. Each sum has one owner and one
order, so that results repeat bit for bit, which one kernel with atomic additions would not give;
S and dP are computed twice for it. The gradient of the shared rotary key is written per head and
summed over heads afterwards, again in one order.

Letters: B batch, T query tokens, S slots, N heads, H and P key parts, V value channels.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper import mosaic
from mla_jax.ops.hopper.attention.forward import block_slots
from mla_jax.ops.hopper.attention.forward import forward as forward
from mla_jax.ops.hopper.attention.plan import ROWS, TILE, Plan, Sizes
from mla_jax.ops.hopper.attention.tiles import (
    COLUMN,
    ROW,
    SHARED_MEMORY,
    WG,
    Ring,
    Shape,
    Walk,
    across,
    columns,
    in_flight,
    interpreted_scratch,
    launch,
    load,
    rows_stored,
    scores,
    tiles,
    vectors,
)
from mla_jax.ops.hopper.merge import like

_STATISTICS = ("lse", "delta")
_AHEAD = 1  # blocks of queries copied ahead of their use
_SPARE = 4096  # bytes for barriers, ids and alignment
# Channels of dK and dV that 64 rows of slots can have in one warpgroup's registers; beyond, one
# warpgroup takes dV, the other dK, of the same slots.
_TOGETHER = 320


def sizes(shape: Shape) -> Sizes:
    """Of the blocks and tiles of all three kernels."""
    rows = TILE if _together(shape) else ROWS
    return Sizes(block_slots(shape.key, shape.value), _query_block(shape)[0], rows)


def _together(shape):
    return shape.key + shape.value <= _TOGETHER


def _query_block(shape):
    """Slots of a block, and how many blocks of keys and of values are in flight, for dQ."""
    for size, keys, values in ((64, 3, 3), (64, 2, 2), (64, 2, 1), (64, 1, 1)):
        held = TILE * (shape.key + shape.value)
        memory = 2 * (held + size * (keys * shape.key + values * shape.value)) + _SPARE // 2
        if memory <= SHARED_MEMORY:
            return size, keys, values
    raise ValueError(f"no block fits keys of {shape.key} and values of {shape.value} channels")


def _key_stages(shape):
    """How many blocks of queries are in flight, for dK and dV."""
    rows = TILE if _together(shape) else ROWS
    each = 2 * ROWS * (shape.key + shape.value) + 3 * 1024
    held = 2 * rows * (shape.key + shape.value)
    return min(3, (SHARED_MEMORY - _SPARE - held) // each)


def query_gradient(operands, plan: Plan, shape: Shape, interpret=None):
    """dQ, part by part [B T N width].

    Args:
        operands: those of the forward kernel, and do [B T N V]; lse (base 2) and delta [B N
            padded(T)].
        plan, shape, interpret: as in the forward kernel.
    """
    size, keys, values = _query_block(shape)
    scratch = Ring.scratch("q", tiles(ROWS, (*shape.parts, shape.value), shape.dtype), 2, 1)
    blocks = tiles(size, shape.parts, shape.dtype) + vectors(shape.segments, size)
    scratch |= Ring.scratch("k", blocks, keys, 2)
    scratch |= Ring.scratch("v", tiles(size, [shape.value], shape.dtype), values, 2)
    scratch |= interpreted_scratch(shape, shape.parts, [size])
    rows = shape.batch * rows_stored(shape.tokens, shape.native)
    outputs = {
        f"dq{i}": like(operands["v"], (rows, shape.heads * w), shape.dtype)
        for i, w in enumerate(shape.parts)
    }
    inputs = operands | {"bounds": plan.bounds, "ids": plan.ids, "ranges": plan.queries}
    results = launch(_Queries, "mla_attention_dq", shape, inputs, outputs, scratch, interpret)
    return [
        x.reshape(shape.batch, -1, shape.heads, w)[:, : shape.tokens]
        for x, w in zip(results, shape.parts, strict=True)
    ]


def key_gradient(operands, plan: Plan, shape: Shape, interpret=None):
    """dK, part by part, each per head [B S N width], and dV [B S N V]; see `query_gradient`."""
    stages, widths = _key_stages(shape), (*shape.parts, shape.value)
    held, consumers = (2, 1) if _together(shape) else (1, 2)
    scratch = Ring.scratch("k", tiles(ROWS, widths, shape.dtype), held, consumers)
    bounds = plan.bounds.shape[1]
    queries = tiles(ROWS, shape.parts, shape.dtype) + vectors(1, ROWS, jnp.float32)
    queries.append(lambda stages: plgpu.SMEM((stages, bounds, ROWS), jnp.int32))
    scratch |= Ring.scratch("q", queries, stages, 2)
    outs = tiles(ROWS, [shape.value], shape.dtype) + vectors(1, ROWS, jnp.float32)
    scratch |= Ring.scratch("o", outs, stages, 2)
    scratch |= interpreted_scratch(shape, widths, [ROWS])
    rows = shape.batch * rows_stored(shape.slots, shape.native)
    outputs = {
        f"d{i}": like(operands["v"], (rows, shape.heads * w), shape.dtype)
        for i, w in enumerate(widths)
    }
    inputs = operands | {
        "bounds": plan.bounds,
        "ids": plan.ids,
        "ranges": plan.keys,
        "dead": plan.dead,
    }
    results = launch(_Keys, "mla_attention_dkv", shape, inputs, outputs, scratch, interpret)
    *dk, dv = (
        x.reshape(shape.batch, -1, shape.heads, w)[:, : shape.slots]
        for x, w in zip(results, widths, strict=True)
    )
    return dk, dv


class _Backward(Walk):
    def anew(self, ring, index):
        """Tiles of a ring, for one step: the compiler would keep every address in a register."""
        slot = ring.slot(index) + (mosaic.opaque(0) if self.native else 0)
        return [buffer.at[slot] for buffer in ring.buffers]


class _Queries(_Backward):
    """dQ of 128 queries of one head, over the blocks of slots they see."""

    heavy_last = True  # causal: the last queries see most

    def __init__(self, refs, smem, shape):
        super().__init__(refs, smem, shape)
        self.size, keys, values = _query_block(shape)
        self.q, self.k, self.v = Ring("q", smem, 2), Ring("k", smem, keys), Ring("v", smem, values)

    @staticmethod
    def count(shape):
        return -(-shape.tokens // TILE)

    def produce(self):
        self.produce_blocks([*(f"q{i}" for i in range(len(self.shape.parts))), "do"])

    def consume(self, wg):
        def walk(*dq):
            self.each_item(lambda *item: self.item(wg, dq, *item), jnp.int32(0))

        self.accumulators(wg, self.shape.parts, walk)

    def item(self, wg, dq, k, place, ranges, done):
        """One tile: 64 queries of a head for this warpgroup; returns the blocks done."""
        shape, size = self.shape, self.size
        (row, head, tile), (first, opened, close, last, live) = place, ranges
        at = tile * TILE + wg * ROWS
        rows = self.row_bounds(row, at)
        lse, delta = (load(self.refs[x].at[row, head, pl.ds(at, ROWS)], ROW) for x in _STATISTICS)
        self.q.wait(2 * k + wg)
        for acc in dq:
            self.clear(acc)

        def step(masked):
            def body(j, _):
                index = done + j - first
                keys = self.k.wait(index)
                *q, do = self.anew(self.q, 2 * k + wg)

                def products(s, dp):
                    scores(s, q, keys)
                    scores(dp, [do], self.v.wait(index))
                    p = jnp.exp2(in_flight(s, wait_n=1) * self.scale2 - columns(lse, size))
                    return p, in_flight(dp, wait_n=0)

                p, dp = pl.run_scoped(products, *[plgpu.ACC((ROWS, size), jnp.float32)] * 2)
                self.v.release(index)

                @pl.when(j + 1 == last)
                def _():
                    self.q.release(2 * k + wg)

                ds = p * (dp - columns(delta, size))
                if masked:
                    ids = keys[-1] if shape.segments else None
                    ds = jnp.where(self.visible(rows, j * size, ids, size), ds, 0.0)
                    self.keep_slots(keys[: len(dq)], j * size, live)
                ds = ds.astype(shape.dtype)
                for acc, part in zip(dq, keys, strict=False):
                    self.multiply(acc, ds, part, wg)
                self.retire(0)
                self.k.release(index)

            return body

        lax.fori_loop(first, opened, step(True), None)
        lax.fori_loop(opened, close, step(False), None)
        lax.fori_loop(close, last, step(True), None)

        @pl.when(first == last)
        def _():
            self.q.release(2 * k + wg)

        stored = rows_stored(shape.tokens, shape.native)
        count = jnp.minimum(shape.tokens - at, ROWS)
        for i, (acc, width) in enumerate(zip(dq, shape.parts, strict=True)):
            value = (acc[...] * shape.scale).astype(shape.dtype)
            self.store(self.refs[f"dq{i}"], value, row * stored + at, head * width, count)
        return done + last - first


class _Keys(_Backward):
    """dK and dV of the slots of one head, over the blocks of queries that see them."""

    heavy_last = False  # causal: the first slots are seen most
    copies = False  # dK, dV, S and dP take all registers of two warpgroups: no third one copies

    def __init__(self, refs, smem, shape):
        super().__init__(refs, smem, shape)
        self.together = _together(shape)
        self.rows = TILE if self.together else ROWS
        self.k = Ring("k", smem, 2 if self.together else 1)
        self.q, self.o = (Ring(name, smem, _key_stages(shape)) for name in "qo")

    @staticmethod
    def count(shape):
        return -(-shape.slots // (TILE if _together(shape) else ROWS))

    def consume(self, wg):
        count = len(self.shape.parts)
        widths = (*self.shape.parts, self.shape.value)

        def role(first, last):
            def walk(*accs):
                dk, dv = accs[: count - first], accs[count - first :]
                done = self.each_item(lambda *item: self.item(wg, dk, dv, *item), jnp.int32(0))

                @pl.when(wg == 0)
                def _():
                    self.q.drain(done)
                    self.o.drain(done)

            return lambda: self.accumulators(wg, widths[first:last], walk, first)

        if self.together:
            role(0, count + 1)()
        else:
            lax.cond(wg == 0, role(count, count + 1), role(0, count))

    def hold(self, wg, index, row, head, at):
        """Starts the copies of the keys and values of a tile, of one or of both warpgroups."""

        def fill():
            keys = self.keys(row, head, at, ROWS)
            self.k.fill(index, keys + self.of_head(["v"], row, head, at, ROWS))

        fill() if self.together else pl.when(wg == 0)(fill)

    def fill(self, row, head, j, index):
        """Starts the copies of a block of queries."""
        names, start = [f"q{i}" for i in range(len(self.shape.parts))], j * ROWS
        lse, delta = (self.refs[x].at[row, head, pl.ds(start, ROWS)] for x in _STATISTICS)
        bounds = self.refs["bounds"]
        bounds = bounds.at[row if bounds.shape[0] > 1 else 0, :, pl.ds(start, ROWS)]
        self.q.fill(index, [*self.of_head(names, row, head, start, ROWS), lse, bounds])
        self.o.fill(index, [*self.of_head(["do"], row, head, start, ROWS), delta])

    def item(self, wg, dk, dv, k, place, ranges, done):
        """One tile of slots; `dk` or `dv` is empty where the other warpgroup has it."""
        shape = self.shape
        (row, head, tile), (first, opened, close, last, _) = place, ranges
        at = tile * self.rows + (wg * ROWS if self.together else 0)
        held = 2 * k + wg if self.together else k
        self.hold(wg, held, row, head, at)
        ids = load(self.refs["ids"].at[row, pl.ds(at, ROWS)], ROW) if shape.segments else None

        def ahead(j):
            @pl.when((wg == 0) & (j < last))
            def _():
                self.fill(row, head, j, done + j - first)

        for j in range(_AHEAD):
            ahead(first + j)
        self.k.wait(held)
        for acc in (*dk, *dv):
            self.clear(acc)

        def step(masked):
            def body(j, _):
                *key, value = self.anew(self.k, held)
                at_block = row, j, at, ids, done + j - first
                self.step(wg, dk, dv, key, value, *at_block, masked, lambda: ahead(j + _AHEAD))

            return body

        lax.fori_loop(first, opened, step(True), None)
        lax.fori_loop(opened, close, step(False), None)
        lax.fori_loop(close, last, step(True), None)
        self.k.release(held)
        stored = rows_stored(shape.slots, shape.native)
        count = jnp.minimum(shape.slots - at, ROWS)
        results = [(i, acc, shape.scale) for i, acc in enumerate(dk)]
        results += [(len(shape.parts), acc, 1.0) for acc in dv]
        for i, acc, factor in results:
            width = acc.shape[1]
            gradient = (acc[...] * factor).astype(shape.dtype)
            self.store(self.refs[f"d{i}"], gradient, row * stored + at, head * width, count)
        return done + last - first

    def step(self, wg, dk, dv, key, value, row, j, at, ids, index, masked, more):
        """One block of queries; `more` starts the copies of a later one."""
        dtype, block = self.shape.dtype, (ROWS, ROWS)
        *q, lse, bounds = self.q.wait(index)
        do, delta = self.o.wait(index)

        def products(s, dp=None):
            scores(s, key, q)
            if dp is not None:
                scores(dp, [value], [do])
            more()
            s = in_flight(s, wait_n=0 if dp is None else 1)
            p = jnp.exp2(s * self.scale2 - across(load(lse, COLUMN)))
            return (p,) if dp is None else (p, in_flight(dp, wait_n=0))

        accs = [plgpu.ACC(block, jnp.float32)] * (2 if dk else 1)
        p, *dp = pl.run_scoped(products, *accs)
        seen = ds = None
        if masked:
            seen = self.seen(bounds, ids, at)
            p = jnp.where(seen, p, 0.0)
            self.keep_queries([*q, do], bounds, row, j)
        if dk:
            ds = p * (dp[0] - across(load(delta, COLUMN)))
            if seen is not None:
                ds = jnp.where(seen, ds, 0.0)  # dP of a query that sees nothing may be NaN
            ds = ds.astype(dtype)
        for acc in dv:
            self.multiply(acc, p.astype(dtype), do, wg)
        for acc, part in zip(dk, q, strict=False):
            self.multiply(acc, ds, part, wg)
        self.retire(0)
        self.q.release(index)
        self.o.release(index)

    def seen(self, bounds, ids, at):
        """Bool [64, 64]: which of the slots from `at` on, by row, the queries of a block see."""
        slot = plgpu.broadcasted_iota(jnp.int32, (ROWS, ROWS), 0, layout=WG) + at
        limit = lambda i: across(load(bounds.at[i], COLUMN))  # noqa: E731
        seen = (slot >= limit(0)) & (slot < limit(1))
        return seen if ids is None else seen & (columns(ids, ROWS) == limit(2))

    def keep_queries(self, refs, bounds, row, j):
        """Zeros the queries of a block that see nothing."""
        dead = self.refs["dead"]

        @pl.when(dead[row if dead.shape[0] > 1 else 0, j] > 0)
        def _():
            start, end = (load(bounds.at[i], ROW) for i in range(2))
            self.keep_rows(refs, lambda offset: start < end)
