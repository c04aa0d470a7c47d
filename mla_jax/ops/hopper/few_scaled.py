"""The decode kernel of few query rows over latents in fp8: bytes become left sides in registers.

The algorithm is that of `few.py`. A warpgroup loads the bytes of its block from shared memory into
registers and turns them into bfloat16 there (`fragments.py`), once as keys and once as values. So
no tile of bfloat16 is ever stored: a block of 64 slots costs shared memory 40 KiB of writes and 72
of reads, where `scaled.py` takes 350. What bounds it is the arithmetic of turning, 8 instructions
for two numbers.

Shared memory (KiB) where it differs from `few.py`; a warpgroup has two buffers of bytes:

    name   KiB  shape               holds
    k      128  4 [64, 512] e4m3    latents of blocks; k[2 w + i] is buffer i of warpgroup w
    kr      32  4 [64, 64]          rotary keys of the same blocks
    p        4  2 [64, 16]          softmax weights of warpgroup w
    factor   1  2 [4, 64]           scales as `fragments.factors` makes them

Letters: B batch, S cache slots.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper import columns, fragments, kernel
from mla_jax.ops.hopper.columns import RANK, WIDTH
from mla_jax.ops.hopper.few import PIECES, FewPart
from mla_jax.ops.hopper.kernel import Shape, tiled
from mla_jax.ops.hopper.schedule import BLOCK


def decode(operands, schedule, table, shape: Shape, batch: int):
    """As `scaled.decode`, of queries in the order of `fragments`, 16 rows of each batch row."""
    options = kernel.launch_options(shape)
    return kernel.launch(FewScaledPart, operands, schedule, table, shape, batch, **options)[:2]


class FewScaledPart(FewPart):
    """One thread block: part `part` of the batch."""

    name = "mla_decode_few_fp8"
    depth = 2
    small = fragments.SMALL

    def __init__(self, refs, smem, shape: Shape, paged: bool):
        refs = list(refs)
        self.scale_hbm: Any = refs.pop(4)
        super().__init__(refs, smem, shape, paged)

    @classmethod
    def scratch(cls, shape: Shape) -> dict[str, Any]:
        """As `FewPart.scratch`, of the table above."""
        return super().scratch(shape) | {
            "k": plgpu.SMEM((4, BLOCK, RANK), jnp.float8_e4m3fn, transforms=fragments.BYTES),
            "p": tiled((2, BLOCK, WIDTH), shape.dtype),
            "factor": plgpu.SMEM((2, fragments.GROUPS, BLOCK), shape.dtype),
        }

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

    def add_values(self, me, acc, o, buffer, here):
        """Adds a block's values, weighted."""
        held = self.load_values(buffer, 0)
        self.warpgroup_sync()
        for j in range(BLOCK // 16):
            coming = self.load_values(buffer, j + 1) if j + 1 < BLOCK // 16 else None
            values = self.turn_values(held, j, here, me)
            self.mma(acc, values, self.p.at[o + me, pl.ds(16 * j, 16)])
            self.retire(1)
            held = coming

    def slot_of_row(self, row):
        """The slot of a block that is row `row` of its scores."""
        return fragments.slot_of_row(row)

    # -- what the interpreter has other ways for

    def load_ahead(self, place, me):
        """The scales of a block."""
        return fragments.load_scales(self.scale_hbm, *self.extent(place, me))

    def factors(self, held, me):
        return fragments.factors(held, self.smem["factor"].at[me])

    def put_weights(self, ref, p):
        ref[...] = p

    def put(self, ref, value):
        columns.put(ref, value, fragments.places)

    def take(self, ref):
        return columns.take(ref, fragments.places)

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
