"""What the attention kernels share: rings of tiles in shared memory, accumulators, masks, the walk.

A thread block is two warpgroups that compute and one that copies. It walks its share of the tiles,
heavy and light ones in turn, and the copies of a tile begin while the one before is still computed.

Letters: B batch, T query tokens, S slots, N heads.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops import guard
from mla_jax.ops.hopper import mosaic
from mla_jax.ops.hopper.attention.plan import ROWS, padded
from mla_jax.ops.hopper.merge import LOG2E

WG = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)
SHARED_MEMORY = 227 * 1024
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24  # 2 x 240 + 24 = 504, all that three can have


class Shape(NamedTuple):
    """What a kernel is compiled for; T and S are multiples of 8."""

    batch: int
    tokens: int
    slots: int
    heads: int
    parts: tuple[int, ...]  # widths of a key's parts: per head, and shared (the last, if two)
    shared: bool  # whether the last part is shared by the heads
    value: int
    scale: float
    dtype: Any
    segments: bool
    cores: int
    native: bool

    @property
    def key(self) -> int:
        """Width of a key, H + P."""
        return sum(self.parts)


def tiled(shape, dtype):
    """Shared memory in the swizzled layout of matrix operands; last axis a multiple of 32."""
    size = tile_columns(shape[-1])
    tiling, swizzle = plgpu.TilingTransform((8, size)), plgpu.SwizzleTransform(2 * size)
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def tiles(rows, widths, dtype):
    """Buffers of a ring that hold matrix operands of these widths."""
    return [lambda stages, w=width: tiled((stages, rows, w), dtype) for width in widths]


def vectors(count, size, dtype=jnp.int32):
    """Buffers of a ring that hold `count` vectors."""
    return [lambda stages: plgpu.SMEM((stages, size), dtype)] * int(count)


def tile_columns(width: int) -> int:
    """Columns of a swizzled tile of shared memory."""
    return 64 if width % 64 == 0 else 32


class Ring:
    """Tiles in flight between the copying warpgroup and those that compute.

    `index` counts the tiles of a ring; slot index % stages holds it.
    """

    def __init__(self, name, smem, stages: int):
        self.buffers = [smem[f"{name}{i}"] for i in range(len(smem)) if f"{name}{i}" in smem]
        self.full, self.free, self.stages = smem[f"{name}_full"], smem[f"{name}_free"], stages

    @staticmethod
    def scratch(name, buffers, stages: int, consumers: int) -> dict[str, Any]:
        """The scratch of a ring; `buffers` are functions of the number of stages."""
        smem = {f"{name}{i}": make(stages) for i, make in enumerate(buffers)}
        return smem | {
            f"{name}_full": plgpu.Barrier(num_arrivals=len(buffers), num_barriers=stages),
            f"{name}_free": plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        }

    def slot(self, index):
        return lax.rem(index, jnp.int32(self.stages)) if self.stages > 1 else jnp.int32(0)

    def fill(self, index, sources):
        """Copies into the next slot once its last tile has been used."""
        slot = self.slot(index)

        @pl.when(index >= self.stages)
        def _():
            plgpu.barrier_wait(self.free.at[slot])

        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.full.at[slot])

    def drain(self, index):
        """Waits until all tiles have been used."""
        for back in range(1, self.stages + 1):

            @pl.when(index >= back)
            def _(back=back):
                plgpu.barrier_wait(self.free.at[self.slot(index - back)])

    def wait(self, index):
        slot = self.slot(index)
        plgpu.barrier_wait(self.full.at[slot])
        return [buffer.at[slot] for buffer in self.buffers]

    def release(self, index):
        plgpu.barrier_arrive(self.free.at[self.slot(index)])


class Walk:
    """Base of the kernels: one thread block and its way through the tiles.

    A subclass has `count(shape)` (tiles of a head and batch row), `heavy_last` (which end of them
    is the longer one), `produce()`, run by the copying warpgroup, and `consume(wg)`, run by the
    others.
    """

    heavy_last: bool
    copies = True  # whether there is a warpgroup that only copies
    q: Ring
    k: Ring
    v: Ring
    size: int

    def __init__(self, refs: dict[str, Any], smem: dict[str, Any], shape: Shape):
        self.refs, self.smem, self.shape, self.native = refs, smem, shape, shape.native
        self.tiles = self.count(shape)
        self.scale2 = shape.scale * LOG2E  # softmax in base 2

    @staticmethod
    def count(shape: Shape) -> int:
        raise NotImplementedError

    def run(self):
        wg = lax.axis_index("wg")
        if not self.copies:
            self.consume(wg)
            return

        def consume():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            self.consume(wg)

        def produce():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            self.produce()

        lax.cond(wg < 2, consume, produce)

    def consume(self, wg):
        raise NotImplementedError

    def produce(self):
        raise NotImplementedError

    # -- the way through the tiles

    def each_item(self, body, carry):
        """body(round, (batch row, head, tile), range, carry) for the tiles of this thread block.

        Every other round goes backwards through the thread blocks: tiles of a head grow.
        """
        shape = self.shape
        items = shape.batch * shape.heads * self.tiles
        blocks = thread_blocks(shape, self.tiles)
        block = lax.axis_index("block")
        back = blocks - 1 - block
        last = back if (items // blocks) % 2 else block
        rounds = items // blocks + (last < items % blocks).astype(jnp.int32)

        def one(k, carry):
            item = k * blocks + jnp.where(k % 2 == 1, back, block)
            tile = lax.rem(item, jnp.int32(self.tiles))
            if self.heavy_last:
                tile = self.tiles - 1 - tile
            item = lax.div(item, jnp.int32(self.tiles))
            row, head = lax.div(item, jnp.int32(shape.heads)), lax.rem(item, jnp.int32(shape.heads))
            return body(k, (row, head, tile), self.range(row, tile), carry)

        return lax.fori_loop(0, rounds, one, carry)

    def range(self, row, tile):
        """first, open, close, last and the live slots of a tile."""
        ranges = self.refs["ranges"]
        row = row if ranges.shape[0] > 1 else 0
        return tuple(ranges[row, tile, i] + 0 for i in range(5))

    def keys(self, row, head, start, size):
        """Where a block of keys lies: per head, and shared."""
        count = len(self.shape.parts)
        slots = [self.refs[f"k{i}"].at[row, pl.ds(start, size)] for i in range(count)]
        of_heads = count - self.shape.shared
        return [x.at[:, head] if i < of_heads else x for i, x in enumerate(slots)]

    def of_head(self, names, row, head, start, size):
        return [self.refs[name].at[row, pl.ds(start, size), head] for name in names]

    def produce_blocks(self, names):
        """Copies `names` of each tile's queries, and the blocks of slots that they see."""

        def one(k, place, ranges, carry):
            (row, head, tile), (first, _, _, last, _) = place, ranges
            for wg in range(2):
                at = tile * 2 * ROWS + wg * ROWS
                self.q.fill(2 * k + wg, self.of_head(names, row, head, at, ROWS))

            def block(j, done):
                start = j * self.size
                keys = self.keys(row, head, start, self.size)
                if self.shape.segments:
                    keys.append(self.refs["ids"].at[row, pl.ds(start, self.size)])
                self.k.fill(done, keys)
                self.v.fill(done, self.of_head(["v"], row, head, start, self.size))
                return done + 1

            return k + 1, lax.fori_loop(first, last, block, carry[1])

        items, done = self.each_item(one, (jnp.int32(0), jnp.int32(0)))
        self.q.drain(2 * items)
        self.k.drain(done)
        self.v.drain(done)

    # -- masks

    def row_bounds(self, row, at):
        """Start, end and (with segments) id of 64 queries, by row."""
        bounds = self.refs["bounds"]
        row = row if bounds.shape[0] > 1 else 0
        return [load(bounds.at[row, i, pl.ds(at, ROWS)], ROW) for i in range(bounds.shape[1])]

    def visible(self, rows, start, ids, width):
        """Bool [64, width]: which of the slots from `start` on queries with these bounds see."""
        shape = (ROWS, width)
        slot = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WG) + start
        seen = (slot >= columns(rows[0], width)) & (slot < columns(rows[1], width))
        if self.shape.segments:
            seen &= columns(rows[2], width) == across(load(ids, COLUMN))
        return seen

    def keep_rows(self, refs, live):
        """Zeros rows: 0 * NaN would be NaN. live(offset) tells of 64 rows from there what stays."""
        for ref in refs:
            rows, width = ref.shape
            size = tile_columns(width)
            for first in sorted({*range(0, rows - ROWS + 1, ROWS), rows - ROWS}):
                keep = columns(live(first), size)
                for column in range(0, width, size):
                    part = ref.at[pl.ds(first, ROWS), pl.ds(column, size)]
                    x = load(part, WG)
                    part[...] = jnp.where(keep, x, jnp.zeros_like(x))
        plgpu.commit_smem()

    def keep_slots(self, refs, first, live):
        """Zeros the slots of a block that starts at `first` from slot `live` on."""

        @pl.when(first + refs[0].shape[0] > live)
        def _():
            row = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (ROWS,), 0), ROW)
            self.keep_rows(refs, lambda offset: row + (first + offset) < filled(live, jnp.int32))

    # -- accumulators: in registers and in flight natively, in shared memory when interpreted

    def accumulators(self, wg, widths, body, first=0):
        """Runs body on float32 accumulators [64, width] that live for the whole walk."""
        if self.native:
            pl.run_scoped(body, *(plgpu.ACC((ROWS, width), jnp.float32) for width in widths))
        else:
            body(*(self.smem[f"acc{first + i}"].at[wg] for i in range(len(widths))))

    def multiply(self, acc, a, b, wg):
        """Acc += a b, with a in registers."""
        if self.native:
            plgpu.wgmma(acc, a, b)
            return
        parked = self.smem[f"park{a.shape[1]}"].at[wg]  # the interpreter wants both in memory
        parked[...] = a
        plgpu.commit_smem()

        def product(fresh):
            plgpu.wgmma(fresh, parked, b)
            return fresh[...]

        acc[...] = acc[...] + pl.run_scoped(product, plgpu.ACC(acc.shape, jnp.float32))

    def rescale(self, acc, factor):
        old = plgpu.wgmma_accumulator_load(acc, wait_n=None) if self.native else acc[...]
        acc[...] = old * columns(factor, acc.shape[1])

    def clear(self, acc):
        zero = jnp.zeros(acc.shape, jnp.float32)
        acc[...] = plgpu.layout_cast(zero, WG) if self.native else zero

    def retire(self, in_flight):
        if self.native:
            plgpu.wgmma_wait(in_flight)

    def partial_sums(self, p):
        return mosaic.partial_sums(p) if self.native else p.reshape(ROWS, 8, -1).sum(2)

    def store(self, ref, value, row, column, count):
        """ref[row : row + count, column : ...] = value[:count]; interpreted, all 64 rows."""
        if self.native:
            mosaic.store_rows(ref, value, row, column, count)
        else:
            ref[pl.ds(row, ROWS), pl.ds(column, value.shape[1])] = value

    def store_values(self, ref, value, row):
        if self.native:
            mosaic.store_row_values(ref, value, row, ROWS)
        else:
            ref[pl.ds(row, ROWS)] = value


def interpreted_scratch(shape: Shape, widths, products) -> dict[str, Any]:
    """What stands in for registers: accumulators of `widths`, left operands of width `products`."""
    if shape.native:
        return {}
    smem = {f"acc{i}": plgpu.SMEM((2, ROWS, w), jnp.float32) for i, w in enumerate(widths)}
    return smem | {f"park{w}": tiled((2, ROWS, w), shape.dtype) for w in products}


def thread_blocks(shape: Shape, tiles: int) -> int:
    return min(shape.cores, shape.batch * shape.heads * tiles)


def launch(kind, name, shape: Shape, operands: dict[str, Any], outputs, scratch, interpret):
    """Runs a kernel: `operands` by name, `outputs` {name: ShapeDtypeStruct}."""
    inputs = {key: value for key, value in operands.items() if value is not None}

    def body(*refs, **smem):
        named = dict(zip([*inputs, *outputs], refs, strict=True))
        kind(named, smem, shape).run()

    tiles = kind.count(shape)
    kernel = mosaic.kernel(
        body,
        out_type=list(outputs.values()),
        scratch_types=scratch,
        kernel_name=name,
        grid=(thread_blocks(shape, tiles),),
        grid_names=("block",),
        num_threads=3 if kind.copies else 2,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )
    return list(guard.unsplit(kernel, name, interpret)(*inputs.values()))


def rows_stored(length: int, native: bool) -> int:
    """Rows of an output: the interpreter has no stores of part of a tile."""
    return length if native else padded(length)


def columns(row_values, width):
    """[64] to [64, width], free in registers."""
    return lax.broadcast_in_dim(row_values, (row_values.shape[0], width), [0])


def across(column_values):
    """[width] to [64, width], free in registers."""
    return lax.broadcast_in_dim(column_values, (ROWS, column_values.shape[0]), [1])


def filled(value, dtype=jnp.float32):
    return plgpu.layout_cast(jnp.full((ROWS,), value, dtype), ROW)


def load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False)


def scores(acc, left, right):
    """Acc += left right^T, part by part, all in shared memory; what `right` has more is no part."""
    for a, b in zip(left, right, strict=False):
        plgpu.wgmma(acc, a, b.T)


def in_flight(acc, wait_n):
    """The value of an accumulator once at most `wait_n` later products are in flight."""
    return plgpu.wgmma_accumulator_load(acc, wait_n=wait_n)
