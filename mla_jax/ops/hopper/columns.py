"""Tiles whose 16 columns are queries, in the registers of a warpgroup: pieces of `few.py`.

Thread 4 g + t of warp w has, of a tile [64 i, 16], rows 64 i + 16 w + 8 e + g in columns 8 n + 2 t
and 8 n + 2 t + 1: register [i, n, 0, 0, e, 0, 0, 0, 0].

None of this runs in the interpreter.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper.dequantise import address
from mla_jax.ops.hopper.mosaic import shared_address
from mla_jax.ops.hopper.schedule import FEW_ROWS

WG, SPLAT = plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT
HEADS = WG.reduce(0)  # one value a column of a tile
RANK, ROPE, WIDTH = 512, 64, FEW_ROWS  # channels of a latent and of a rotary key; columns of a tile


def tiles_of(dtype):
    """How numbers lie in shared memory: in tiles of 8 rows of 128 swizzled bytes."""
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128)


def rows_of(dtype):
    """Shared memory for the 16 queries as rows [16, 512], which a copy can store."""
    return plgpu.SMEM((WIDTH, RANK), dtype, transforms=tiles_of(dtype))


def reduce_columns(x, shared, kind):
    """The maximum ("max") or the sum ("sum") of every column of [64, 16], by way of [4, 16].

    All threads have passed a barrier of the warpgroup before they come here again.
    """

    @plgpu.inline_mgpu(
        arg_types=(WG, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((WIDTH,), jnp.dtype(jnp.float32), HEADS),
    )
    def call(_, x, shared):
        arith, c, ir = mgpu.utils.arith, mgpu.utils.c, mgpu.utils.ir
        me, f32 = Thread(), ir.F32Type.get()
        join = arith.maximumf if kind == "max" else arith.addf
        base = shared_address(shared)
        own = arith.addi(base, arith.muli(me.t, c(8, me.i32)))
        to = arith.addi(own, arith.muli(me.warp, c(4 * WIDTH, me.i32)))
        first = arith.extui(me.i32, arith.cmpi(arith.CmpIPredicate.eq, me.g, c(0, me.i32)))
        for n in range(2):
            low, high = (elements(x.registers[0, n, 0, 0, h, 0, 0, 0, 0], 2) for h in range(2))
            pair = [join(a, b) for a, b in zip(low, high, strict=True)]
            for bit in (4, 8, 16):
                pair = [join(a, mgpu.utils.shfl_bfly(a, bit)) for a in pair]
            mgpu.utils.inline_ptx(
                "{ .reg .pred p; setp.ne.b32 p, $3, 0; "
                f"@p st.shared.v2.f32 [$0 + {32 * n}], {{$1, $2}}; }}",
                to,
                *pair,
                first,
                has_side_effects=True,
            )
        mgpu.warpgroup_barrier()
        layout = HEADS.to_mgpu()
        registers = np.empty(layout.registers_shape((WIDTH,)), dtype=object)
        for n in range(2):
            pairs = [
                mgpu.utils.inline_ptx(
                    f"ld.shared.v2.f32 {{$0, $1}}, [$2 + {4 * WIDTH * warp + 32 * n}];",
                    own,
                    result_types=[f32] * 2,
                    has_side_effects=True,
                )
                for warp in range(4)
            ]
            joined = [join(join(a, b), join(x, y)) for a, b, x, y in zip(*pairs, strict=True)]
            registers[n, 0, 0] = vector_of(joined, f32)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return call(x, shared)


def put(shared, value, places=None) -> None:
    """Stores [512, 16] as the rows of `rows_of`.

    `places` gives the runs of a thread's numbers that lie side by side, as `places_in_order` does.
    """
    dtype, places = shared.dtype, places or places_in_order

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(tiles_of(dtype)), WG))
    def call(_, shared, value):
        for run, base, offset in places(shared, dtype):
            numbers = [
                elements(value.registers[i, n, 0, 0, e, 0, 0, 0, 0], 2)[k] for i, n, e, k in run
            ]
            bits = min(32, 8 * dtype.itemsize * len(run))
            kind = mgpu.utils.ir.IntegerType.get_signless(bits)
            if bits > 8 * dtype.itemsize:
                pairs = zip(numbers[::2], numbers[1::2], strict=True)
                words = [word_of(vector_of(pair, numbers[0].type)) for pair in pairs]
            else:
                words = [mgpu.utils.arith.bitcast(kind, x) for x in numbers]
            many, names = _vector_of_ptx(len(words), 1)
            mgpu.utils.inline_ptx(
                f"st.shared{many}.b{bits} [$0 + {offset}], {names};",
                base,
                *words,
                has_side_effects=True,
            )

    call(shared, value)


def take(shared, places=None):
    """What the same thread of another warpgroup has `put`, in float32."""
    dtype, places = shared.dtype, places or places_in_order

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(tiles_of(dtype)),),
        return_type=plgpu.ShapeDtypeStruct((RANK, WIDTH), dtype, WG),
    )
    def call(_, shared):
        layout, f32 = WG.to_mgpu(), mgpu.utils.ir.F32Type.get()
        registers = np.empty(layout.registers_shape((RANK, WIDTH)), dtype=object)
        found = {}
        for run, base, offset in places(shared, dtype):
            many, names = _vector_of_ptx(len(run), 0)
            made: Any = mgpu.utils.inline_ptx(
                f"ld.shared{many}.f32 {names}, [${len(run)} + {offset}];",
                base,
                result_types=f32 if len(run) == 1 else [f32] * len(run),
                has_side_effects=True,
            )
            found |= zip(run, [made] if len(run) == 1 else made, strict=True)
        for i, n, e in np.ndindex(RANK // 64, 2, 2):
            pair = [found[i, n, e, k] for k in range(2)]
            registers[i, n, 0, 0, e, 0, 0, 0, 0] = vector_of(pair, f32)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return call(shared)


def _vector_of_ptx(count: int, first: int) -> tuple[str, str]:
    """What PTX calls so many operands from number `first` on."""
    names = ", ".join(f"${first + n}" for n in range(count))
    return ("", names) if count == 1 else (f".v{count}", f"{{{names}}}")


def places_in_order(shared, dtype):
    """Where a thread's numbers of [512, 16] lie in rows: ([(i, n, e, k)], address, offset).

    Eight threads have neighbouring channels of a row, and four of them lie in rows whose swizzled
    chunks of 16 bytes differ, so that a store meets every bank once.
    """
    arith, c = mgpu.utils.arith, mgpu.utils.c
    me, size, start = Thread(), dtype.itemsize, shared_address(shared)
    per_tile, per_chunk = 128 // size, 16 // size
    first = arith.addi(arith.muli(me.warp, c(16, me.i32)), me.g)
    bases = {}
    for e, k in np.ndindex(2, 2):
        channel = arith.addi(first, c(8 * e, me.i32))
        within = arith.andi(channel, c(per_tile - 1, me.i32))
        row = arith.addi(arith.muli(me.t, c(2, me.i32)), c(k, me.i32))
        chunk = arith.xori(arith.divui(within, c(per_chunk, me.i32)), row)
        at = arith.muli(arith.divui(channel, c(per_tile, me.i32)), c(1024, me.i32))
        at = arith.addi(at, arith.muli(row, c(128, me.i32)))
        at = arith.addi(at, arith.muli(chunk, c(16, me.i32)))
        rest = arith.andi(within, c(per_chunk - 1, me.i32))
        at = arith.addi(at, arith.muli(rest, c(size, me.i32)))
        bases[e, k] = arith.addi(start, at)
    for i, n, e, k in np.ndindex(RANK // 64, 2, 2, 2):
        yield [(i, n, e, k)], bases[e, k], 8 * RANK * size * n + 64 // per_tile * 1024 * i


def put_weights(shared, p) -> None:
    """Stores 16-bit [64, 16] as [16, 64], tiled and swizzled as an operand of products."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(tiles_of(shared.dtype)), WG))
    def call(_, shared, p):
        arith, c = mgpu.utils.arith, mgpu.utils.c
        me = Thread()
        # Eight lanes say where the rows of a square of 8 x 8 begin, of squares (n, e).
        lane = arith.andi(me.thread, c(31, me.i32))
        row, square = arith.andi(lane, c(7, me.i32)), arith.shrui(lane, c(3, me.i32))
        n, e = arith.shrui(square, c(1, me.i32)), arith.andi(square, c(1, me.i32))
        chunk = arith.addi(arith.muli(me.warp, c(2, me.i32)), e)
        at = arith.addi(shared_address(shared), arith.muli(n, c(1024, me.i32)))
        at = arith.addi(at, arith.muli(row, c(128, me.i32)))
        at = arith.addi(at, arith.muli(arith.xori(chunk, row), c(16, me.i32)))
        words = [word_of(p.registers[0, n, 0, 0, e, 0, 0, 0, 0]) for n, e in np.ndindex(2, 2)]
        mgpu.utils.inline_ptx(
            "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};",
            at,
            *words,
            has_side_effects=True,
            convergent=True,
        )

    call(shared, p)


def clear_slots(shared, live) -> None:
    """Stores zeros in the rows of [64, 512] from `live` on, since 0 times NaN is NaN.

    Numbers have 8 or 16 bits.
    """
    lanes = RANK * shared.dtype.itemsize // 16  # that clear a row

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(tiles_of(shared.dtype)), SPLAT))
    def call(_, shared, live):
        arith, c = mgpu.utils.arith, mgpu.utils.c
        me = Thread()
        thread = arith.andi(me.thread, c(127, me.i32))
        row = arith.addi(live.registers.item(), arith.divui(thread, c(lanes, me.i32)))
        tile = arith.andi(arith.shrui(thread, c(3, me.i32)), c(lanes // 8 - 1, me.i32))
        at = arith.addi(shared_address(shared), arith.muli(tile, c(1024, me.i32)))
        at = arith.addi(at, arith.muli(arith.andi(thread, c(7, me.i32)), c(16, me.i32)))
        mgpu.utils.inline_ptx(
            "{ .reg .pred p; .reg .b32 r, at, low, zero; mov.b32 r, $0; mov.b32 zero, 0; "
            "again: setp.ge.s32 p, r, 64; @p bra done; "
            f"shr.u32 at, r, 3; mul.lo.u32 at, at, {128 * lanes}; and.b32 low, r, 7; "
            "mad.lo.u32 at, low, 128, at; add.u32 at, at, $1; "
            "st.shared.v4.b32 [at], {zero, zero, zero, zero}; "
            f"add.s32 r, r, {128 // lanes}; bra again; done: }}",
            row,
            at,
            has_side_effects=True,
        )

    call(shared, live)


def store_heads(ref, value, row, count) -> None:
    """Stores ref[row : row + count] of one value a column."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), HEADS, SPLAT, SPLAT))
    def call(_, ref, value, row, count):
        arith, c = mgpu.utils.arith, mgpu.utils.c
        me = Thread()
        column = arith.muli(me.t, c(2, me.i32))
        at = address(ref, arith.addi(row.registers.item(), column), 4)
        one = arith.ori(me.g, me.warp)  # zero in one quad
        for n in range(2):
            for k, x in enumerate(elements(value.registers[n, 0, 0], 2)):
                here = arith.addi(column, c(8 * n + k, me.i32))
                live = arith.cmpi(arith.CmpIPredicate.slt, here, count.registers.item())
                mine = arith.cmpi(arith.CmpIPredicate.eq, one, c(0, me.i32))
                live = arith.extui(me.i32, arith.andi(live, mine))
                mgpu.utils.inline_ptx(
                    "{ .reg .pred p; setp.ne.b32 p, $2, 0; "
                    f"@p st.global.f32 [$0 + {4 * (8 * n + k)}], $1; }}",
                    at,
                    x,
                    live,
                    has_side_effects=True,
                )

    call(ref, value, row, count)


# -- threads and words


class Thread:
    """Where a thread is: thread 4 g + t of warp w of its warpgroup."""

    def __init__(self):
        arith, c = mgpu.utils.arith, mgpu.utils.c
        self.thread = mgpu.utils.thread_idx()
        i32 = self.i32 = self.thread.type
        self.warp = arith.andi(arith.shrui(self.thread, c(5, i32)), c(3, i32))
        self.t = arith.andi(self.thread, c(3, i32))
        self.g = arith.andi(arith.shrui(self.thread, c(2, i32)), c(7, i32))
        odd = arith.andi(self.g, c(1, i32))
        self.permuted = arith.ori(arith.shrui(self.g, c(1, i32)), arith.muli(odd, c(4, i32)))


def two_numbers(word, dtype=jnp.bfloat16):
    """A word as two numbers of 16 bits."""
    vector, kind = mgpu.utils.vector, mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype))
    pair = mgpu.utils.ir.VectorType.get((2,), kind)
    return vector.bitcast(pair, vector_of([word], word.type))


def word_of(pair):
    """A register of two 16-bit numbers as a word."""
    ir, vector = mgpu.utils.ir, mgpu.utils.vector
    i32 = ir.IntegerType.get_signless(32)
    return elements(vector.bitcast(ir.VectorType.get((1,), i32), pair), 1)[0]


def vector_of(values, kind):
    """A register of several numbers."""
    values = list(values)
    ir, vector = mgpu.utils.ir, mgpu.utils.vector
    return vector.from_elements(ir.VectorType.get((len(values),), kind), values)


def elements(register, count):
    """The numbers of a register."""
    extract = mgpu.utils.vector.extract
    return [extract(register, dynamic_position=[], static_position=[n]) for n in range(count)]
