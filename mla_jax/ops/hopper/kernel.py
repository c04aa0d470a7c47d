"""The decode kernel: one thread block walks its part of the batch for one tile of query rows.

A 64-row tile of queries meets a 64-slot block of latents, which are keys and values at once, with
two matrix products, S = [pattern q_rope] [latent k_rope]^T and O += softmax(S) latent. The float32
tile of O, 64 x R, fills half the registers of a multiprocessor, so two warpgroups share it by
columns, and each makes the scores and the softmax of every other block: while one is in its
softmax, the other keeps the tensor core busy (the "seesaw" of DeepSeek's FlashMLA, 2025):

    warpgroup 0                                   warpgroup 1
    p0 = softmax(block 0), its maximum ---------> p1 = softmax(block 1), with both maxima
    left += p0 V0                                 right += p1 V1
    p0 scaled to the joint maximum, shared -----> right += p0 V0
    left += p1 V1 (p1 shared by 1)                block 1's scores of the next step
    block 0's scores of the next step

Loads of the next step, of the same batch row or the next, start as soon as a buffer is read for the
last time. Rows that several parts share are merged at the end by these same parts.

Letters: B batch, T query tokens, N heads, S cache slots, R latent width, P rope width.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper import mosaic
from mla_jax.ops.hopper.merge import LOG2E, LOWEST, like, merge, merge_interpreted, piece
from mla_jax.ops.hopper.schedule import BLOCK, STEP, TILE

_WG = plgpu.Layout.WGMMA
_ROW = plgpu.Layout.WGMMA.reduce(1)
_FLAGS = ("max0", "max1", "p0", "issued")  # what one warpgroup tells the other


class Shape(NamedTuple):
    """What one kernel is compiled for; `rows` is T N padded to what copies and stores need."""

    tokens: int
    heads: int
    slots: int
    rank: int
    rope: int
    rows: int
    tiles: int
    parts: int
    scale: float
    dtype: Any
    native: bool


def decode(operands, schedule, shape: Shape, batch: int, interpret=None):
    """Runs the kernel on flat operands: pattern [B rows, R], q_rope, latent [B S, R], k_rope.

    The rope operands are left out where P = 0. Returns out [B rows, R] and lse [B rows].
    """
    width, half, dtype = shape.rank, shape.rank // 2, shape.dtype
    f32 = jnp.float32
    smem = {
        "k": _tiled((4, BLOCK, half), dtype),
        "q": _tiled((2, TILE, half), dtype),
        "p": _tiled((2, TILE, BLOCK), dtype),
        # Maximum, rescaling and sum of each warpgroup; one array, as each would take 1 KiB.
        "stat": plgpu.SMEM((6, TILE), f32),
        "k_bar": plgpu.Barrier(num_barriers=4),
        "q_bar": plgpu.Barrier(num_arrivals=2),
    }
    if shape.rope:
        smem |= {
            "kr": _tiled((2, BLOCK, shape.rope), dtype),
            "kr_bar": plgpu.Barrier(num_barriers=2),
        }
    if not shape.native:
        smem |= {
            "o_acc": plgpu.SMEM((2, TILE, half), f32),
            "s_acc": plgpu.SMEM((2, TILE, BLOCK), f32),
            "flags": plgpu.Barrier(num_barriers=4),
            "meet": plgpu.Barrier(num_barriers=4),
            "park_p0": _tiled((TILE, BLOCK), dtype),
            "park_p1": _tiled((TILE, BLOCK), dtype),
        }
        if shape.rope:
            smem["park_qr"] = _tiled((2, TILE, shape.rope), dtype)
    pieces = 2 * shape.parts * shape.tiles * TILE  # a part shares its first and last row at most
    outputs = [(batch * shape.rows, width), (batch * shape.rows,), (pieces, width), (pieces,)]
    dtypes = (dtype, f32, f32, f32)
    common = {
        "grid": (shape.parts, shape.tiles),
        "grid_names": ("part", "tile"),
        "num_threads": 2,
        "thread_name": "wg",
        "interpret": interpret,
        "compiler_params": plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    }

    def body(*refs, **scratch):
        _Part(refs, scratch, shape).run()

    out, lse, part_out, part_lse = plgpu.kernel(
        body,
        out_type=[like(operands[0], s, d) for s, d in zip(outputs, dtypes, strict=True)],
        scratch_types=smem,
        kernel_name="mla_decode",
        **common,
    )(*operands, *schedule)
    if not shape.native:
        out, lse = merge_interpreted(out, lse, part_out, part_lse, schedule, shape, common)
    return out, lse


def source_slot(row, slot, length, slots, total):
    """Where a block of the cache starts in the flat [B S] cache; dead blocks lie past its end.

    A copy fills what is past the end with zeros and reads no memory for it. This is the one place
    that pages would change: page_table[row, slot // BLOCK] * BLOCK.
    """
    return jnp.where(slot < length, row * slots + slot, total)


def _tiled(shape, dtype):
    """Shared memory in the swizzled layout of matrix operands; last axis a multiple of 16."""
    columns = min(64, shape[-1])
    tiling, swizzle = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def _columns(row_values, width):
    """[64] to [64, width], free in registers."""
    return lax.broadcast_in_dim(row_values, (TILE, width), [0])


def _filled(value, dtype=jnp.float32):
    return plgpu.layout_cast(jnp.full((TILE,), value, dtype), _ROW)


def _row_vector(ref):
    return plgpu.load(ref, layout=_ROW, optimized=False)


class _Part:
    """One thread block: part `part` of the batch for tile `tile` of the query rows."""

    def __init__(self, refs, smem, shape: Shape):
        refs = list(refs)
        self.shape, self.smem, self.native = shape, smem, shape.native
        self.half, self.dtype = shape.rank // 2, shape.dtype
        self.q_hbm: Any = refs.pop(0)
        self.qr_hbm: Any = refs.pop(0) if shape.rope else None
        self.k_hbm: Any = refs.pop(0)
        self.kr_hbm: Any = refs.pop(0) if shape.rope else None
        self.lengths, self.row_step, self.row_parts, self.parts, self.arrivals, *refs = refs
        self.out, self.lse, self.part_out, self.part_lse = refs
        names = ("out", "lse", "part_out", "part_lse", "arrivals", "row_parts")
        self.merged = {name: getattr(self, name) for name in names} | {"part": self.parts}
        self.k, self.q, self.p, self.stat = (smem[name] for name in ("k", "q", "p", "stat"))
        self.part, self.tile = lax.axis_index("part"), lax.axis_index("tile")
        self.first_step, self.end_step = self.parts[self.part, 0], self.parts[self.part, 1]
        self.scale2 = shape.scale * LOG2E  # softmax in base 2

    def run(self):
        """Walks the part's steps, then merges its share of the rows it had with others."""

        @pl.when(self.end_step > self.first_step)
        def _():
            wg = lax.axis_index("wg")

            def role(me):
                accumulator = plgpu.ACC((TILE, self.half), jnp.float32)
                if self.native:
                    return lambda: pl.run_scoped(functools.partial(self.walk, me), accumulator)
                return lambda: self.walk(me, self.smem["o_acc"].at[me])

            lax.cond(wg == 0, role(0), role(1))
            if self.native:
                merge(self.part, self.tile, mosaic.warpgroup(), self.merged, self.shape)

    def walk(self, me, acc):
        """The steps of this part, row by row; `me` owns columns `me` of O, block `me` of steps."""
        # Under shard_map a loaded number varies over its axes and a computed one does not: the
        # loop over rows wants the latter.
        row, here, length, end_row = (self.parts[self.part, i] + 0 for i in (2, 3, 4, 5))
        slot = (self.first_step - here) * STEP
        if me == 1:
            self.fetch_q(row)  # first: every score waits for it
        self.fetch_rope(me, self.source(row, slot + me * BLOCK, length))
        for block in range(2):
            self.fetch(block, me, self.source(row, slot + block * BLOCK, length))
        qr = self.load_q_rope(row)
        plgpu.barrier_wait(self.smem["q_bar"])
        s = self.new_scores(me, lambda a: self.scores(a, qr, me, jnp.int32(0)))

        def one_row(row, carry):
            qr, s, length, here, there = carry
            next_row = jnp.minimum(row + 1, end_row)
            # Loaded a row ahead of their use.
            next_length, next_end = self.lengths[next_row] + 0, self.row_step[next_row + 1] + 0
            lo = jnp.maximum(here, self.first_step)
            hi = jnp.minimum(there, self.end_step)
            self.clear(acc, self.half)
            m = _filled(LOWEST)
            total = _columns(_filled(0.0), 8)

            def one_step(g, carry):
                qr, s, m, total = carry
                slot = (g - here) * STEP
                last = g + 1 == hi
                more = g + 1 < self.end_step
                then = jnp.where(last, next_row, row)
                then_slot = jnp.where(last, 0, slot + STEP)
                then_length = jnp.where(last, next_length, length)
                # After the last step the loads go on, from past the end: nothing is read, and
                # every barrier completes as often as it is awaited.
                then_length = jnp.where(more, then_length, 0)
                sources = [self.source(then, then_slot + b * BLOCK, then_length) for b in range(2)]
                o = mosaic.opaque(0) if self.native else jnp.int32(0)
                step = self.step0 if me == 0 else self.step1
                return step(acc, o, qr, s, m, total, slot, length, sources, last & more, then)

            qr, s, m, total = lax.fori_loop(lo, hi, one_step, (qr, s, m, total))
            began = here < self.first_step
            self.finish(me, acc, row, m, total, began, began | (there > self.end_step))
            return qr, s, next_length, there, next_end

        lax.fori_loop(row, end_row + 1, one_row, (qr, s, length, here, self.row_step[row + 1] + 0))

    def step0(self, acc, o, qr, s, m, total, slot, length, sources, new_q, row):
        """Block 0's softmax; left columns of the output."""
        s = self.mask(s, slot, length)
        m_new = jnp.maximum(m, s.max(axis=1) * self.scale2)
        alpha = jnp.exp2(m - m_new)
        self.stat[0] = m_new
        self.stat[2] = alpha
        self.arrive("max0")
        p = jnp.exp2(s * self.scale2 - _columns(m_new, BLOCK))
        self.rescale(acc, alpha)
        self.kill_dead_values(self.k.at[0], length - slot)
        self.mma(acc, p.astype(self.dtype), self.k.at[o], park="park_p0")
        total = total * _columns(alpha, 8) + self.partial_sums(p)  # behind the product's issue
        self.retire(0)
        self.wait("max1")
        self.fetch_rope(0, sources[0])
        self.fetch(0, 0, sources[0])
        alpha = _row_vector(self.stat.at[3])
        m = _row_vector(self.stat.at[1])
        self.p[0] = (p * _columns(alpha, BLOCK)).astype(self.dtype)
        self.fence()
        self.arrive("p0")
        self.kill_dead_values(self.k.at[2], length - slot - BLOCK)
        self.wait("issued")
        total = total * _columns(alpha, 8)
        self.rescale(acc, alpha)
        self.mma(acc, self.p.at[o + 1], self.k.at[o + 2])
        qr = self.renew_q(qr, new_q, row)

        def refill():
            self.retire(1 if self.shape.rope else 0)  # of the values, not of the scores behind
            self.warpgroup_sync()
            self.fetch(1, 0, sources[1])

        s = self.new_scores(0, lambda a: self.scores(a, qr, 0, o, refill))
        return qr, s, m, total

    def step1(self, acc, o, qr, s, m, total, slot, length, sources, new_q, row):
        """Block 1's softmax; right columns of the output."""
        del m
        s = self.mask(s, slot + BLOCK, length)
        biggest = s.max(axis=1) * self.scale2
        self.wait("max0")
        self.fetch_rope(1, sources[1])

        @pl.when(new_q)
        def _():  # both warpgroups have their scores: the query tiles are free
            self.fetch_q(row)

        m0, alpha0 = _row_vector(self.stat.at[0]), _row_vector(self.stat.at[2])
        m = jnp.maximum(m0, biggest)
        alpha = jnp.exp2(m0 - m)
        self.stat[1] = m
        self.stat[3] = alpha
        self.arrive("max1")
        p = jnp.exp2(s * self.scale2 - _columns(m, BLOCK))
        alpha = alpha * alpha0
        self.rescale(acc, alpha)
        p_narrow = p.astype(self.dtype)
        self.p[1] = p_narrow
        self.kill_dead_values(self.k.at[3], length - slot - BLOCK)
        self.mma(acc, p_narrow, self.k.at[o + 3], park="park_p1")
        self.fence()
        total = total * _columns(alpha, 8) + self.partial_sums(p)
        self.kill_dead_values(self.k.at[1], length - slot)
        self.wait("p0")
        self.mma(acc, self.p.at[o], self.k.at[o + 1])
        self.arrive("issued")
        self.retire(1)
        self.warpgroup_sync()
        self.fetch(1, 1, sources[1])
        self.retire(0)
        self.warpgroup_sync()
        self.fetch(0, 1, sources[0])
        qr = self.renew_q(qr, new_q, row)
        s = self.new_scores(1, lambda a: self.scores(a, qr, 1, o))
        return qr, s, m, total

    def finish(self, me, acc, row, m, total, began, split):
        """Normalises this warpgroup's columns and stores them, in full or as one part of a row."""
        shape, half = self.shape, self.half
        self.stat[4 + me] = total.sum(axis=1)
        self.meet(me, 0)
        total = _row_vector(self.stat.at[4]) + _row_vector(self.stat.at[5])
        some = total > 0
        inverse = jnp.where(some, 1.0 / jnp.where(some, total, 1.0), 0.0)
        value = acc[...] * _columns(inverse, half)
        lse2 = jnp.where(some, m + jnp.log2(jnp.where(some, total, 1.0)), -jnp.inf)
        self.meet(me, 1)  # nobody overwrites the sums before both have read them
        start = row * shape.rows + self.tile * TILE
        count = jnp.minimum(shape.rows - self.tile * TILE, TILE)

        @pl.when(~split)
        def _():
            self.store(self.out, value.astype(self.dtype), start, me * half, count)
            if me == 0:
                self.store(self.lse, lse2 * (1.0 / LOG2E), start, 0, count)

        @pl.when(split)
        def _():
            at = piece(self.part, self.tile, began, shape)
            self.store(self.part_out, value, at, me * half, count)
            if me == 0:
                self.store(self.part_lse, lse2, at, 0, count)
            if self.native:
                mosaic.arrive_global(self.arrivals, row * shape.tiles + self.tile)

    # -- loads; k[2 * block + h] holds columns h of a block

    def source(self, row, slot, length):
        return source_slot(row, slot, length, self.shape.slots, self.k_hbm.shape[0])

    def fetch(self, block, h, source):
        columns = pl.ds(h * self.half, self.half)
        buffer = 2 * block + h
        plgpu.copy_gmem_to_smem(
            self.k_hbm.at[pl.ds(source, BLOCK), columns],
            self.k.at[buffer],
            self.smem["k_bar"].at[buffer],
        )

    def fetch_rope(self, block, source):
        if self.shape.rope:
            plgpu.copy_gmem_to_smem(
                self.kr_hbm.at[pl.ds(source, BLOCK)],
                self.smem["kr"].at[block],
                self.smem["kr_bar"].at[block],
            )

    def fetch_q(self, row):
        rows = pl.ds(row * self.shape.rows + self.tile * TILE, TILE)
        for h in range(2):
            columns = pl.ds(h * self.half, self.half)
            plgpu.copy_gmem_to_smem(self.q_hbm.at[rows, columns], self.q.at[h], self.smem["q_bar"])

    def load_q_rope(self, row):
        if not self.shape.rope:
            return ()
        start = row * self.shape.rows + self.tile * TILE
        if self.native:
            return mosaic.load_rows(self.qr_hbm, start, (TILE, self.shape.rope), self.dtype)
        return plgpu.load(self.qr_hbm.at[pl.ds(start, TILE)], layout=_WG, optimized=False)

    def renew_q(self, qr, new_q, row):
        """The query of the next row, once every score of this one is done."""

        @pl.when(new_q)
        def _():
            plgpu.barrier_wait(self.smem["q_bar"])

        if not self.shape.rope:
            return qr
        return lax.cond(new_q, lambda _: self.load_q_rope(row), lambda q: q, qr)

    # -- scores

    def scores(self, acc, qr, block, o, between=None):
        """Adds q k^T of a block: rope, then the half that is loaded first, then the other."""
        if self.shape.rope:
            plgpu.barrier_wait(self.smem["kr_bar"].at[block])
            park = None if self.native else self.smem["park_qr"].at[block]
            self.mma(acc, qr, self.smem["kr"].at[o + block].T, park=park)
        if between is not None:
            between()
        for h in (block, 1 - block):
            plgpu.barrier_wait(self.smem["k_bar"].at[2 * block + h])
            self.mma(acc, self.q.at[o + h], self.k.at[o + (2 * block + h)].T)
        return acc[...]

    def new_scores(self, me, body):
        """Runs body(accumulator) on a fresh [64, 64] accumulator and returns its scores."""
        if self.native:
            return pl.run_scoped(body, plgpu.ACC((TILE, BLOCK), jnp.float32))
        self.clear(self.smem["s_acc"].at[me], BLOCK)
        return body(self.smem["s_acc"].at[me])

    def mask(self, s, slot, length):
        """-inf where a query row may not look; only the last blocks of a batch row need it."""
        tokens = self.shape.tokens

        def masked(s):
            column = plgpu.broadcasted_iota(jnp.int32, (TILE, BLOCK), 1, layout=_WG) + slot
            limit = _filled(length, jnp.int32)
            if tokens > 1:
                row = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (TILE,), 0), _ROW)
                token = lax.div(row + self.tile * TILE, jnp.int32(self.shape.heads))
                limit = jnp.minimum(limit, token + (length - (tokens - 1)))
            return jnp.where(column < _columns(limit, BLOCK), s, -jnp.inf)

        return lax.cond(slot + BLOCK > length - (tokens - 1), masked, lambda s: s, s)

    def kill_dead_values(self, ref, live):
        """Zeros the slots of a value tile past the length: 0 * NaN would be NaN."""

        @pl.when((live > 0) & (live < BLOCK))
        def _():
            for column in range(0, self.half, 64):
                values = ref.at[:, pl.ds(column, 64)]
                slot = plgpu.broadcasted_iota(jnp.int32, (BLOCK, 64), 0, layout=_WG)
                x = plgpu.load(values, layout=_WG, optimized=False)
                values[...] = jnp.where(slot < live, x, jnp.zeros_like(x))
            plgpu.commit_smem()

    # -- accumulators: in registers and in flight natively, in shared memory when interpreted

    def mma(self, acc, a, b, park=None):
        if self.native:
            plgpu.wgmma(acc, a, b)
            return
        if park is not None:  # the interpreter has no product with its left side in registers
            parked = self.smem[park] if isinstance(park, str) else park
            parked[...] = a
            plgpu.commit_smem()
            a = parked

        def product(fresh):
            plgpu.wgmma(fresh, a, b)
            return fresh[...]

        acc[...] = acc[...] + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))

    def rescale(self, acc, alpha):
        # Always: it interleaves with the exponentials. A branch that spared rows whose maximum
        # stayed came out slower.
        old = plgpu.wgmma_accumulator_load(acc, wait_n=None) if self.native else acc[...]
        acc[...] = old * _columns(alpha, self.half)

    def clear(self, acc, width):
        zero = jnp.zeros((TILE, width), jnp.float32)
        acc[...] = plgpu.layout_cast(zero, _WG) if self.native else zero

    def retire(self, in_flight):
        if self.native:
            plgpu.wgmma_wait(in_flight)

    def partial_sums(self, p):
        return mosaic.partial_sums(p) if self.native else p.reshape(TILE, 8, -1).sum(2)

    def store(self, ref, value, row, column, count):
        if self.native and value.ndim == 2:
            mosaic.store_rows(ref, value, row, column, count)
        elif self.native:
            mosaic.store_row_values(ref, value, row, count)
        elif value.ndim == 2:
            ref[pl.ds(row, TILE), pl.ds(column, value.shape[1])] = value
        else:
            ref[pl.ds(row, TILE)] = value

    # -- between the two warpgroups: arrive(x) by one, wait(x) by the other

    def arrive(self, flag):
        if self.native:
            mosaic.named_barrier("arrive", 4 + _FLAGS.index(flag))
        else:
            plgpu.barrier_arrive(self.smem["flags"].at[_FLAGS.index(flag)])

    def wait(self, flag):
        if self.native:
            mosaic.named_barrier("sync", 4 + _FLAGS.index(flag))
        else:
            plgpu.barrier_wait(self.smem["flags"].at[_FLAGS.index(flag)])

    def meet(self, me, which):
        if self.native:
            mosaic.named_barrier("sync", 8)
        else:
            plgpu.barrier_arrive(self.smem["meet"].at[2 * which + me])
            plgpu.barrier_wait(self.smem["meet"].at[2 * which + 1 - me])

    def fence(self):
        mosaic.fence_async() if self.native else plgpu.commit_smem()

    def warpgroup_sync(self):
        if self.native:
            mosaic.warpgroup_sync()
