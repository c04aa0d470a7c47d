"""The decode kernel over latents in fp8 with scales (`cache.scaled`): a third warpgroup makes tiles.

The two warpgroups of `kernel.py` work as they do there, on the same tiles of bfloat16 in shared
memory. What differs is who fills these: not copies that the two start, but a producer, which loads
the bytes of a tile into registers, waits until the tile's buffer is free, and stores them times
their scales (`dequantise.py`). While it waits, the loads are under way; so that they are short, it
asks for the bytes two steps ahead to be brought to the L2 cache. In slots past a row's length it
stores zeros.

    barrier    completes when                                 and then
    k_bar[i]   the producer has filled k[i]                   warpgroup i // 2 makes scores from it
    free[i]    warpgroup i % 2 has read k[i] for the last     the producer fills it again
               time

Of 504 registers that three threads of a multiprocessor share, one of each warpgroup, a thread of
the two takes most.

Letters: B batch, S cache slots, R latent width, P rope width, G groups of 128 channels, M pages of
a row.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper import dequantise, kernel, mosaic
from mla_jax.ops.hopper.kernel import FLAGS, Part, Shape, tiled
from mla_jax.ops.hopper.schedule import BLOCK, STEP, Column

PRODUCER = 2  # its warpgroup
REGISTERS = (208, 88)  # of a thread of the two warpgroups, and of the producer's
# Tiles (block, half) of a step in the order in which the two warpgroups are done with them.
ORDER = ((0, 0), (1, 1), (0, 1), (1, 0))


def decode(operands, schedule, table, shape: Shape, batch: int):
    """As `kernel.decode`; the operands are pattern, q_rope, latent in fp8, k_rope, scale [B S G]."""
    options = launch_options(shape)
    return kernel.launch(ScaledPart, operands, schedule, table, shape, batch, **options)[:2]


def launch_options(shape: Shape) -> dict[str, Any]:
    """As `kernel.launch_options`, with a warpgroup more."""
    return kernel.launch_options(shape) | {"num_threads": 3, "kernel_name": "mla_decode_fp8"}


class Place(NamedTuple):
    """A step of the producer's walk."""

    row: Any
    number: Any  # of the batch row's steps
    end: Any  # the step after the row's last
    length: Any  # of the row; 0 past the part's last step
    page: Any


class ScaledPart(Part):
    """One thread block: its two warpgroups are `Part`'s, with other ways to fill and free tiles."""

    def __init__(self, refs, smem, shape: Shape, paged: bool):
        refs = list(refs)
        self.scale_hbm: Any = refs.pop(4 if shape.rope else 2)
        super().__init__(refs, smem, shape, paged)

    def run(self):
        """As `Part.run`, beside the producer."""

        @pl.when(self.end_step > self.first_step)
        def _():
            wg = lax.axis_index("wg")

            def attend():
                self.take_registers(REGISTERS[0], "increase")
                lax.cond(wg == 0, lambda: self.begin(0), lambda: self.begin(1))
                self.merge()

            def produce():
                self.take_registers(REGISTERS[1], "decrease")
                self.produce()

            lax.cond(wg == PRODUCER, produce, attend)

    def fetch(self, block, h, source):
        """Frees a tile, for the producer to fill with what comes next."""
        del source
        self.free(2 * block + h)

    def fetch_rope(self, block, source):
        """Nothing: the producer knows by a freed tile that the block's rotary keys are read too."""

    def source(self, row, slot, length, page):
        """Nothing that is used: the two need not know where their slots lie."""
        return jnp.int32(0)

    def page(self, row, slot):
        """None, for the same reason."""

    def page_after(self, *place):
        """None, for the same reason."""

    def renew_q(self, qr, new_q, row):
        """As `Part.renew_q`; the rotary queries are loaded anew for every step."""
        del qr

        @pl.when(new_q)
        def _():
            plgpu.barrier_wait(self.smem["q_bar"])

        return self.load_q_rope(row)

    def kill_dead_values(self, ref, live):
        """Nothing: the producer has stored zeros there."""

    def produce(self):
        """Fills the tiles of every step of this part."""
        of_part = lambda column: self.parts[self.part, column] + 0  # noqa: E731
        row, begin = of_part(Column.FIRST_ROW), of_part(Column.FIRST_ROW_STEP)
        length, self.end_row = of_part(Column.FIRST_ROW_LENGTH), of_part(Column.LAST_ROW)
        number = self.first_step - begin
        end = self.row_step[row + 1] + 0
        here = Place(row, number, end, length, super().page(row, number * STEP))
        held = self.load(here, ORDER[0])
        then = self.place_after(self.first_step, here)
        self.prefetch(then)
        last = self.place_after(self.first_step + 1, then)

        def one_step(g, carry):
            here, then, last, held = carry
            self.prefetch(last)
            ahead = [(here, tile) for tile in ORDER[1:]] + [(then, ORDER[0])]
            for (block, h), (place, tile) in zip(ORDER, ahead, strict=True):
                self.wait_free(2 * block + h)
                if block == h:  # the first of a block's two
                    self.fetch_block_rope(block, here)
                held = self.turn(2 * block + h, held, place, tile)
                self.fence()
                self.filled(2 * block + h)
            return then, last, self.place_after(g + 2, last), held

        carry = lax.fori_loop(self.first_step, self.end_step, one_step, (here, then, last, held))
        # The two ask for one step more, whose scores nobody uses.
        for block, h in ORDER:
            self.wait_free(2 * block + h)
            if block == h:
                self.fetch_block_rope(block, carry[0])
            self.filled(2 * block + h)

    def fetch_block_rope(self, block, place):
        """Copies the rotary keys of a block of a step; zeros where none of its slots is in use."""
        source, live = self.extent(place)
        past = self.k_hbm.shape[0]
        super().fetch_rope(block, jnp.where(live > block * BLOCK, source + block * BLOCK, past))

    def place_after(self, g, place: Place) -> Place:
        """The place of step g + 1, after that of step g."""
        over = g + 1 >= place.end
        row = jnp.where(over, jnp.minimum(place.row + 1, self.end_row), place.row)
        number = jnp.where(over, 0, place.number + 1)
        length = jnp.where(g + 1 < self.end_step, self.lengths[row], 0)
        end = self.row_step[row + 1] + 0
        return Place(row, number, end, length, super().page(row, number * STEP))

    def extent(self, place: Place):
        """Where a step begins in the flat cache, and how many of its slots are in use."""
        row, number, _, length, page = place
        slot = number * STEP
        return row * self.shape.slots + slot if page is None else page * STEP, length - slot

    # -- what the interpreter has other ways for

    def load(self, place, tile):
        (source, live), (block, h) = self.extent(place), tile
        at = source + block * BLOCK, live - block * BLOCK
        return dequantise.load(self.k_hbm, self.scale_hbm, *at, h, self.half)

    def turn(self, buffer, held, place, tile):
        """Stores a tile that is loaded, and loads another."""
        (source, live), (block, h) = self.extent(place), tile
        at = source + block * BLOCK, live - block * BLOCK
        operands = self.k_hbm, self.scale_hbm, *at, h
        transforms = tiled((BLOCK, self.half), self.dtype).transforms
        return dequantise.turn(self.k.at[buffer], *held, buffer % 2, *operands, transforms)

    def prefetch(self, place):
        rope = self.kr_hbm if self.shape.rope else None
        dequantise.prefetch(self.k_hbm, self.scale_hbm, rope, *self.extent(place), STEP)

    def take_registers(self, count, action):
        plgpu.set_max_registers(count, action=action)

    def free(self, buffer):
        mosaic.named_barrier("arrive", 5 + len(FLAGS) + buffer)

    def wait_free(self, buffer):
        mosaic.named_barrier("sync", 5 + len(FLAGS) + buffer)

    def filled(self, buffer):
        plgpu.barrier_arrive(self.smem["k_bar"].at[buffer])
