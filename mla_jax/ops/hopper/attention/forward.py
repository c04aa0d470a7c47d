"""The forward kernel: attention of 128 queries of one head over the blocks of slots they see.

Each of two warpgroups has 64 queries. It starts the scores of a block, then the product of the
weights and values of the block before, and makes the softmax of the new scores while that product
runs; and the two take turns to start, so that one's softmax also runs beside the other's products
(FlashAttention-3, arXiv 2407.08608). Scores are sums over the parts of a key, q_nope k_nope^T +
q_rope k_rope^T, which are never joined in memory; k_rope is read as it is, shared by all heads.

Letters: B batch, T query tokens, S slots, N heads, V value channels.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper import mosaic
from mla_jax.ops.hopper.attention.plan import ROWS, TILE, Plan, padded
from mla_jax.ops.hopper.attention.tiles import (
    SHARED_MEMORY,
    Ring,
    Shape,
    Walk,
    columns,
    filled,
    in_flight,
    interpreted_scratch,
    launch,
    rows_stored,
    scores,
    tiles,
    vectors,
)
from mla_jax.ops.hopper.merge import LOG2E, LOWEST, like

_STAGES = 2  # blocks in flight
_SPARE = 4096  # bytes for barriers, ids and alignment
_TURNS = 4  # the first of two named barriers


def block_slots(key: int, value: int) -> int:
    """Slots of a block: the most whose tiles fit shared memory and whose scores fit registers."""
    for size in (128, 64):  # whole swizzled tiles of values
        memory = 2 * (TILE * key + _STAGES * size * (key + value)) + _SPARE
        if memory <= SHARED_MEMORY and value + 3 * size // 2 <= 352:
            return size
    raise ValueError(f"no block fits keys of {key} and values of {value} channels")


def forward(operands, plan: Plan, shape: Shape, interpret=None):
    """Runs the kernel.

    Args:
        operands: q0, q1 [B T N width], k0, k1 [B S N width] or [B S width], v [B S N V].
        plan: of this call.
        shape: of this call.
        interpret: parameters of the interpreter, or None.

    Returns:
        out [B T N V] and lse [B N padded(T)] float32.
    """
    size = block_slots(shape.key, shape.value)
    scratch = Ring.scratch("q", tiles(ROWS, shape.parts, shape.dtype), 2, 1)
    keys = tiles(size, shape.parts, shape.dtype) + vectors(shape.segments, size)
    scratch |= Ring.scratch("k", keys, _STAGES, 2)
    scratch |= Ring.scratch("v", tiles(size, [shape.value], shape.dtype), _STAGES, 2)
    scratch |= interpreted_scratch(shape, [shape.value], [size])
    if not shape.native:
        scratch["turns"] = plgpu.Barrier(num_barriers=2)
    rows = shape.batch * rows_stored(shape.tokens, shape.native)
    outputs = {
        "out": like(operands["v"], (rows, shape.heads * shape.value), shape.dtype),
        "lse": like(
            operands["v"], (shape.batch * shape.heads * padded(shape.tokens),), jnp.float32
        ),
    }
    inputs = operands | {"bounds": plan.bounds, "ids": plan.ids, "ranges": plan.forward}
    out, lse = launch(_Forward, "mla_attention", shape, inputs, outputs, scratch, interpret)
    out = out.reshape(shape.batch, -1, shape.heads, shape.value)[:, : shape.tokens]
    return out, lse.reshape(shape.batch, shape.heads, -1)


class _Forward(Walk):
    heavy_last = True  # causal: the last queries see most

    def __init__(self, refs, smem, shape):
        super().__init__(refs, smem, shape)
        self.size = block_slots(shape.key, shape.value)
        self.q, self.k, self.v = (Ring(x, smem, 2 if x == "q" else _STAGES) for x in "qkv")

    @staticmethod
    def count(shape):
        return -(-shape.tokens // TILE)

    def produce(self):
        self.produce_blocks([f"q{i}" for i in range(len(self.shape.parts))])

    def consume(self, wg):
        def walk(acc):
            pl.when(wg == 1)(lambda: self.pass_turn(wg))
            self.each_item(lambda *item: self.item(wg, acc, *item), jnp.int32(0))
            pl.when(wg == 0)(lambda: self.take_turn(wg))

        self.accumulators(wg, [self.shape.value], walk)

    def item(self, wg, acc, k, place, ranges, done):
        """One tile: 64 queries of a head for this warpgroup; returns the blocks done."""
        shape = self.shape
        (row, head, tile), (first, opened, close, last, live) = place, ranges
        at = tile * TILE + wg * ROWS
        rows = self.row_bounds(row, at)
        q = self.q.wait(2 * k + wg)
        self.clear(acc)

        def used(j):
            """Frees the queries after their last scores: the next copies wait for it."""

            @pl.when(j + 1 == last)
            def _():
                self.q.release(2 * k + wg)

        def step(masked):
            def body(j, carry):
                m, total, p = carry
                index = done + j - first
                v = self.values(index - 1, j - 1, live)
                self.take_turn(wg)

                def products(s):
                    keys = self.k.wait(index)
                    scores(s, q, keys)
                    self.multiply(acc, p, v, wg)
                    self.pass_turn(wg)
                    return self.seen(in_flight(s, wait_n=1), keys, rows, j, masked)

                s = self.fresh(products)
                self.k.release(index)
                used(j)
                m, alpha, total, p = self.softmax(s, m, total)
                self.retire(0)
                self.v.release(index - 1)
                # The weights must not be in the registers that the product still read, nor move
                # there behind the start of the next: the compiler would run products one by one.
                p = lax.optimization_barrier(p)
                self.rescale(acc, alpha)
                return m, total, lax.optimization_barrier(p.astype(shape.dtype))

            return body

        def blocks():
            def products(s):
                keys = self.k.wait(done)
                scores(s, q, keys)
                return self.seen(in_flight(s, wait_n=0), keys, rows, first, True)

            s = self.fresh(products)
            self.k.release(done)
            used(first)
            m, _, total, p = self.softmax(s, filled(LOWEST), columns(filled(0.0), 8))
            carry = m, total, p.astype(shape.dtype)
            carry = lax.fori_loop(first + 1, opened, step(True), carry)
            carry = lax.fori_loop(jnp.maximum(opened, first + 1), close, step(False), carry)
            carry = lax.fori_loop(jnp.maximum(close, first + 1), last, step(True), carry)
            m, total, p = carry
            index = done + last - first - 1
            self.multiply(acc, p, self.values(index, last - 1, live), wg)
            self.retire(0)
            self.v.release(index)
            return m, total

        def nothing():
            self.q.release(2 * k + wg)
            return filled(LOWEST), columns(filled(0.0), 8)

        m, total = lax.cond(last > first, blocks, nothing)
        total = total.sum(axis=1)
        some = total != 0  # NaN is a sum of weights, too
        safe = jnp.where(some, total, 1.0)
        value = acc[...] * columns(jnp.where(some, 1.0 / safe, 0.0), shape.value)
        lse = jnp.where(some, (m + jnp.log2(safe)) * (1.0 / LOG2E), -jnp.inf)
        stored = rows_stored(shape.tokens, shape.native)
        count = jnp.minimum(shape.tokens - at, ROWS)
        column = head * shape.value
        self.store(self.refs["out"], value.astype(shape.dtype), row * stored + at, column, count)
        of_head = (row * shape.heads + head) * padded(shape.tokens)
        self.store_values(self.refs["lse"], lse, of_head + at)
        return done + last - first

    def fresh(self, products):
        return pl.run_scoped(products, plgpu.ACC((ROWS, self.size), jnp.float32))

    def values(self, index, j, live):
        [v] = self.v.wait(index)
        self.keep_slots([v], j * self.size, live)
        return v

    def seen(self, s, keys, rows, j, masked):
        """Scores, -inf where a query may not look."""
        if not masked:
            return s
        ids = keys[-1] if self.shape.segments else None
        return jnp.where(self.visible(rows, j * self.size, ids, self.size), s, -jnp.inf)

    def softmax(self, s, m, total):
        """New maximum and rescaling of the rows, sums so far, and weights."""
        new = jnp.maximum(m, s.max(axis=1) * self.scale2)
        alpha = jnp.exp2(m - new)
        p = jnp.exp2(s * self.scale2 - columns(new, self.size))
        return new, alpha, total * columns(alpha, 8) + self.partial_sums(p), p

    # -- turns at the tensor core; interpreted, by barriers that catch who would wait for ever

    def take_turn(self, wg):
        """Waits until the other warpgroup has started its products."""
        if self.native:
            sync = lambda i: lambda: mosaic.named_barrier("sync", _TURNS + i)  # noqa: E731
            lax.cond(wg == 0, sync(0), sync(1))
        else:
            plgpu.barrier_wait(self.smem["turns"].at[wg])

    def pass_turn(self, wg):
        if self.native:
            arrive = lambda i: lambda: mosaic.named_barrier("arrive", _TURNS + i)  # noqa: E731
            lax.cond(wg == 0, arrive(1), arrive(0))
        else:
            plgpu.barrier_arrive(self.smem["turns"].at[1 - wg])
