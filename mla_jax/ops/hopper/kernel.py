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

A copy for the next step, of the same batch row or of the next, starts as soon as the buffer that it
fills has been read for the last time. Rows that several parts share are merged at the end by these
same parts. In a paged cache a step's 128 slots are one page; nothing but where a copy begins
depends on it (`source_slot`).

Shared memory of a thread block (KiB for R = 512, P = 64 and 16-bit operands; 225.5 of 227):

    name  KiB   shape           holds                                        is written by
    k     128   4 [64, R/2]     latents: k[2 b + h] is half h of block b     copies (`fetch`)
    kr     16   2 [64, P]       rotary keys of block b                       copies (`fetch_rope`)
    q      64   2 [64, R/2]     halves of the patterns of the row at hand    copies (`fetch_q`)
    p      16   2 [64, 64]      softmax weights of block b, for the other    warpgroup b
    stat  1.5   6 [64] float32  [b] running maximum, [2 + b] its rescaling,  warpgroup b
                                [4 + b] sum of weights

The left halves k[0] and k[2] are the values of warpgroup 0, the right ones those of warpgroup 1;
the scores of block b, which warpgroup b makes, read both halves of b. The two wait for copies at
memory barriers, and for each other at named barriers (4 and up: Mosaic GPU uses those below):

    barrier    completes when                               and then
    k_bar[i]   k[i] is filled                               warpgroup i // 2 makes scores from it
    kr_bar[b]  kr[b] is filled                              warpgroup b makes scores from it
    q_bar      both halves of q are filled                  both make scores from them
    max0       0 has its scores and their maximum in stat,  1 makes the joint maximum, refills q
               and has read p[1] of the step before         for a new row, and writes p[1]
    max1       1 has the joint maximum in stat, and has     0 rescales p0 and writes p[0]
               read p[0] of the step before
    p0         0 has written p[0]                           1 multiplies it with k[1]
    issued     1 has written p[1] and knows k[2] is filled  0 multiplies p[1] with k[2]
    meet       both have their sums in stat; later, both    both normalise; later, both may
               have read them                               overwrite the sums

Letters: B batch, T query tokens, N heads, S cache slots, R latent width, P rope width, M pages of a
row.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper import mosaic
from mla_jax.ops.hopper.merge import LOG2E, LOWEST, like, merge, piece
from mla_jax.ops.hopper.schedule import BLOCK, STEP, TILE, Column, source_slot

WG = plgpu.Layout.WGMMA
_ROW = plgpu.Layout.WGMMA.reduce(1)
FLAGS = ("max0", "max1", "p0", "issued")  # what one warpgroup tells the other


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
    sharing: int = 1  # consecutive rows that read the same row of the cache


def decode(operands, schedule, table, shape: Shape, batch: int):
    """The kernel on pattern [B*rows, R], q_rope [B*rows, P], latent [B*S, R] and k_rope [B*S, P].

    There are no rope operands where P = 0. With a table [B M] the cache is the pool's pages one
    after the other, [G*128, R]. Returns out [B*rows, R] and lse [B*rows].
    """
    return launch(Part, operands, schedule, table, shape, batch, **launch_options(shape))[:2]


def launch_options(shape: Shape) -> dict[str, Any]:
    """The grid and how it is compiled: a thread block for every part and tile."""
    return {
        "grid": (shape.parts, shape.tiles),
        "grid_names": ("part", "tile"),
        "thread_name": "wg",
        "compiler_params": plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    }


def launch(part, operands, schedule, table, shape: Shape, batch: int, **options):
    """`decode` with the kernel of a class; also returns the pieces of shared rows and their lse."""
    width, dtype, f32 = shape.rank, shape.dtype, jnp.float32
    pieces = 2 * shape.parts * shape.tiles * TILE  # a part shares its first and last row at most
    outputs = [(batch * shape.rows, width), (batch * shape.rows,), (pieces, width), (pieces,)]
    dtypes = (dtype, f32, f32, f32)

    def body(*refs, **scratch):
        part(refs, scratch, shape, table is not None).run()

    return mosaic.kernel(
        body,
        out_type=[like(operands[0], s, d) for s, d in zip(outputs, dtypes, strict=True)],
        scratch_types=part.scratch(shape),
        kernel_name=part.name,
        num_threads=part.warpgroups,
        **options,
    )(*operands, *schedule, *(() if table is None else (table,)))


def tiled(shape, dtype):
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


class Part:
    """The thread block that does part `part` of the batch for tile `tile` of the query rows."""

    name = "mla_decode"
    warpgroups = 2

    def __init__(self, refs, smem, shape: Shape, paged: bool):
        refs = list(refs)
        self.shape, self.smem = shape, smem
        self.half, self.dtype = shape.rank // 2, shape.dtype
        self.q_hbm: Any = refs.pop(0)
        self.qr_hbm: Any = refs.pop(0) if shape.rope else None
        self.k_hbm: Any = refs.pop(0)
        self.kr_hbm: Any = refs.pop(0) if shape.rope else None
        self.lengths, self.row_step, self.row_parts, self.parts, self.arrivals, *refs = refs
        self.table: Any = refs.pop(0) if paged else None
        self.out, self.lse, self.part_out, self.part_lse = refs
        names = ("out", "lse", "part_out", "part_lse", "arrivals", "row_parts")
        self.merge_refs = {name: getattr(self, name) for name in names} | {"part": self.parts}
        self.k, self.q, self.p, self.stat = (smem[name] for name in ("k", "q", "p", "stat"))
        self.part, self.tile = lax.axis_index("part"), lax.axis_index("tile")
        self.first_step = self.parts[self.part, Column.FIRST_STEP]
        self.end_step = self.parts[self.part, Column.END_STEP]
        self.scale2 = shape.scale * LOG2E  # softmax in base 2

    @classmethod
    def scratch(cls, shape: Shape) -> dict[str, Any]:
        """The shared memory and the barriers of the tables above."""
        half, dtype = shape.rank // 2, shape.dtype
        smem = {
            "k": tiled((4, BLOCK, half), dtype),
            "q": tiled((2, TILE, half), dtype),
            "p": tiled((2, TILE, BLOCK), dtype),
            "stat": plgpu.SMEM((6, TILE), jnp.float32),  # one array, as each would take 1 KiB
            "k_bar": plgpu.Barrier(num_barriers=4),
            "q_bar": plgpu.Barrier(num_arrivals=2),
        }
        if shape.rope:
            smem |= {
                "kr": tiled((2, BLOCK, shape.rope), dtype),
                "kr_bar": plgpu.Barrier(num_barriers=2),
            }
        return smem

    def run(self):
        """Walks the part's steps, then merges its share of the last row, if others have it too."""

        @pl.when(self.end_step > self.first_step)
        def _():
            wg = lax.axis_index("wg")

            lax.cond(wg == 0, lambda: self.begin(0), lambda: self.begin(1))
            self.merge()

    def walk(self, me, acc):
        """The steps of this part, row by row; `me` owns columns `me` of O, block `me` of steps."""
        # Under shard_map a loaded number varies over the mesh's axes and a computed one does not;
        # the loop over rows carries computed ones.
        of_part = lambda column: self.parts[self.part, column] + 0  # noqa: E731
        row, here = of_part(Column.FIRST_ROW), of_part(Column.FIRST_ROW_STEP)
        length, end_row = of_part(Column.FIRST_ROW_LENGTH), of_part(Column.LAST_ROW)
        slot = (self.first_step - here) * STEP
        page = self.page(row, slot)
        if me == 1:
            self.fetch_q(row)  # first, because every score waits for it
        self.fetch_rope(me, self.source(row, slot + me * BLOCK, length, page))
        for block in range(2):
            self.fetch(block, me, self.source(row, slot + block * BLOCK, length, page))
        row_end = lambda: self.row_step[row + 1]  # noqa: E731
        page = self.page_after(self.first_step, row, slot, row_end, end_row)
        qr = self.load_q_rope(row)
        plgpu.barrier_wait(self.smem["q_bar"])
        s = self.new_scores(me, lambda a: self.scores(a, qr, me, jnp.int32(0)))

        def one_row(row, carry):
            qr, s, page, length, here, there = carry
            next_row = jnp.minimum(row + 1, end_row)
            # These are loaded a row ahead of their use.
            next_length, next_end = self.lengths[next_row] + 0, self.row_step[next_row + 1] + 0
            lo = jnp.maximum(here, self.first_step)
            hi = jnp.minimum(there, self.end_step)
            self.clear(acc, self.half)
            m = _filled(LOWEST)
            total = _columns(_filled(0.0), 8)

            def one_step(g, carry):
                qr, s, page, m, total = carry
                slot = (g - here) * STEP
                last = g + 1 == hi
                more = g + 1 < self.end_step
                then = jnp.where(last, next_row, row)
                then_slot = jnp.where(last, 0, slot + STEP)
                then_length = jnp.where(last, next_length, length)
                # After the last step the copies go on from past the end of the cache. They read
                # nothing, and every barrier completes as often as somebody waits for it.
                then_length = jnp.where(more, then_length, 0)
                sources = [
                    self.source(then, then_slot + b * BLOCK, then_length, page) for b in range(2)
                ]
                then_end = lambda: jnp.where(last, next_end, there)  # noqa: E731
                page = self.page_after(g + 1, then, then_slot, then_end, end_row)
                o = self.begin_step(g)
                step = self.step0 if me == 0 else self.step1
                new_q = last & more
                qr, s, m, total = step(acc, o, qr, s, m, total, slot, length, sources, new_q, then)
                return qr, s, page, m, total

            qr, s, page, m, total = lax.fori_loop(lo, hi, one_step, (qr, s, page, m, total))
            began = here < self.first_step
            self.finish(me, acc, row, m, total, began, began | (there > self.end_step))
            return qr, s, page, next_length, there, next_end

        state = (qr, s, page, length, here)
        lax.fori_loop(row, end_row + 1, one_row, (*state, self.row_step[row + 1] + 0))

    def step0(self, acc, o, qr, s, m, total, slot, length, sources, new_q, row):
        """Block 0's softmax; left columns of the output."""
        s = self.mask(s, 0, slot, length)
        m_new = jnp.maximum(m, s.max(axis=1) * self.scale2)
        alpha = jnp.exp2(m - m_new)
        self.stat[0] = m_new
        self.stat[2] = alpha
        self.arrive("max0")
        p = jnp.exp2(s * self.scale2 - _columns(m_new, BLOCK))
        self.rescale(acc, alpha)
        self.kill_dead_values(self.k.at[0], length - slot)
        self.mma(acc, p.astype(self.dtype), self.k.at[o], park=("park_p", 0))
        # The sums run while the product that was just issued does.
        total = total * _columns(alpha, 8) + self.partial_sums(p)
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
            # The product with the values must be done, not that of the rotary scores behind it.
            self.retire(1 if self.shape.rope else 0)
            self.warpgroup_sync()
            self.fetch(1, 0, sources[1])

        s = self.new_scores(0, lambda a: self.scores(a, qr, 0, o, refill))
        return qr, s, m, total

    def step1(self, acc, o, qr, s, m, total, slot, length, sources, new_q, row):
        """Block 1's softmax; right columns of the output."""
        del m
        s = self.mask(s, 1, slot + BLOCK, length)
        biggest = s.max(axis=1) * self.scale2
        self.wait("max0")
        self.fetch_rope(1, sources[1])

        @pl.when(new_q)
        def _():  # both warpgroups have their scores, so the query tiles are free
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
        self.mma(acc, p_narrow, self.k.at[o + 3], park=("park_p", 1))
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
        some = total != 0  # NaN is a sum of weights, too
        inverse = jnp.where(some, 1.0 / jnp.where(some, total, 1.0), 0.0)
        value = acc[...] * _columns(inverse, half)
        lse2 = jnp.where(some, m + jnp.log2(jnp.where(some, total, 1.0)), -jnp.inf)
        self.meet(me, 1)  # both have read the sums, which may now be overwritten
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
            self.announce(row * shape.tiles + self.tile)

    # -- copies; k[2 * block + h] holds columns h of a block

    def page(self, row, slot) -> Any:
        """The page of the step that begins with a slot; None in a dense cache."""
        return None if self.table is None else self.table[row, lax.div(slot, jnp.int32(STEP))]

    def page_after(self, step, row, slot, row_end, end_row):
        """The page of the step after the one that begins with a slot of a row.

        It is loaded a whole step ahead, as the compiler waits right behind a load used in this one.
        """
        if self.table is None:
            return None
        over = step + 1 >= row_end()
        row = jnp.where(over, jnp.minimum(row + 1, end_row), row)
        slot = jnp.where(over, 0, slot + STEP)
        return self.page(row, slot) + 0

    def source(self, row, slot, length, page) -> Any:
        return source_slot(row, slot, length, self.shape.slots, self.k_hbm.shape[0], page)

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
        return self.load_tile(self.qr_hbm, row * self.shape.rows + self.tile * TILE)

    def renew_q(self, qr, new_q, row):
        """The query of the next row, once every score of this one is done."""

        @pl.when(new_q)
        def _():
            plgpu.barrier_wait(self.smem["q_bar"])

        if not self.shape.rope:
            return qr
        return lax.cond(new_q, lambda _: self.load_q_rope(row), lambda q: q, qr)

    def await_copy(self, barrier, index):
        plgpu.barrier_wait(self.smem[barrier].at[index])

    # -- scores

    def scores(self, acc, qr, block, o, between=None):
        """Adds q k^T of a block: rope, then the half that is loaded first, then the other."""
        if self.shape.rope:
            self.await_copy("kr_bar", block)
            self.mma(acc, qr, self.smem["kr"].at[o + block].T, park=("park_qr", block))
        if between is not None:
            between()
        for h in (block, 1 - block):
            self.await_copy("k_bar", 2 * block + h)
            self.mma(acc, self.q.at[o + h], self.k.at[o + (2 * block + h)].T)
        return acc[...]

    def mask(self, s, block, slot, length):
        """Scores, -inf where a query may not look; only the last blocks of a row need it."""
        del block
        tokens = self.shape.tokens

        def masked(s):
            column = plgpu.broadcasted_iota(jnp.int32, (TILE, BLOCK), 1, layout=WG) + slot
            limit = _filled(length, jnp.int32)
            if tokens > 1:
                row = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (TILE,), 0), _ROW)
                token = lax.div(row + self.tile * TILE, jnp.int32(self.shape.heads))
                limit = jnp.minimum(limit, token + (length - (tokens - 1)))
            return jnp.where(column < _columns(limit, BLOCK), s, -jnp.inf)

        return lax.cond(slot + BLOCK > length - (tokens - 1), masked, lambda s: s, s)

    def kill_dead_values(self, ref, live):
        """Zeros the slots of a value tile past the row's length, since 0 times NaN is NaN."""

        @pl.when((live > 0) & (live < BLOCK))
        def _():
            for column in range(0, self.half, 64):
                values = ref.at[:, pl.ds(column, 64)]
                slot = plgpu.broadcasted_iota(jnp.int32, (BLOCK, 64), 0, layout=WG)
                x = plgpu.load(values, layout=WG, optimized=False)
                values[...] = jnp.where(slot < live, x, jnp.zeros_like(x))
            plgpu.commit_smem()

    # -- accumulators, in registers and in flight

    def begin(self, me):
        """Walks as warpgroup `me`, with its accumulator."""
        pl.run_scoped(functools.partial(self.walk, me), plgpu.ACC((TILE, self.half), jnp.float32))

    def new_scores(self, me, body):
        """Runs body(accumulator) on a fresh [64, 64] accumulator and returns its scores."""
        del me
        return pl.run_scoped(body, plgpu.ACC((TILE, BLOCK), jnp.float32))

    def begin_step(self, step):
        """Zero, added to the index of an operand; `mosaic.opaque` says why."""
        del step
        return mosaic.opaque(0)

    def mma(self, acc, a, b, park=None):
        """Issues acc += a b; `park` is where the interpreter keeps a left side in registers."""
        del park
        plgpu.wgmma(acc, a, b)

    def rescale(self, acc, alpha):
        # This runs always, as it interleaves with the exponentials. A branch that spared the rows
        # whose maximum stayed came out slower.
        acc[...] = self.current(acc) * _columns(alpha, self.half)

    def current(self, acc):
        """The accumulator's value while products may be in flight."""
        return plgpu.wgmma_accumulator_load(acc, wait_n=None)

    def clear(self, acc, width):
        acc[...] = plgpu.layout_cast(jnp.zeros((TILE, width), jnp.float32), WG)

    def retire(self, in_flight):
        """Waits until at most so many matrix products are in flight."""
        plgpu.wgmma_wait(in_flight)

    def partial_sums(self, p):
        return mosaic.partial_sums(p)

    def load_tile(self, ref, start):
        """64 rows of an array in device memory, in the layout of matrix products."""
        return mosaic.load_rows(ref, start, (TILE, ref.shape[1]), self.dtype)

    def store(self, ref, value, row, column, count):
        if value.ndim == 2:
            return mosaic.store_rows(ref, value, row, column, count)
        return mosaic.store_row_values(ref, value, row, count)

    # -- between the two warpgroups: one does arrive(flag), the other wait(flag); and between parts
    def arrive(self, flag):
        mosaic.named_barrier("arrive", 4 + FLAGS.index(flag))

    def wait(self, flag):
        mosaic.named_barrier("sync", 4 + FLAGS.index(flag))

    def meet(self, me, which):
        """Waits until both warpgroups are here, for the first or the second time in a row."""
        del me, which
        mosaic.named_barrier("sync", 4 + len(FLAGS))

    def fence(self):
        """Makes what this warpgroup wrote to shared memory visible to matrix products."""
        mosaic.fence_async()

    def warpgroup_sync(self):
        mosaic.warpgroup_sync()

    def announce(self, counter):
        """Tells the other parts of a row that this warpgroup's piece of it is stored."""
        mosaic.arrive_global(self.arrivals, counter)

    def merge(self):
        """Merges this warpgroup's share of the part's last row, once all its pieces are there."""
        wg, meet = mosaic.warpgroup(), mosaic.meet_global
        merge(self.part, self.tile, wg, self.merge_refs, self.shape, meet)
