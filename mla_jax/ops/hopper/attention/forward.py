"""The forward kernel: attention of 128 queries of one head over the blocks of slots they see.

Each of two warpgroups has 64 queries. While one makes its softmax, the other keeps the tensor core
busy: they take turns at it. Scores are sums over the parts of a key, [q_nope q_rope] [k_nope
k_rope]^T, which are never joined in memory; k_rope is read as it is, shared by all heads.

Letters: B batch, T query tokens, S slots, N heads, V value channels.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper import mosaic
from mla_jax.ops.hopper.attention.plan import ROWS, TILE, Plan, padded
from mla_jax.ops.hopper.attention.tiles import (
    SHARED_MEMORY, Ring, Shape, Walk, columns, filled, interpreted_scratch, launch, rows_stored,
    scores, tiled,
)  # fmt: skip
from mla_jax.ops.hopper.merge import LOG2E, LOWEST, like

STAGES = 2


def block_slots(key: int, value: int) -> int:
    """Slots of a block: the most whose tiles fit shared memory and whose scores fit registers."""
    for size in (128, 64):  # whole swizzled tiles of values
        memory = 2 * (TILE * key + STAGES * size * (key + value)) + 2048
        if memory <= SHARED_MEMORY and value + 3 * size // 2 <= 400:
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
        out [B, rows, N V] and lse [B N padded(T)] float32.
    """
    size = block_slots(shape.key, shape.value)
    tile = lambda rows, width: lambda stages: tiled((stages, rows, width), shape.dtype)  # noqa: E731
    scratch = Ring.scratch("q", [tile(ROWS, w) for w in shape.parts], 2, 1)
    scratch |= Ring.scratch("k", [tile(size, w) for w in shape.parts], STAGES, 2)
    scratch |= Ring.scratch("v", [tile(size, shape.value)], STAGES, 2)
    scratch |= interpreted_scratch(shape, [shape.value], [size])
    rows = shape.batch * rows_stored(shape.tokens, shape.native)
    outputs = {
        "out": like(operands["v"], (rows, shape.heads * shape.value), shape.dtype),
        "lse": like(operands["v"], (shape.batch * shape.heads * padded(shape.tokens),), jnp.float32),
    }
    inputs = operands | {"bounds": plan.bounds, "ids": plan.ids, "ranges": plan.forward}
    out, lse = launch(_Forward, "mla_attention", shape, inputs, outputs, scratch, interpret)
    out = out.reshape(shape.batch, -1, shape.heads, shape.value)[:, : shape.tokens]
    return out, lse.reshape(shape.batch, shape.heads, -1)


class _Forward(Walk):
    heavy_last = True  # causal: the last queries see most

    def __init__(self, refs, smem, shape):
        super().__init__(refs, smem, shape)
        self.tiles = self.count(shape)
        self.size = block_slots(shape.key, shape.value)
        self.q, self.k, self.v = (Ring(x, smem, 2 if x == "q" else STAGES) for x in "qkv")

    @staticmethod
    def count(shape):
        return -(-shape.tokens // TILE)

    def produce(self):
        names = [f"q{i}" for i in range(len(self.shape.parts))]

        def one(k, row, head, tile, done):
            first, _, _, last, _ = self.range(row, tile)
            for wg in range(2):
                at = tile * TILE + wg * ROWS
                self.q.fill(2 * k + wg, self.of_head(names, row, head, at, ROWS))

            def block(j, done):
                start = j * self.size
                self.k.fill(done, self.keys(row, head, start, self.size))
                self.v.fill(done, self.of_head(["v"], row, head, start, self.size))
                return done + 1

            return k + 1, lax.fori_loop(first, last, block, done)

        items, done = self.each_item(
            lambda k, row, head, tile, carry: one(k, row, head, tile, carry[1]),
            (jnp.int32(0), jnp.int32(0)),
        )
        self.q.drain(2 * items)
        self.k.drain(done)
        self.v.drain(done)

    def consume(self, wg):
        def walk(acc):
            pl.when(wg == 1)(self.take_turns)
            self.each_item(
                lambda *item: self.item(wg, acc, *item), jnp.int32(0)
            )
            pl.when(wg == 0)(self.take_turns)

        self.accumulators(wg, [self.shape.value], walk)

    def item(self, wg, acc, k, row, head, tile, done):
        """One tile: 64 queries of a head for this warpgroup."""
        shape = self.shape
        first, opened, close, last, live = self.range(row, tile)
        at = tile * TILE + wg * ROWS
        q = self.q.wait(2 * k + wg)
        self.clear(acc)

        def step(masked):
            return lambda j, carry: self.step(
                wg, acc, q, row, at, done + j - first, j, live, masked, *carry
            )

        carry = filled(LOWEST), columns(filled(0.0), 8)
        carry = lax.fori_loop(first, opened, step(True), carry)
        carry = lax.fori_loop(opened, close, step(False), carry)
        m, total = lax.fori_loop(close, last, step(True), carry)
        self.q.release(2 * k + wg)
        total = total.sum(axis=1)
        some = total > 0
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

    def step(self, wg, acc, q, row, at, index, j, live, masked, m, total):
        """One block of slots: scores, softmax, values."""
        size = self.size
        k = self.k.wait(index)

        def product(s):
            scores(s, q, k)
            self.take_turns()
            return s[...]

        s = pl.run_scoped(product, plgpu.ACC((ROWS, size), jnp.float32))
        self.k.release(index)
        if masked:
            s = jnp.where(self.visible(row, at, j * size, True, size), s, -jnp.inf)
        new = jnp.maximum(m, s.max(axis=1) * self.scale2)
        alpha = jnp.exp2(m - new)
        p = jnp.exp2(s * self.scale2 - columns(new, size))
        total = total * columns(alpha, 8) + self.partial_sums(p)
        p = p.astype(self.shape.dtype)
        [v] = self.v.wait(index)
        if masked:
            self.keep_slots([v], j * size, live)
        self.take_turns()
        self.rescale(acc, alpha)
        self.multiply(acc, p, v, wg)
        self.retire(0)
        self.v.release(index)
        return new, total

    def take_turns(self):
        """Meets the other warpgroup, half a step apart: one multiplies, one makes its softmax."""
        if self.native:
            mosaic.named_barrier("sync", 4)
