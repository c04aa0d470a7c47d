"""The decode kernel over chosen slots: a third warpgroup gathers what the other two attend to.

Every query token has slots of its own (sparse attention), so it is a row of its own to the kernel
of `kernel.py`, with K "slots" that lie anywhere in the cache row of its batch row. Two warpgroups
compute as they do there. Where they start a copy there, they say here that a buffer is free; the
third warpgroup, which holds few registers, waits for that and copies the rows of the next block
one by one (`copies.py`). A chosen slot that is none, or that the query may not see, becomes a row
of zeros whose scores are masked.

    word of stat[6]     holds                                            is written by
    2 b, 2 b + 1        which of the 64 rows of block b are there, bits  the gathering warpgroup
    4 + 2 i             barrier: k[i] is filled (0 to 3)                 its copies
    12 + 2 b            barrier: kr[b] is filled                         its copies

    named barrier       completes when                                   and then
    free + i            k[i] has been read for the last time, kr[b] too  it is filled anew
                        where i = 3 b, the half that is loaded first

T cannot fill a tile, as it does where tokens see the same slots: a tile of 64 rows has the heads of
one token, and fewer than 64 heads leave the rest of the tile's products unused. There the kernel
waits for memory, not for products.

Letters: as in `kernel.py`, with K chosen slots.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper import copies, interpreted, mosaic
from mla_jax.ops.hopper.kernel import FLAGS, WG, Part, Shape, launch, launch_options
from mla_jax.ops.hopper.schedule import BLOCK, STEP, TILE

COMPUTING, COPYING = 240, 24  # registers of a thread: 504 for three, 24 the least there is
_FREE = 4 + len(FLAGS) + 1  # the first of four named barriers
_WORDS = 6 * TILE  # where stat[6] begins: an array of its own would not fit shared memory
_BARRIERS = {"k_bar": _WORDS + 4, "kr_bar": _WORDS + 12}
_ORDER = ((0, 0), (1, 3), (None, 1), (None, 2))  # block whose rotary keys come first, and k[i]


def attend(operands, chosen, limits, schedule, table, shape: Shape, interpret: Any = None):
    """Runs the kernel on flat operands.

    Args:
        operands: pattern [rows, R], q_rope, latent [B S, R], k_rope; without the rope ones where
            P = 0. `shape.rows` rows belong to each query token.
        chosen: int32 [tokens K], K = `shape.slots`, a multiple of 128.
        limits: int32 [tokens], slots that a token may see.
        schedule: a `Schedule` for the tokens as rows.
        table: [B M], as in `kernel.decode`; None for a dense cache.
        shape: of the call; `sharing` tokens read each row of the cache.
        interpret: parameters of the interpreter, or None.

    Returns:
        out [rows, R] and lse [rows].
    """
    operands, tokens = [*operands, chosen, limits], limits.shape[0]
    if interpret is None:
        options = launch_options(shape)
        return launch(GatheredPart, operands, schedule, table, shape, tokens, **options)[:2]
    part = InterpretedGatheredPart
    return interpreted.decode(operands, schedule, table, shape, tokens, part, interpret)


class GatheredPart(Part):
    """One thread block: two warpgroups as in `Part`, and one that gathers."""

    name = "mla_chosen"
    warpgroups = 3

    def __init__(self, refs, smem, shape: Shape, paged: bool):
        count = 4 if shape.rope else 2
        self.chosen, self.limits = refs[count : count + 2]
        super().__init__([*refs[:count], *refs[count + 2 :]], smem, shape, paged)
        self.pages, self.table = self.table, None
        self.tokens = self.limits.shape[0]
        batch = self.tokens // shape.sharing
        self.row_slots = self.k_hbm.shape[0] // (1 if paged else batch)

    @classmethod
    def scratch(cls, shape: Shape) -> dict[str, Any]:
        """As in `Part`, with words in place of the barriers of the copies."""
        smem = {name: x for name, x in super().scratch(shape).items() if name not in _BARRIERS}
        return smem | {"stat": plgpu.SMEM((7, TILE), jnp.float32)}

    def run(self):
        """Two warpgroups walk the part's steps and merge; the third copies."""

        @pl.when(self.end_step > self.first_step)
        def _():
            self.start()
            wg = lax.axis_index("wg")
            lax.cond(wg == 2, self.produce, lambda: self.consume(wg))

    def consume(self, wg):
        plgpu.set_max_registers(COMPUTING, action="increase")
        lax.cond(wg == 0, lambda: self.begin(0), lambda: self.begin(1))
        self.merge()

    def produce(self):
        """Fills every buffer once for each step, and once more for the scores after the last."""
        plgpu.set_max_registers(COPYING, action="decrease")

        def one_step(step, places):
            for block, buffer in _ORDER:
                self.wait_free(buffer)
                if block is not None:
                    self.store_live(places, block)
                    if self.shape.rope:
                        self.gather(self.kr_hbm, "kr", block, places, block, 0)
                column = buffer % 2 * self.half
                self.gather(self.k_hbm, "k", buffer, places, buffer // 2, column)
            # Loaded while the buffers of this step are in use.
            return self.places(step + 1)

        lax.fori_loop(self.first_step, self.end_step + 1, one_step, self.places(self.first_step))

    # -- what `Part` asks for

    def source(self, row, slot, length, page):
        """Nothing: the third warpgroup knows what comes next."""
        del row, slot, length, page

    def fetch(self, block, h, source):
        """Hands a buffer to the third warpgroup."""
        del source
        self.free(2 * block + h)

    def fetch_rope(self, block, source):
        """Nothing: these buffers are handed over with the first half of the latents."""
        del block, source

    def kill_dead_values(self, ref, live):
        """Nothing: rows that are not there are zeros."""
        del ref, live

    def mask(self, s, block, slot, length):
        """Scores, -inf where a row of the block is not there."""
        del slot, length
        low, high = (self.live(2 * block + i) for i in range(2))

        def masked(s):
            row = plgpu.broadcasted_iota(jnp.int32, (TILE, BLOCK), 1, layout=WG)
            word = jnp.where(row < 32, low, high)
            there = (word >> (row & 31)) & 1
            return jnp.where(there > 0, s, -jnp.inf)

        return lax.cond((low & high) != -1, masked, lambda s: s, s)

    def begin(self, me):
        self.turn = jnp.int32(0)  # how often the buffers of the next scores were filled before
        super().begin(me)

    def begin_step(self, step):
        self.turn = step + 1 - self.first_step
        return super().begin_step(step)

    # -- buffers, between the warpgroups

    def start(self):
        copies.start_barriers(self.stat, min(_BARRIERS.values()), 6, 3 * 128)

    def await_copy(self, barrier, index):
        copies.wait_copied(self.stat, _BARRIERS[barrier] + 2 * index, self.turn)

    def warpgroup_sync(self):
        """Nothing: all threads of a warpgroup say that a buffer is free, not one for all."""

    def free(self, buffer):
        mosaic.named_barrier("arrive", _FREE + buffer)

    def wait_free(self, buffer):
        mosaic.named_barrier("sync", _FREE + buffer)

    def places(self, step):
        """Where the 128 chosen slots of a step lie in the flat cache, -1 for nowhere."""
        row, start, limit = self.step_start(step)
        row = lax.div(row, jnp.int32(self.shape.sharing))
        return copies.listed(self.chosen, self.pages, start, limit, row, self.row_slots)

    def step_start(self, step):
        """The token of a step, where its slots begin, and its limit; 0 past the part's end."""
        more = step < self.end_step
        step = jnp.minimum(step, self.end_step - 1)
        row = lax.div(step, jnp.int32(self.shape.slots // STEP))
        return row, step * STEP, jnp.where(more, self.limits[row], 0)

    def store_live(self, places, block):
        copies.store_live(self.stat, _WORDS + 2 * block, places, block)

    def live(self, word):
        return copies.load_word(self.stat, _WORDS + word)

    def gather(self, source, name, buffer, places, block, column):
        """Fills a buffer with rows of a block, and says when they have arrived."""
        copies.gather(source, self.smem[name], buffer, places, block, column)
        copies.arrive_copied(self.stat, _BARRIERS[f"{name}_bar"] + 2 * buffer)


class InterpretedGatheredPart(interpreted.InterpretedPart, GatheredPart):
    """`GatheredPart` with ordinary barriers, and rows of an array that is loaded whole."""

    @classmethod
    def scratch(cls, shape: Shape) -> dict[str, Any]:
        """Also the barriers that `GatheredPart` has words for."""
        smem = super().scratch(shape) | {
            "k_bar": plgpu.Barrier(num_barriers=4),
            "free": plgpu.Barrier(num_barriers=4),
            "live": plgpu.SMEM((4,), jnp.int32),
        }
        return smem | ({"kr_bar": plgpu.Barrier(num_barriers=2)} if shape.rope else {})

    def start(self):
        pass

    def await_copy(self, barrier, index):
        plgpu.barrier_wait(self.smem[barrier].at[index])

    def free(self, buffer):
        plgpu.barrier_arrive(self.smem["free"].at[buffer])

    def wait_free(self, buffer):
        plgpu.barrier_wait(self.smem["free"].at[buffer])

    def places(self, step):
        row, start, limit = self.step_start(step)
        row = lax.div(row, jnp.int32(self.shape.sharing))
        slot = self.chosen[pl.ds(start, STEP)]
        live = (slot >= 0) & (slot < limit)
        place = row * self.row_slots + slot
        if self.pages is not None:
            pages = self.pages[row, :]
            page = pages[jnp.where(live, slot, 0) // STEP]
            live = live & (page < self.row_slots // STEP)
            place = page * STEP + slot % STEP
        return jnp.where(live, place, -1)

    def places_of(self, places, block):
        """Those of the 64 rows of a block."""
        return places.reshape(4, 2, 16)[:, block].reshape(BLOCK)

    def store_live(self, places, block):
        bits = jnp.where(self.places_of(places, block) < 0, 0, 1).reshape(2, 32)
        words = (bits << lax.broadcasted_iota(jnp.int32, (2, 32), 1)).sum(1)
        for word in range(2):
            self.smem["live"][2 * block + word] = words[word]

    def live(self, word):
        return self.smem["live"][word]

    def gather(self, source, name, buffer, places, block, column):
        target, rows = self.smem[name].at[buffer], self.places_of(places, block)
        values = source[:, pl.ds(column, target.shape[1])][jnp.maximum(rows, 0)]
        target[...] = jnp.where(rows[:, None] < 0, jnp.zeros_like(values), values)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.smem[f"{name}_bar"].at[buffer])
