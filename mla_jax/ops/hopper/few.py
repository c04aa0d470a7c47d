"""The decode kernel over fp8 latents for up to 16 query rows: latents are the left sides.

A matrix product has 64 rows on its left. With few heads a tile of queries fills a quarter of them,
and the products of `kernel.py` take as long as with 64. Here slots and channels are these rows, and
the queries the 16 columns on the right:

    S^T [64 slots, 16]      = K [64, 576] Q^T        softmax over its rows
    O^T [512 channels, 16] += V^T [512, 64] P^T

Both left sides come from the same bytes in shared memory, which a warpgroup loads into registers
and turns into bfloat16 there (`fragments.py`). So no tile of bfloat16 is ever stored: a block of 64
slots costs shared memory 40 KiB of writes and 72 of reads, where `scaled.py` takes 350. What bounds
it is the arithmetic of turning, 8 instructions for two numbers, once as keys and once as values.

Two warpgroups take every other block, each with a maximum, a sum and O^T of its own, and meet only
at the end of a batch row, where the second gives its O^T to the first through shared memory. A
warpgroup has two buffers of bytes. It starts the copy of the block after the next as soon as it has
loaded the last values of a block.

Shared memory (KiB; 219 in all):

    name   KiB  shape               holds
    raw    128  4 [64, 512] e4m3    latents of blocks; raw[2 w + i] is buffer i of warpgroup w
    kr      32  4 [64, 64]          rotary keys of the same blocks
    q       18  9 [16, 64]          queries of the row at hand, in pieces, the last one rotary
    p        4  2 [64, 16]          softmax weights of warpgroup w
    factor   1  2 [4, 64]           scales as `fragments.factors` makes them
    given   32  [512, 16] float32   O^T of warpgroup 1
    stat         2 [16] float32     its maximum and its sum
    shared       2 [4, 16]          what `fragments.reduce_columns` works with

Letters: B batch, S cache slots.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper import fragments, kernel
from mla_jax.ops.hopper.fragments import HEADS, RANK, ROPE, SMALL, WIDTH
from mla_jax.ops.hopper.kernel import WG, Shape, tiled
from mla_jax.ops.hopper.merge import LOG2E, LOWEST, piece
from mla_jax.ops.hopper.scaled import Place, ScaledPart
from mla_jax.ops.hopper.schedule import BLOCK, STEP, Column

PIECES = RANK // 64


def decode(operands, schedule, table, shape: Shape, batch: int):
    """As `scaled.decode`, of queries in the order of `fragments`, 16 rows of each batch row."""
    options = kernel.launch_options(shape)
    return kernel.launch(FewPart, operands, schedule, table, shape, batch, **options)[:2]


def _over(values, rows):
    """[16] to [rows, 16], free in registers."""
    return lax.broadcast_in_dim(values, (rows, WIDTH), [1])


def _filled(value):
    return plgpu.layout_cast(jnp.full((WIDTH,), value, jnp.float32), HEADS)


class FewPart(ScaledPart):
    """One thread block: part `part` of the batch."""

    name = "mla_decode_few"
    warpgroups = 2

    def __init__(self, refs, smem, shape: Shape, paged: bool):
        super().__init__(refs, smem, shape, paged)
        self.scale2 /= SMALL

    @classmethod
    def scratch(cls, shape: Shape) -> dict[str, Any]:
        """The shared memory of the table above, and barriers for what is copied."""
        f32 = jnp.float32
        return {
            "k": plgpu.SMEM((4, BLOCK, RANK), jnp.float8_e4m3fn, transforms=fragments.BYTES),
            "kr": tiled((4, BLOCK, ROPE), shape.dtype),
            "q": tiled((PIECES + 1, WIDTH, 64), shape.dtype),
            "p": tiled((2, BLOCK, WIDTH), shape.dtype),
            "factor": plgpu.SMEM((2, fragments.GROUPS, BLOCK), shape.dtype),
            "given": plgpu.SMEM((RANK, WIDTH), f32),
            "stat": plgpu.SMEM((2, WIDTH), f32),
            "shared": plgpu.SMEM((2, 4, WIDTH), f32),
            "k_bar": plgpu.Barrier(num_arrivals=2, num_barriers=4),
            "q_bar": plgpu.Barrier(num_arrivals=PIECES + 1),
        }

    def views(self, smem):
        """The buffers of bytes, for both names that `ScaledPart` has."""
        return smem["k"], smem["k"]

    def run(self):
        """As `kernel.Part.run`."""

        @pl.when(self.end_step > self.first_step)
        def _():
            wg = lax.axis_index("wg")
            lax.cond(wg == 0, lambda: self.begin(0), lambda: self.begin(1))
            self.merge()

    def begin(self, me):
        pl.run_scoped(lambda acc: self.walk(me, acc), plgpu.ACC((RANK, WIDTH), jnp.float32))

    def walk(self, me, acc):
        """The steps of this part, row by row; `me` takes block `me` of each."""
        of_part = lambda column: self.parts[self.part, column] + 0  # noqa: E731
        row, begin = of_part(Column.FIRST_ROW), of_part(Column.FIRST_ROW_STEP)
        length, self.end_row = of_part(Column.FIRST_ROW_LENGTH), of_part(Column.LAST_ROW)
        if me == 1:
            self.fetch_q(row)
        number = self.first_step - begin
        here = Place(row, number, self.row_step[row + 1] + 0, length, self.page(row, number * STEP))
        self.fetch_block(me, 0, here)
        then = self.place_after(self.first_step, here)
        self.fetch_block(me, 1, then)
        after = self.place_after(self.first_step + 1, then)
        scales = self.load_block_scales(here, me)

        def one_row(row, carry):
            here, then, after, scales, begin = carry
            end = self.row_step[row + 1] + 0
            lo, hi = jnp.maximum(begin, self.first_step), jnp.minimum(end, self.end_step)
            plgpu.barrier_wait(self.smem["q_bar"])
            self.clear_output(acc)
            m, total = _filled(LOWEST), self.zeros(BLOCK)

            def one_step(g, carry):
                here, then, after, scales, m, total = carry
                buffer = 2 * me + lax.rem(g - self.first_step, jnp.int32(2))
                coming = self.load_block_scales(then, me)
                m, total = self.one_block(me, acc, buffer, here, scales, m, total)
                self.warpgroup_sync()
                self.fetch_block(me, buffer - 2 * me, after)
                return then, after, self.place_after(g + 2, after), coming, m, total

            carry = here, then, after, scales, m, total
            *carry, m, total = lax.fori_loop(lo, hi, one_step, carry)
            began = begin < self.first_step
            self.finish(me, acc, row, m, total, began, began | (end > self.end_step))
            return *carry, end

        carry = here, then, after, scales, begin
        lax.fori_loop(row, self.end_row + 1, one_row, carry)
        for buffer in range(2):  # copies of the two blocks past the end
            plgpu.barrier_wait(self.smem["k_bar"].at[2 * me + buffer])

    def one_block(self, me, acc, buffer, here, scales, m, total):
        """One block: scores, softmax, values."""
        factors = self.factors(scales, me)
        plgpu.barrier_wait(self.smem["k_bar"].at[buffer])
        o = self.begin_step(here.number)
        s = self.new_scores(me, lambda a: self.block_scores(a, o, buffer, here, factors, me))
        s = self.mask_rows(s, here, me)
        m_new = jnp.maximum(m, self.reduce(s, me, "max") * self.scale2)
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(s * self.scale2 - _over(m_new, BLOCK))
        self.p[me] = p.astype(self.dtype)
        self.fence()
        total = total * _over(alpha, BLOCK) + p
        self.rescale_output(acc, alpha)
        held = self.load_values(buffer, 0)
        self.warpgroup_sync()
        for j in range(BLOCK // 16):
            coming = self.load_values(buffer, j + 1) if j + 1 < BLOCK // 16 else None
            values = self.turn_values(held, j, here, me)
            self.mma(acc, values, self.p.at[o + me, pl.ds(16 * j, 16)])
            self.retire(1)
            held = coming
        self.retire(0)
        return m_new, total

    def block_scores(self, acc, o, buffer, here, factors, me):
        """The scores of a block."""
        held = self.load_keys(buffer, 0)
        self.mma(acc, self.load_rope(buffer), self.q.at[o + PIECES].T)
        for group in range(fragments.GROUPS):
            coming = self.load_keys(buffer, group + 1) if group + 1 < fragments.GROUPS else None
            for n in range(2):
                keys = self.turn_keys(held, factors, group, n, here, me)
                self.mma(acc, keys, self.q.at[o + (2 * group + n)].T)
                self.retire(1)
            held = coming
        return acc[...]

    def mask_rows(self, s, here, me):
        """Scores, -inf where a query may not look; only the last blocks of a row need it."""
        tokens, slot = self.shape.tokens, here.number * STEP + me * BLOCK

        def masked(s):
            row = plgpu.broadcasted_iota(jnp.int32, (BLOCK, WIDTH), 0, layout=WG)
            limit = here.length - slot
            if tokens > 1:
                column = plgpu.broadcasted_iota(jnp.int32, (BLOCK, WIDTH), 1, layout=WG)
                token = lax.div(column, jnp.int32(self.shape.heads))
                limit = token + (limit - (tokens - 1))
            return jnp.where(fragments.slot_of_row(row) < limit, s, -jnp.inf)

        return lax.cond(slot + BLOCK > here.length - (tokens - 1), masked, lambda s: s, s)

    def finish(self, me, acc, row, m, total, began, split):
        """Joins what the two warpgroups have of a row and stores it, in full or as one part."""
        shape = self.shape
        total = self.reduce(total, me, "sum")
        self.retire(0)
        if me == 1:
            self.smem["stat"][0] = m
            self.smem["stat"][1] = total
            self.put(self.current(acc))
        self.meet(me, 0)
        if me == 1:  # neither has scores to make with the queries at hand

            @pl.when(row < self.end_row)
            def _():
                self.fetch_q(row + 1)
        else:
            other, other_total = self.load_heads(0), self.load_heads(1)
            top = jnp.maximum(m, other)
            mine, theirs = jnp.exp2(m - top), jnp.exp2(other - top)
            total = total * mine + other_total * theirs
            some = total > 0
            safe = jnp.where(some, total, 1.0)
            inverse = jnp.where(some, (1 / SMALL) / safe, 0.0)
            value = self.current(acc) * _over(mine * inverse, RANK)
            value = value + self.take() * _over(theirs * inverse, RANK)
            lse2 = jnp.where(some, top + jnp.log2(safe), -jnp.inf)
        self.meet(me, 1)  # what was given has been taken
        if me == 0:
            count = jnp.int32(min(shape.rows, WIDTH))

            @pl.when(~split)
            def _():
                start = row * shape.rows
                self.store_columns(self.out, value.astype(self.dtype), start, count)
                self.store_heads(self.lse, lse2 * (1.0 / LOG2E), start, count)

            @pl.when(split)
            def _():
                at = piece(self.part, self.tile, began, shape)
                self.store_columns(self.part_out, value, at, count)
                self.store_heads(self.part_lse, lse2, at, count)

        pl.when(split)(lambda: self.announce(row * shape.tiles + self.tile))

    # -- copies

    def fetch_block(self, me, buffer, place):
        """Copies block `me` of a step to a buffer."""
        slot, buffer = place.number * STEP + me * BLOCK, buffer + 2 * me
        source = self.source(place.row, slot, place.length, place.page)
        bar = self.smem["k_bar"].at[buffer]
        plgpu.copy_gmem_to_smem(self.k_hbm.at[pl.ds(source, BLOCK)], self.k.at[buffer], bar)
        plgpu.copy_gmem_to_smem(
            self.kr_hbm.at[pl.ds(source, BLOCK)], self.smem["kr"].at[buffer], bar
        )

    def fetch_q(self, row):
        rows, bar = pl.ds(row * self.shape.rows, WIDTH), self.smem["q_bar"]
        for n in range(PIECES):
            plgpu.copy_gmem_to_smem(self.q_hbm.at[rows, pl.ds(64 * n, 64)], self.q.at[n], bar)
        plgpu.copy_gmem_to_smem(self.qr_hbm.at[rows], self.q.at[PIECES], bar)

    # -- what the interpreter has other ways for

    def clear_output(self, acc):
        acc[...] = self.zeros(RANK)

    def zeros(self, rows):
        return plgpu.layout_cast(jnp.zeros((rows, WIDTH), jnp.float32), WG)

    def new_scores(self, me, body):
        del me
        return pl.run_scoped(body, plgpu.ACC((BLOCK, WIDTH), jnp.float32))

    def rescale_output(self, acc, alpha):
        acc[...] = self.current(acc) * _over(alpha, RANK)

    def load_block_scales(self, place, me):
        return fragments.load_scales(self.scale_hbm, *self.extent(place, me))

    def factors(self, scales, me):
        return fragments.factors(scales, self.smem["factor"].at[me])

    def load_keys(self, buffer, group):
        return fragments.load_keys(self.k.at[buffer], group)

    def turn_keys(self, held, factors, group, n, here, me):
        del here, me
        return fragments.turn_keys(held, factors, group, n)

    def load_rope(self, buffer):
        return fragments.load_rope(self.smem["kr"].at[buffer])

    def load_values(self, buffer, j):
        return fragments.load_values(self.k.at[buffer], j)

    def turn_values(self, held, j, here, me):
        del here
        return fragments.turn_values(held, self.smem["factor"].at[me], j)

    def reduce(self, x, me, kind):
        return fragments.reduce_columns(x, self.smem["shared"].at[me], kind)

    def put(self, value):
        fragments.put(self.smem["given"], value)

    def take(self):
        return fragments.take(self.smem["given"])

    def load_heads(self, n):
        return plgpu.load(self.smem["stat"].at[n], layout=HEADS, optimized=False)

    def store_columns(self, ref, value, row, count):
        fragments.store_columns(ref, value, row, count)

    def store_heads(self, ref, value, row, count):
        fragments.store_heads(ref, value, row, count)
