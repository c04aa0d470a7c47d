"""The decode kernel for up to 16 query rows a batch row: latents are the left sides.

A matrix product has 64 rows on its left. With few heads a tile of queries fills a quarter of them,
and the products of `kernel.py` take as long as with 64. Here slots and channels are these rows, and
the queries the 16 columns on the right:

    S^T [64 slots, 16]      = K [64, 576] Q^T        softmax over its columns
    O^T [512 channels, 16] += V^T [512, 64] P^T

Both left sides are one tile in shared memory. Over latents in fp8 they come from its bytes, which
`few_scaled.py` turns into float16 in registers.

Two warpgroups take every other block, each with a maximum, a sum and O^T of its own, and meet only
at the end of a batch row, where the second gives its O^T to the first through shared memory. A
warpgroup starts the copy of its next block as soon as it is done with one. Both run the same
instructions, of which as few as possible: at small batches these come from memory as latents do,
and where each had its own, they waited for instructions half of their time.

Shared memory (KiB; 200 in all, 218 over fp8):

    name   KiB  shape               holds
    k      128  2 [64, 512]         latents: k[w] is the block of warpgroup w
    kr      16  2 [64, 64]          rotary keys of the same blocks
    q       18  9 [16, 64]          queries of the row at hand, in pieces, the last one rotary
    p        4  2 [16, 64]          softmax weights of warpgroup w
    given   32  [16, 512] float32   O^T of warpgroup 1, then what the part stores
    stat         2 [16] float32     the maximum and the sum of warpgroup 1
    shared       2 [4, 16]          what `columns.reduce_columns` works with

Letters: B batch, S cache slots.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper import columns, kernel
from mla_jax.ops.hopper.columns import HEADS, RANK, ROPE, WIDTH
from mla_jax.ops.hopper.kernel import WG, Shape, tiled
from mla_jax.ops.hopper.merge import LOG2E, LOWEST, piece
from mla_jax.ops.hopper.places import WalkingPart
from mla_jax.ops.hopper.schedule import BLOCK, STEP

PIECES = RANK // 64


def decode(operands, schedule, table, shape: Shape, batch: int):
    """As `kernel.decode`, of 16 query rows of each batch row."""
    options = kernel.launch_options(shape)
    return kernel.launch(FewPart, operands, schedule, table, shape, batch, **options)[:2]


def over(values, rows):
    """[16] to [rows, 16], free in registers."""
    return lax.broadcast_in_dim(values, (rows, WIDTH), [1])


def _filled(value):
    return plgpu.layout_cast(jnp.full((WIDTH,), value, jnp.float32), HEADS)


class FewPart(WalkingPart):
    """One thread block: part `part` of the batch."""

    name = "mla_decode_few"
    depth = 1  # blocks of a warpgroup that are under way at once
    headroom = raised = 0  # log2 of what values and softmax weights are multiplied with

    @classmethod
    def scratch(cls, shape: Shape) -> dict[str, Any]:
        """The shared memory of the table above, and barriers for what is copied."""
        f32 = jnp.float32
        return {
            "k": tiled((2, BLOCK, RANK), shape.dtype),
            "kr": tiled((2 * cls.depth, BLOCK, ROPE), shape.dtype),
            "q": tiled((PIECES + 1, WIDTH, 64), shape.dtype),
            "p": tiled((2, WIDTH, BLOCK), shape.dtype),
            "given": plgpu.RefUnion(columns.rows_of(f32), columns.rows_of(shape.dtype)),
            "stat": plgpu.SMEM((2, WIDTH), f32),
            "shared": plgpu.SMEM((2, 4, WIDTH), f32),
            "k_bar": plgpu.Barrier(num_arrivals=2, num_barriers=2 * cls.depth),
            "q_bar": plgpu.Barrier(num_arrivals=PIECES + 1),
        }

    def run(self):
        """As `kernel.Part.run`."""

        @pl.when(self.end_step > self.first_step)
        def _():
            self.begin(lax.axis_index("wg"))
            self.merge()

    def begin(self, me):
        pl.run_scoped(lambda acc: self.walk(me, acc), plgpu.ACC((RANK, WIDTH), jnp.float32))

    def walk(self, me, acc):
        """The steps of this part, row by row; `me` takes block `me` of each."""
        here = self.first_place()
        row = here.row
        pl.when(me == 1)(lambda: self.fetch_q(row))
        places = [here]  # and those of the blocks under way
        for n in range(self.depth):
            self.fetch_block(me, n, places[-1])
            places.append(self.place_after(self.first_step + n, places[-1]))
        begin = self.first_step - here.number
        held = self.load_ahead(here, me)

        def one_row(row, carry):
            *places, held, begin = carry
            end = self.row_step[row + 1] + 0
            lo, hi = jnp.maximum(begin, self.first_step), jnp.minimum(end, self.end_step)
            plgpu.barrier_wait(self.smem["q_bar"])
            scale2 = self.scale2 * self.turn_queries(me)
            acc[...] = self.zeros(RANK)
            m, total = _filled(LOWEST), self.zeros(BLOCK)

            def one_step(g, carry):
                *places, held, m, total = carry
                buffer = me
                if self.depth > 1:
                    turn = lax.rem(g - self.first_step, jnp.int32(self.depth))
                    buffer = self.depth * me + turn
                coming = self.load_ahead(places[1], me)
                m, total = self.one_block(me, acc, buffer, places[0], held, scale2, m, total)
                self.warpgroup_sync()
                self.fetch_block(me, buffer - self.depth * me, places[-1])
                after = self.place_after(g + self.depth, places[-1])
                return *places[1:], after, coming, m, total

            carry = lax.fori_loop(lo, hi, one_step, (*places, held, m, total))
            *places, held, m, total = carry
            began = begin < self.first_step
            self.finish(me, acc, row, m, total, began, began | (end > self.end_step))
            return *places, held, end

        lax.fori_loop(row, self.end_row + 1, one_row, (*places, held, begin))
        for n in range(self.depth):  # copies of the blocks past the end
            plgpu.barrier_wait(self.smem["k_bar"].at[self.depth * me + n])

    def one_block(self, me, acc, buffer, here, held, scale2, m, total):
        """One block: scores, softmax, values."""
        del held
        plgpu.barrier_wait(self.smem["k_bar"].at[buffer])
        o = self.begin_step(here.number)
        s = self.new_scores(me, lambda a: self.block_scores(a, o, buffer))
        s = self.mask_rows(s, here, me)
        m_new = jnp.maximum(m, self.reduce(s, me, "max") * scale2)
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(s * scale2 - over(m_new, BLOCK))
        self.store_weights(me, p)
        total = total * over(alpha, BLOCK) + p
        acc[...] = self.current(acc) * over(alpha, RANK)
        self.add_values(me, acc, o, buffer, here)
        self.retire(0)
        return m_new, total

    def block_scores(self, acc, o, buffer):
        """The scores of a block."""
        for n in range(PIECES):
            keys = self.k.at[o + buffer, :, pl.ds(64 * n, 64)]
            self.mma(acc, keys, self.q.at[o + n].T)
        self.mma(acc, self.smem["kr"].at[o + buffer], self.q.at[o + PIECES].T)
        return acc[...]

    def store_weights(self, me, p):
        """Shares the softmax weights with this warpgroup's products."""
        self.put_weights(self.p.at[me], p.astype(self.p.dtype))
        self.fence()

    def add_values(self, me, acc, o, buffer, here):
        """Adds a block's values, weighted."""
        _, live = self.extent(here, me)
        pl.when((live > 0) & (live < BLOCK))(lambda: self.clear_slots(self.k.at[buffer], live))
        self.warpgroup_sync()
        self.mma(acc, self.k.at[o + buffer].T, self.p.at[o + me].T)

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
            return jnp.where(self.slot_of_row(row) < limit, s, -jnp.inf)

        return lax.cond(slot + BLOCK > here.length - (tokens - 1), masked, lambda s: s, s)

    def finish(self, me, acc, row, m, total, began, split):
        """Joins what the two warpgroups have of a row and stores it, in full or as one part."""
        shape, (given, narrow) = self.shape, self.rows()
        total = self.reduce(total, me, "sum")
        self.retire(0)
        value = self.current(acc)

        @pl.when(me == 1)
        def _():
            self.smem["stat"][0] = m
            self.smem["stat"][1] = total
            self.put(given, value)

        self.meet(me, 0)

        @pl.when(me == 0)
        def _():
            other, other_total = self.load_heads(0), self.load_heads(1)
            top = jnp.maximum(m, other)
            mine, theirs = jnp.exp2(m - top), jnp.exp2(other - top)
            both = total * mine + other_total * theirs
            some = both != 0  # NaN is a sum of weights, too
            safe = jnp.where(some, both, 1.0)
            inverse = jnp.where(some, 2.0**-self.headroom / safe, 0.0)
            joined = value * over(mine * inverse, RANK)
            joined = joined + self.take(given) * over(theirs * inverse, RANK)
            lse2 = jnp.where(some, top + jnp.log2(safe) - self.raised, -jnp.inf)
            count = jnp.int32(min(shape.rows, WIDTH))

            @pl.when(~split)
            def _():
                start = row * shape.rows
                self.store_columns(narrow, joined.astype(self.dtype), self.out, start)
                self.store_heads(self.lse, lse2 * (1.0 / LOG2E), start, count)

            @pl.when(split)
            def _():
                at = piece(self.part, self.tile, began, shape)
                self.store_columns(given, joined, self.part_out, at)
                self.store_heads(self.part_lse, lse2, at, count)

        @pl.when((me == 1) & (row < self.end_row))
        def _():  # neither has scores to make with the queries at hand
            self.fetch_q(row + 1)

        self.meet(me, 1)  # what was given has been taken
        pl.when(split)(lambda: self.announce(row * shape.tiles + self.tile))

    # -- copies

    def fetch_block(self, me, buffer, place):
        """Copies block `me` of a step to a buffer."""
        slot, buffer = place.number * STEP + me * BLOCK, buffer + self.depth * me
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

    # -- what fp8 has other ways for

    def load_ahead(self, place, me) -> Any:
        """What is loaded a step before its use: nothing."""
        del place, me
        return ()

    def turn_queries(self, me) -> Any:
        """Brings queries into the units of left sides, which here are theirs; what undoes it."""
        del me
        return 1.0

    def slot_of_row(self, row):
        """The slot of a block that is row `row` of its scores."""
        return row

    def put(self, ref, value):
        """Stores O^T as rows of heads."""
        columns.put(ref, value)

    def take(self, ref):
        """What `put` has stored of another warpgroup's O^T."""
        return columns.take(ref)

    # -- what the interpreter has other ways for

    def rows(self):
        """What is given, as rows of float32 and of the operands' dtype."""
        return self.smem["given"]

    def zeros(self, rows):
        return plgpu.layout_cast(jnp.zeros((rows, WIDTH), jnp.float32), WG)

    def new_scores(self, me, body):
        del me
        return pl.run_scoped(body, plgpu.ACC((BLOCK, WIDTH), jnp.float32))

    def put_weights(self, ref, p):
        columns.put_weights(ref, p)

    def clear_slots(self, ref, live):
        columns.clear_slots(ref, live)
        self.fence()

    def reduce(self, x, me, kind):
        return columns.reduce_columns(x, self.smem["shared"].at[me], kind)

    def load_heads(self, n):
        return plgpu.load(self.smem["stat"].at[n], layout=HEADS, optimized=False)

    def store_columns(self, ref, value, target, row):
        """Stores O^T in the rows of `target` from `row` on, by way of shared memory."""
        self.warpgroup_sync()  # what another warpgroup has given is taken
        self.put(ref, value)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(ref, target.at[pl.ds(row, WIDTH)])
        plgpu.wait_smem_to_gmem(0)

    def store_heads(self, ref, value, row, count):
        columns.store_heads(ref, value, row, count)
