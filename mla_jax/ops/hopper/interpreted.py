"""The decode kernel for Pallas's interpreter, which lacks what `mosaic.py` adds to Pallas.

`InterpretedPart` overrides what the algorithm in `kernel.py` asks of the hardware: accumulators lie
in shared memory, the left side of a product is stored there first, and the warpgroups wait for each
other at ordinary barriers. The interpreter runs one thread block after the other, so that the merge
of shared rows is a kernel of its own.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.cache.scaled import GROUP
from mla_jax.ops.hopper import columns, few, few_scaled, fragments, scaled
from mla_jax.ops.hopper.kernel import FLAGS, WG, Part, Shape, launch, launch_options, tiled
from mla_jax.ops.hopper.merge import like, merge
from mla_jax.ops.hopper.schedule import BLOCK, STEP, TILE, Column


def decode(operands, schedule, table, shape: Shape, batch: int, part: Any, interpret: Any):
    """The kernel of a class of parts, in the interpreter with these parameters."""
    options = launch_options(shape) | {"interpret": interpret}
    if part in (InterpretedScaledPart, InterpretedFewScaledPart):
        # The last block of a row may end past the cache: no load here takes part of a block's
        # scales.
        *operands, scales = operands
        operands.append(jnp.pad(scales, ((0, STEP), (0, 0))))
    results = launch(part, operands, schedule, table, shape, batch, **options)
    return _merged(results, schedule, shape, options)


def _merged(results, schedule, shape, options):
    """Results with the rows that several parts share, merged from their pieces."""
    out, lse, part_out, part_lse = results

    def body(*refs):
        names = ("part_out", "part_lse", "row_parts", "part", "out", "lse")
        named = dict(zip(names, refs, strict=True))
        part, tile, wg = (lax.axis_index(name) for name in ("part", "tile", "wg"))
        first_step, end_step = (
            named["part"][part, column] for column in (Column.FIRST_STEP, Column.END_STEP)
        )
        pl.when(end_step > first_step)(lambda: merge(part, tile, wg, named, shape))

    results = [like(x, x.shape, x.dtype) for x in (out, lse)]
    merged = plgpu.kernel(body, out_type=results, num_threads=2, **options)(
        part_out, part_lse, schedule.row_parts, schedule.part
    )
    first, last = schedule.row_parts
    split = jnp.repeat(first < last, shape.rows, total_repeat_length=out.shape[0])
    return jnp.where(split[:, None], merged[0], out), jnp.where(split, merged[1], lse)


class InterpretedPart(Part):
    """`Part` with what the interpreter has in place of registers and named barriers."""

    @classmethod
    def scratch(cls, shape: Shape) -> dict[str, Any]:
        """Also the accumulators, the left sides of products, and the barriers."""
        smem = super().scratch(shape) | {
            "o_acc": plgpu.SMEM((2, TILE, shape.rank // 2), jnp.float32),
            "s_acc": plgpu.SMEM((2, TILE, BLOCK), jnp.float32),
            "flags": plgpu.Barrier(num_barriers=len(FLAGS)),
            "meet": plgpu.Barrier(num_barriers=4),  # two meetings, at which each has one
            "park_p": tiled((2, TILE, BLOCK), shape.dtype),
        }
        if shape.rope:
            smem["park_qr"] = tiled((2, TILE, shape.rope), shape.dtype)
        return smem

    def begin(self, me):
        self.walk(me, self.smem["o_acc"].at[me])

    def new_scores(self, me, body):
        self.clear(self.smem["s_acc"].at[me], BLOCK)
        return body(self.smem["s_acc"].at[me])

    def begin_step(self, step):
        del step
        return jnp.int32(0)

    def mma(self, acc, a, b, park=None):
        if park is not None:
            name, index = park
            parked = self.smem[name].at[index]
            parked[...] = a
            plgpu.commit_smem()
            a = parked

        def product(fresh):
            plgpu.wgmma(fresh, a, b)
            return fresh[...]

        acc[...] = acc[...] + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))

    def current(self, acc):
        return acc[...]

    def clear(self, acc, width):
        acc[...] = jnp.zeros((TILE, width), jnp.float32)

    def retire(self, in_flight):
        pass

    def partial_sums(self, p):
        return p.reshape(TILE, 8, -1).sum(2)

    def load_tile(self, ref, start):
        return plgpu.load(ref.at[pl.ds(start, TILE)], layout=WG, optimized=False)

    def store(self, ref, value, row, column, count):
        # Whole tiles: rows are padded to them, because no store here takes part of one.
        del count
        if value.ndim == 2:
            ref[pl.ds(row, TILE), pl.ds(column, value.shape[1])] = value
        else:
            ref[pl.ds(row, TILE)] = value

    def arrive(self, flag):
        plgpu.barrier_arrive(self.smem["flags"].at[FLAGS.index(flag)])

    def wait(self, flag):
        plgpu.barrier_wait(self.smem["flags"].at[FLAGS.index(flag)])

    def meet(self, me, which):
        plgpu.barrier_arrive(self.smem["meet"].at[2 * which + me])
        plgpu.barrier_wait(self.smem["meet"].at[2 * which + 1 - me])

    def fence(self):
        plgpu.commit_smem()

    def warpgroup_sync(self):
        pass

    def announce(self, counter):
        pass

    def merge(self):
        pass


class InterpretedScaledPart(InterpretedPart, scaled.ScaledPart):
    """`ScaledPart` with memory of its own for bytes, and loads of scales where they are used."""

    @classmethod
    def scratch(cls, shape: Shape) -> dict[str, Any]:
        """Tiles, and their bytes apart from them."""
        raw = scaled.raw_tiles(shape.rank // 2)
        tiles = tiled((4, BLOCK, shape.rank // 2), shape.dtype)
        return super().scratch(shape) | {"k": tiles, "raw": raw}

    def views(self, smem):
        return smem["k"], smem["raw"].at[:, 1]

    def load_scales(self, place, tile):
        return ()

    def turn(self, buffer, scales, place):
        block, h = divmod(buffer, 2)
        start, live = self.extent(place, block)
        channel = h * self.half + lax.broadcasted_iota(jnp.int32, (BLOCK, self.half), 1)
        scales = self.scale_hbm[pl.ds(jnp.where(live > 0, start, 0), BLOCK), :]
        chosen = jnp.zeros(channel.shape, jnp.float32)
        for group in range(scales.shape[1]):
            chosen = jnp.where(channel // GROUP == group, scales[:, group : group + 1], chosen)
        value = self.raw[buffer].astype(jnp.float32) * chosen
        slot = lax.broadcasted_iota(jnp.int32, value.shape, 0)
        self.k[buffer] = jnp.where(slot < live, value, 0).astype(self.dtype)

    def take_registers(self, count, action):
        pass


class InterpretedFewPart(few.FewPart):
    """`FewPart` with plain arrays for what it has in registers."""

    @classmethod
    def scratch(cls, shape: Shape) -> dict[str, Any]:
        """Also the accumulators and the barriers of the meetings."""
        f32 = jnp.float32
        return super().scratch(shape) | {
            "given": plgpu.SMEM((columns.WIDTH, columns.RANK), f32),
            "o_acc": plgpu.SMEM((2, columns.RANK, columns.WIDTH), f32),
            "s_acc": plgpu.SMEM((2, BLOCK, columns.WIDTH), f32),
            "meet": plgpu.Barrier(num_barriers=4),
        }

    begin = InterpretedPart.begin
    begin_step = InterpretedPart.begin_step
    current = InterpretedPart.current
    retire = InterpretedPart.retire
    meet = InterpretedPart.meet
    fence = InterpretedPart.fence
    warpgroup_sync = InterpretedPart.warpgroup_sync
    announce = InterpretedPart.announce
    merge = InterpretedPart.merge

    def rows(self):
        return self.smem["given"], None

    def new_scores(self, me, body):
        self.smem["s_acc"][me] = self.zeros(BLOCK)
        return body(self.smem["s_acc"].at[me])

    def mma(self, acc, a, b, park=None):
        del park
        left, right = a[...].astype(jnp.float32), b[...].astype(jnp.float32)
        acc[...] = acc[...] + jnp.dot(left, right)

    def put_weights(self, ref, p):
        ref[...] = p.T

    def clear_slots(self, ref, live):
        slot = lax.broadcasted_iota(jnp.int32, ref.shape, 0)
        ref[...] = jnp.where(slot < live, ref[...], 0)

    def reduce(self, x, me, kind):
        return x.max(0) if kind == "max" else x.sum(0)

    def put(self, ref, value):
        ref[...] = self.channels(value)

    def take(self, ref):
        return self.values(ref[...])

    def channels(self, value):
        """O^T as rows of channels."""
        return value.T

    def values(self, rows):
        """Rows of channels as O^T."""
        return rows.T

    def store_columns(self, ref, value, target, row):
        target[pl.ds(row, columns.WIDTH), :] = self.channels(value)

    def store_heads(self, ref, value, row, count):
        ref[pl.ds(row, columns.WIDTH)] = value


class InterpretedFewScaledPart(InterpretedFewPart, few_scaled.FewScaledPart):
    """`FewScaledPart` with plain arrays for what it has in registers, and queries as they come."""

    @classmethod
    def scratch(cls, shape: Shape) -> dict[str, Any]:
        """With one way to see queries."""
        return super().scratch(shape) | {
            "q": tiled((few.PIECES + 1, columns.WIDTH, 64), shape.dtype)
        }

    def views(self, smem):
        return smem["q"], smem["q"]

    def clear_largest(self, me):
        pass

    def turn_queries(self, me):
        return 2.0**-self.headroom

    def load_ahead(self, place, me):
        return ()

    def factors(self, held, here, me):
        return (), fragments.order_slots(self.scales(here, me)[1])[:, 0]

    def put_weights(self, ref, p):
        ref[...] = p

    def load_keys(self, buffer, group):
        return buffer

    def turn_keys(self, held, factors, group, n, here, me):
        keys = fragments.order_slots(self.turned(held, here, me))
        return keys[:, 128 * group + 64 * n :][:, :64]

    def load_rope(self, buffer, largest):
        rope = fragments.order_slots(self.smem["kr"][buffer]).astype(jnp.float32)
        return (rope * (2.0**self.headroom / largest)[:, None]).astype(self.dtype)

    def load_values(self, buffer, j):
        return buffer

    def turn_values(self, held, j, here, me):
        return fragments.order_values(self.turned(held, here, me))[:, 16 * j : 16 * j + 16]

    def scales(self, here, me):
        """Of a block's slots, zeros where none is in use; and the largest of each, [64, 1]."""
        start, live = self.extent(here, me)
        scales = self.scale_hbm[pl.ds(jnp.where(live > 0, start, 0), BLOCK), :]
        scales = jnp.where(lax.broadcasted_iota(jnp.int32, scales.shape, 0) < live, scales, 0)
        return scales, jnp.clip(scales.max(1, keepdims=True), fragments.LEAST, fragments.MOST)

    def turned(self, buffer, here, me):
        """The numbers of a block, relative to its slots' largest scales."""
        scales, largest = self.scales(here, me)
        factor = (scales * (2.0**self.headroom / largest))[..., None]
        value = self.k[buffer].astype(jnp.float32).reshape(BLOCK, -1, GROUP) * factor
        return value.astype(fragments.TURNED).reshape(BLOCK, -1)

    def channels(self, value):
        return fragments.channels_of_values(value)

    def values(self, rows):
        return fragments.values_of_channels(rows)


PARTS = {  # by the file of what each stands for
    "kernel": InterpretedPart,
    "scaled": InterpretedScaledPart,
    "few": InterpretedFewPart,
    "few_scaled": InterpretedFewScaledPart,
}
