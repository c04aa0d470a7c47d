"""The decode kernel over latents in fp8 with scales: a third warpgroup makes the tiles.

The two warpgroups of `kernel.py` work as they do there, on the same tiles of bfloat16 in shared
memory, and start the same copies as soon as a tile has been read for the last time. What differs
is that a copy brings bytes (`cache.scaled`), half as many as the tile has room for. They come to
lie in the tile's upper half, where a third warpgroup, the producer, turns them into bfloat16
(`dequantise.py`). So the bytes of up to four tiles are under way at once and need no memory of
their own.

    barrier      completes when                                 and then
    raw_bar[i]   the bytes of k[i] have come                    the producer turns them
    k_bar[i]     the producer has turned them                   warpgroup i // 2 makes scores

In slots past a row's length the producer stores zeros. Of 504 registers that three threads of a
multiprocessor share, one of each warpgroup, a thread of the two takes most.

Letters: B batch, S cache slots, R latent width, P rope width, C groups of 128 channels, M pages of
a row.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper import dequantise, kernel
from mla_jax.ops.hopper.kernel import Shape
from mla_jax.ops.hopper.places import WalkingPart
from mla_jax.ops.hopper.schedule import BLOCK

PRODUCER = 2  # its warpgroup
REGISTERS = (216, 72)  # of a thread of the two warpgroups, and of the producer's
# Tiles (block, half) of a step in the order in which the two warpgroups are done with them.
ORDER = ((0, 0), (1, 1), (0, 1), (1, 0))
AHEAD = 2  # tiles by which scales are loaded ahead of their use


def decode(operands, schedule, table, shape: Shape, batch: int):
    """As `kernel.decode`, of pattern, q_rope, latent in fp8, k_rope and its scales [B S, C]."""
    options = kernel.launch_options(shape)
    return kernel.launch(ScaledPart, operands, schedule, table, shape, batch, **options)[:2]


def raw_tiles(half: int):
    """Two places for the bytes of every tile [64, R/2], of which the second is used."""
    width = dequantise.swizzle(half)
    transforms = plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width)
    return plgpu.SMEM((4, 2, BLOCK, half), jnp.float8_e4m3fn, transforms=transforms)


class ScaledPart(WalkingPart):
    """One thread block: its two warpgroups are `Part`'s, which here copy bytes."""

    name = "mla_decode_fp8"
    warpgroups = 3

    def __init__(self, refs, smem, shape: Shape, paged: bool):
        refs = list(refs)
        self.scale_hbm: Any = refs.pop(4 if shape.rope else 2)
        k, self.raw = self.views(smem)
        super().__init__(refs, smem | {"k": k}, shape, paged)

    @classmethod
    def scratch(cls, shape: Shape) -> dict[str, Any]:
        """As `Part.scratch`; tiles may be seen as bytes, and have barriers for these."""
        smem = super().scratch(shape)
        smem["k"] = plgpu.RefUnion(smem["k"], raw_tiles(shape.rank // 2))
        return smem | {"raw_bar": plgpu.Barrier(num_barriers=4)}

    def views(self, smem):
        """The tiles, and what the bytes of each are copied to."""
        k, raw = smem["k"]
        return k, raw.at[:, 1]

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
        """As `Part.fetch`, of bytes."""
        columns = pl.ds(h * self.half, self.half)
        buffer = 2 * block + h
        plgpu.copy_gmem_to_smem(
            self.k_hbm.at[pl.ds(source, BLOCK), columns],
            self.raw.at[buffer],
            self.smem["raw_bar"].at[buffer],
        )

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
        """Turns the tiles of every step of this part."""
        here = self.first_place()
        held = tuple(self.load_scales(here, tile) for tile in ORDER[:AHEAD])

        def one_step(g, carry):
            here, held = carry
            then = self.place_after(g, here)
            places = [(here, tile) for tile in ORDER] + [(then, tile) for tile in ORDER]
            for n, (block, h) in enumerate(ORDER):
                coming = self.load_scales(*places[n + AHEAD])
                buffer = 2 * block + h
                plgpu.barrier_wait(self.smem["raw_bar"].at[buffer])
                self.turn(buffer, held[0], here)
                self.fence()
                plgpu.barrier_arrive(self.smem["k_bar"].at[buffer])
                held = (*held[1:], coming)
            return then, held

        lax.fori_loop(self.first_step, self.end_step, one_step, (here, held))
        # The two ask for one step more, whose scores nobody uses.
        for block, h in ORDER:
            plgpu.barrier_wait(self.smem["raw_bar"].at[2 * block + h])
            plgpu.barrier_arrive(self.smem["k_bar"].at[2 * block + h])

    # -- what the interpreter has other ways for

    def load_scales(self, place, tile):
        block, h = tile
        return dequantise.load_scales(self.scale_hbm, *self.extent(place, block), h, self.half)

    def turn(self, buffer, scales, place):
        """Turns the bytes of a tile that have come."""
        del place
        transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)  # of `tiled`
        dequantise.turn(self.k.at[buffer], scales, buffer % 2, transforms)

    def take_registers(self, count, action):
        plgpu.set_max_registers(count, action=action)
