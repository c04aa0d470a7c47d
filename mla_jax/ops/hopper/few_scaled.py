"""The decode kernel of few query rows over latents in fp8: bytes become left sides in registers.

The algorithm is that of `few.py`. A warpgroup loads the bytes of its block from shared memory into
registers and turns them into float16 there (`fragments.py`), once as keys and once as values. So no
tile of 16-bit numbers is ever stored: a block of 64 slots costs shared memory 40 KiB of writes and
72 of reads, where `scaled.py` takes 350.

Float16 has few exponents, but the device makes it of e4m3 by one instruction for two numbers. So a
slot's numbers are relative to the largest of its scales, which scores and weights make up for:

    K'[s] = 2^7 K[s] / r[s]      r[s] is the largest scale of slot s, a power of two
    Q'    = 2^k Q                one k for all queries of a row, see `queries.py`
    u[s]  = log2(e) scale S[s] + log2(r[s])       S' = K' Q'^T = 2^(7+k) S / r
    P'[s] = 2^(14 + u[s] - max u)                 what K'[s] as values is multiplied with
    out   = 2^-7 sum(P' K') / sum(P' / r)

Numbers are exact where a group's scale is not below 2^-22 of its slot's largest.

Shared memory (KiB) where it differs from `few.py`; a warpgroup has two buffers of bytes:

    name     KiB  shape               holds
    k        128  4 [64, 512] e4m3    latents of blocks; k[2 w + i] is buffer i of warpgroup w
    kr        32  4 [64, 64]          rotary keys of the same blocks
    p          4  2 [64, 16]          softmax weights of warpgroup w
    factor     1  2 [4, 64]           what `fragments.factors` makes of scales
    largest       [1] int32           the bits of the row's largest query

Letters: B batch, S cache slots.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper import columns, fragments, kernel, queries
from mla_jax.ops.hopper.columns import RANK, WIDTH
from mla_jax.ops.hopper.few import PIECES, FewPart, over
from mla_jax.ops.hopper.fragments import TURNED
from mla_jax.ops.hopper.kernel import Shape, tiled
from mla_jax.ops.hopper.schedule import BLOCK


def decode(operands, schedule, table, shape: Shape, batch: int):
    """As `scaled.decode`, of 16 query rows of each batch row."""
    options = kernel.launch_options(shape)
    return kernel.launch(FewScaledPart, operands, schedule, table, shape, batch, **options)[:2]


def _across(values):
    """[64] to [64, 16], free in registers."""
    return lax.broadcast_in_dim(values, (BLOCK, WIDTH), [0])


class FewScaledPart(FewPart):
    """One thread block: part `part` of the batch."""

    name = "mla_decode_few_fp8"
    depth = 2
    headroom, raised = fragments.HEADROOM, fragments.RAISED

    def __init__(self, refs, smem, shape: Shape, paged: bool):
        refs = list(refs)
        self.scale_hbm: Any = refs.pop(4)
        q, self.turned_q = self.views(smem)
        super().__init__(refs, smem | {"q": q}, shape, paged)

    @classmethod
    def scratch(cls, shape: Shape) -> dict[str, Any]:
        """As `FewPart.scratch`, of the table above."""
        queries = (tiled((PIECES + 1, WIDTH, 64), kind) for kind in (shape.dtype, TURNED))
        return super().scratch(shape) | {
            "k": plgpu.SMEM((4, BLOCK, RANK), jnp.float8_e4m3fn, transforms=fragments.BYTES),
            "q": plgpu.RefUnion(*queries),
            "p": tiled((2, BLOCK, WIDTH), TURNED),
            "factor": plgpu.SMEM((2, fragments.GROUPS, BLOCK), TURNED),
            "largest": plgpu.SMEM((1,), jnp.int32),
        }

    def begin(self, me):
        self.clear_largest(me)
        super().begin(me)

    def one_block(self, me, acc, buffer, here, held, scale2, m, total):
        """As `FewPart.one_block`, in the units above."""
        factors, largest = self.factors(held, here, me)
        plgpu.barrier_wait(self.smem["k_bar"].at[buffer])
        _, live = self.extent(here, me)
        pl.when((live > 0) & (live < BLOCK))(lambda: self.clear_slots(self.k.at[buffer], live))
        o = self.begin_step(here.number)
        make = lambda a: self.turned_scores(a, o, buffer, here, factors, largest, me)  # noqa: E731
        s = self.new_scores(me, make)
        u = s * _across(largest * scale2) + _across(jnp.log2(largest))
        u = self.mask_rows(u, here, me)
        m_new = jnp.maximum(m, self.reduce(u, me, "max"))
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(u - over(m_new - self.raised, BLOCK))
        self.store_weights(me, p)
        total = total * over(alpha, BLOCK) + p * _across(1 / largest)
        acc[...] = self.current(acc) * over(alpha, RANK)
        self.add_values(me, acc, o, buffer, here)
        self.retire(0)
        return m_new, total

    def turned_scores(self, acc, o, buffer, here, factors, largest, me):
        """The scores of a block, relative to its slots' largest scales."""
        held = self.load_keys(buffer, 0)
        self.mma(acc, self.load_rope(buffer, largest), self.q.at[o + PIECES].T)
        for group in range(fragments.GROUPS):
            coming = self.load_keys(buffer, group + 1) if group + 1 < fragments.GROUPS else None
            for n in range(2):
                keys = self.turn_keys(held, factors, group, n, here, me)
                self.mma(acc, keys, self.turned_q.at[o + (2 * group + n)].T)
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

    def views(self, smem):
        """Queries as they come, and as they are multiplied."""
        return smem["q"]

    def clear_largest(self, me):
        pl.when(me == 0)(lambda: queries.clear(self.smem["largest"]))

    def turn_queries(self, me):
        largest = self.smem["largest"]
        self.meet(me, 0)  # the largest of the row before is cleared
        queries.find_largest(self.q, largest)
        self.meet(me, 1)
        inverse = queries.turn(self.q, largest)
        self.fence()
        self.meet(me, 0)  # neither needs the largest any more
        self.clear_largest(me)
        return inverse * 2.0**-self.headroom

    def clear_slots(self, ref, live):
        columns.clear_slots(ref, live)
        self.warpgroup_sync()

    def load_ahead(self, place, me):
        """The scales of a block."""
        return fragments.load_scales(self.scale_hbm, *self.extent(place, me))

    def factors(self, held, here, me):
        del here
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

    def load_rope(self, buffer, largest):
        return fragments.load_rope(self.smem["kr"].at[buffer], largest)

    def load_values(self, buffer, j):
        return fragments.load_values(self.k.at[buffer], j)

    def turn_values(self, held, j, here, me):
        del here
        return fragments.turn_values(held, self.smem["factor"].at[me], j)
