"""Bytes of latents become left sides of matrix products in registers: pieces of `few_scaled.py`.

One instruction makes two numbers of e4m3 float16, exactly, and another multiplies them with their
group's scale over the largest of their slot and with 2^7 (`HEADROOM`), which is exact down to 2^-22
of that: `few_scaled.py` says how scores, weights and outputs get their size back. Rotary keys stay
in bfloat16, are multiplied with 2^7 over the largest scale, and meet the same scores. A left side
in registers may have its rows and its inner axis in any order, as long as whatever meets it has the
same (`queries.py`); the orders here are such that every thread loads 16 bytes of a slot at once and
that eight neighbours load from different banks.

Thread 4 g + t of warp w, of a tile whose slots are 16 w + 8 h + r:

    keys      row 8 h + g is the slot r = PERMUTED[g]; of 64 channels, it has 16 t to 16 t + 15
    values    16 channels from 128 w + 16 PERMUTED[g], in slots r = t and r = t + 4
    rope      slots as keys; of 64 channels, it has 8 t to 8 t + 7 and 32 + 8 t to 39 + 8 t

None of this runs in the interpreter, which has `order_slots` and the like.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper.columns import (
    RANK,
    ROPE,
    SPLAT,
    WG,
    Thread,
    elements,
    tiles_of,
    two_numbers,
    vector_of,
)
from mla_jax.ops.hopper.dequantise import address, bits, row_bytes
from mla_jax.ops.hopper.mosaic import load_shared, shared_address
from mla_jax.ops.hopper.schedule import BLOCK

STRIDED = plgpu.Layout.WG_STRIDED
GROUPS = RANK // 128
TURNED = jnp.dtype(jnp.float16)  # what bytes become
HEADROOM = 7  # log2 of what they are multiplied with beyond their scale: 448 2^7 is below 65504
RAISED = 14  # log2 of the largest softmax weight
LEAST, MOST = 2.0**-30, 2.0**60  # bounds of what a slot's numbers are made relative to
_INTERLEAVED = (0x5140, 0x7362)  # first bytes of two words, their second ones, and so on
ROWS = WG.reduce(1)  # one value a row of a tile
_SCALES = STRIDED((1024,), 4)  # the groups of two slots a thread
_FACTORS = STRIDED((1024,), 4)
_BYTES = STRIDED((2048,), 4)  # four times 16 bytes a thread
BYTES, _ROPES = tiles_of(jnp.float8_e4m3fn), tiles_of(jnp.bfloat16)


# -- the orders, for the interpreter and for tests


def slot_of_row(row):
    """The slot of a block that is row `row` of its scores."""
    return (row & ~7) | ((row & 7) >> 1) | ((row & 1) << 2)


def order_slots(tile):
    """[64, ...] slots in the order of the rows of their scores."""
    shape = tile.shape
    return tile.reshape(8, 2, 4, -1).transpose(0, 2, 1, 3).reshape(shape)


def order_values(tile):
    """[64, 512] to its left side [512, 64]: channels (i, w, e, g), slots as `order_slots`."""
    x = order_slots(tile).T.reshape(4, 2, 4, 8, 2, BLOCK)  # w, g % 2, g // 2, i, e
    return x.transpose(3, 0, 4, 2, 1, 5).reshape(RANK, BLOCK)


def channels_of_values(out):
    """[512, N] in the order of values' channels to [N, 512]."""
    x = out.reshape(8, 4, 2, 4, 2, -1)  # i, w, e, g // 2, g % 2
    return x.transpose(5, 1, 4, 3, 0, 2).reshape(-1, RANK)


def values_of_channels(rows):
    """[N, 512] in the order of values' channels, [512, N]."""
    x = rows.reshape(-1, 4, 2, 4, 8, 2)  # w, g % 2, g // 2, i, e
    return x.transpose(4, 1, 5, 3, 2, 0).reshape(RANK, -1)


# -- registers


def load_scales(scale, source, live):
    """The scales [B S, 4] of this thread's two slots of the block that begins at slot `source`.

    Slots from `live` on are not read: their scales are zeros, and so will be their numbers.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SPLAT, SPLAT),
        return_type=plgpu.ShapeDtypeStruct((1024,), jnp.dtype(jnp.float32), _SCALES),
    )
    def call(_, scale, source, live):
        arith, c = mgpu.utils.arith, mgpu.utils.c
        me = Thread()
        f32 = mgpu.utils.ir.F32Type.get()
        slot = arith.addi(arith.muli(me.warp, c(16, me.i32)), me.permuted)
        row = arith.addi(source.registers.item(), slot)
        at, registers = address(scale, row, row_bytes(scale)), []
        for h in range(2):
            is_live = arith.cmpi(
                arith.CmpIPredicate.slt, arith.addi(slot, c(8 * h, me.i32)), live.registers.item()
            )
            values = mgpu.utils.inline_ptx(
                "{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; "
                "mov.b32 $2, 0; mov.b32 $3, 0; "
                f"@p ld.global.nc.v4.f32 {{$0, $1, $2, $3}}, [$4 + {h * 8 * 4 * GROUPS}]; }}",
                at,
                arith.extui(me.i32, is_live),
                result_types=[f32] * 4,
                has_side_effects=True,
            )
            registers.append(vector_of(values, f32))
        return _array(registers, _SCALES, None)

    return call(scale, source, live)


def factors(scales, shared):
    """What numbers are multiplied with, and the largest scale of every slot.

    Returns the factors of this thread's keys, twice in a register, and of every row of scores its
    slot's largest scale, [64]. Values' factors go to `shared` [4, 64], in the order of rows.
    """

    @plgpu.inline_mgpu(
        arg_types=(_SCALES, plgpu.RefType()),
        return_type=(
            plgpu.ShapeDtypeStruct((1024,), jnp.dtype(jnp.int32), _FACTORS),
            plgpu.ShapeDtypeStruct((BLOCK,), jnp.dtype(jnp.float32), ROWS),
        ),
    )
    def call(_, scales, shared):
        arith, c = mgpu.utils.arith, mgpu.utils.c
        me, f32 = Thread(), mgpu.utils.ir.F32Type.get()
        base = shared_address(shared)
        row = arith.addi(arith.muli(me.warp, c(16, me.i32)), me.g)
        at = arith.addi(arith.muli(me.t, c(BLOCK, me.i32)), row)
        at = arith.addi(base, arith.muli(at, c(2, me.i32)))
        layout = ROWS.to_mgpu()
        registers, largest = [], np.empty(layout.registers_shape((BLOCK,)), dtype=object)
        for h, register in enumerate(scales.registers.flat):
            four = elements(register, 4)
            *words, top = mgpu.utils.inline_ptx(
                "{ .reg .f32 x, y; .reg .b32 b; max.NaN.f32 x, $5, $6; max.NaN.f32 y, $7, $8; "
                f"max.NaN.f32 x, x, y; max.NaN.f32 x, x, 0f{bits(LEAST)}; "
                f"min.NaN.f32 x, x, 0f{bits(MOST)}; mov.f32 $4, x; "
                f"mov.b32 b, x; sub.s32 b, {_inverse()}, b; mov.b32 x, b; "
                + " ".join(
                    f"mul.f32 y, ${5 + n}, x; cvt.rn.f16x2.f32 ${n}, y, y;" for n in range(GROUPS)
                )
                + " }",
                *four,
                result_types=[me.i32] * GROUPS + [f32],
            )
            mine = words[0]
            for group in range(1, GROUPS):
                is_mine = arith.cmpi(arith.CmpIPredicate.eq, me.t, c(group, me.i32))
                mine = arith.select(is_mine, words[group], mine)
            mgpu.utils.inline_ptx(
                f"{{ .reg .b16 x, y; mov.b32 {{x, y}}, $1; st.shared.b16 [$0 + {16 * h}], x; }}",
                at,
                mine,
                has_side_effects=True,
            )
            registers.append(vector_of(words, me.i32))
            largest.flat[h] = vector_of([top], f32)
        largest = mgpu.FragmentedArray(_registers=largest, _layout=layout, _is_signed=None)
        return _array(registers, _FACTORS, True), largest

    return call(scales, shared)


def load_keys(tile, group):
    """The bytes of 128 channels of a tile: what `turn_keys` takes."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(BYTES),),
        return_type=plgpu.ShapeDtypeStruct((2048,), jnp.dtype(jnp.int32), _BYTES),
    )
    def call(_, tile):
        arith, c = mgpu.utils.arith, mgpu.utils.c
        me = Thread()
        at = arith.addi(shared_address(tile), arith.muli(me.warp, c(2 * 8 * RANK, me.i32)))
        at = arith.addi(at, arith.muli(me.permuted, c(128, me.i32)))
        chunk = arith.xori(me.t, me.permuted)
        first = arith.addi(at, arith.muli(chunk, c(16, me.i32)))
        second = arith.addi(at, arith.muli(arith.xori(chunk, c(4, me.i32)), c(16, me.i32)))
        loads = [
            load_shared(base, 8 * RANK * h + 1024 * group)
            for base in (first, second)
            for h in range(2)
        ]
        return _array([vector_of(words, me.i32) for words in loads], _BYTES, True)

    return call(tile)


def turn_keys(held, factors, group, piece):
    """The left side [64, 64] of piece 0 or 1 of the 128 channels that `load_keys` loaded."""

    @plgpu.inline_mgpu(
        arg_types=(_BYTES, _FACTORS),
        return_type=plgpu.ShapeDtypeStruct((BLOCK, 64), TURNED, WG),
    )
    def call(_, held, factors):
        layout = WG.to_mgpu()
        registers = np.empty(layout.registers_shape((BLOCK, 64)), dtype=object)
        for h in range(2):
            factor = elements(factors.registers.flat[h], 4)[group]
            words = elements(held.registers.flat[2 * piece + h], 4)
            for j, word in enumerate(words):
                for pair, value in enumerate(_turn(word, factor)):
                    registers[0, 2 * j + pair, 0, 0, h, 0, 0, 0, 0] = value
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return call(held, factors)


def load_rope(tile, largest):
    """The left side [64, 64] of rotary keys, in the units of `turn_keys`."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(_ROPES), ROWS),
        return_type=plgpu.ShapeDtypeStruct((BLOCK, ROPE), jnp.dtype(jnp.bfloat16), WG),
    )
    def call(_, tile, largest):
        arith, c = mgpu.utils.arith, mgpu.utils.c
        me = Thread()
        at = arith.addi(shared_address(tile), arith.muli(me.warp, c(2 * 1024, me.i32)))
        at = arith.addi(at, arith.muli(me.permuted, c(128, me.i32)))
        chunk = arith.xori(me.t, me.permuted)
        layout = WG.to_mgpu()
        registers = np.empty(layout.registers_shape((BLOCK, ROPE)), dtype=object)
        factor = [
            mgpu.utils.inline_ptx(
                f"{{ .reg .b32 b; mov.b32 b, $1; sub.s32 b, {_inverse()}, b; "
                "prmt.b32 $0, b, b, 0x3232; }",
                elements(register, 1)[0],
                result_types=me.i32,
            )
            for register in largest.registers.flat
        ]
        for b in range(2):
            base = arith.xori(chunk, c(4 * b, me.i32))
            base = arith.addi(at, arith.muli(base, c(16, me.i32)))
            for h in range(2):
                for p, word in enumerate(load_shared(base, 1024 * h)):
                    value = mgpu.utils.inline_ptx(
                        "mul.rn.bf16x2 $0, $1, $2;", word, factor[h], result_types=me.i32
                    )
                    registers[0, 4 * b + p, 0, 0, h, 0, 0, 0, 0] = two_numbers(value)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return call(tile, largest)


def load_values(tile, j):
    """The bytes of slots 16 j to 16 j + 15 of a tile: what `turn_values` takes."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(BYTES),),
        return_type=plgpu.ShapeDtypeStruct((2048,), jnp.dtype(jnp.int32), _BYTES),
    )
    def call(_, tile):
        arith, c = mgpu.utils.arith, mgpu.utils.c
        me = Thread()
        at = arith.addi(shared_address(tile), arith.muli(me.warp, c(1024, me.i32)))
        at = arith.addi(at, arith.muli(me.t, c(128, me.i32)))
        chunk = arith.xori(me.t, me.permuted)
        first = arith.addi(at, arith.muli(chunk, c(16, me.i32)))
        second = arith.addi(at, arith.muli(arith.xori(chunk, c(4, me.i32)), c(16, me.i32)))
        loads = [
            load_shared(base, (2 * j + h) * 8 * RANK + 4 * 128 * e)
            for h in range(2)
            for e, base in enumerate((first, second))
        ]
        return _array([vector_of(words, me.i32) for words in loads], _BYTES, True)

    return call(tile)


def turn_values(held, shared, j):
    """The left side [512, 16] of the slots that `load_values` loaded; `shared` is of `factors`."""

    @plgpu.inline_mgpu(
        arg_types=(_BYTES, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((RANK, 16), TURNED, WG),
    )
    def call(_, held, shared):
        arith, c = mgpu.utils.arith, mgpu.utils.c
        me = Thread()
        at = arith.addi(arith.muli(me.warp, c(2 * BLOCK, me.i32)), arith.muli(me.t, c(4, me.i32)))
        at = arith.addi(shared_address(shared), at)
        layout = WG.to_mgpu()
        registers = np.empty(layout.registers_shape((RANK, 16)), dtype=object)
        for h in range(2):
            factor = mgpu.utils.inline_ptx(
                f"ld.shared.b32 $0, [$1 + {2 * (16 * j + 8 * h)}];",
                at,
                result_types=me.i32,
                has_side_effects=True,
            )
            one, two = (elements(held.registers.flat[2 * h + e], 4) for e in range(2))
            for i in range(8):
                word = _interleave(one[i // 2], two[i // 2], _INTERLEAVED[i % 2])
                for e, value in enumerate(_turn(word, factor)):
                    registers[i, h, 0, 0, e, 0, 0, 0, 0] = value
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return call(held, shared)


def places(shared, dtype):
    """As `columns.places_in_order`, of values' channels: a thread has 16 side by side."""
    arith, c = mgpu.utils.arith, mgpu.utils.c
    me, size = Thread(), dtype.itemsize
    per_tile = 128 // size
    first = arith.muli(me.warp, c(128, me.i32))
    first = arith.addi(first, arith.muli(me.permuted, c(16, me.i32)))
    start = arith.addi(
        shared_address(shared),
        arith.muli(arith.divui(first, c(per_tile, me.i32)), c(1024, me.i32)),
    )
    chunk = arith.divui(arith.remui(first, c(per_tile, me.i32)), c(16 // size, me.i32))
    for n, k in np.ndindex(2, 2):
        row = arith.addi(arith.muli(me.t, c(2, me.i32)), c(k, me.i32))
        begin = arith.addi(start, arith.muli(row, c(128, me.i32)))
        begin = arith.addi(begin, c(8 * RANK * size * n, me.i32))
        channels = [(i, n, e, k) for i, e in np.ndindex(8, 2)]
        for q, run in enumerate(np.split(np.arange(16), size)):
            swizzled = arith.xori(arith.addi(chunk, c(q, me.i32)), row)
            at = arith.addi(begin, arith.muli(swizzled, c(16, me.i32)))
            yield [channels[place] for place in run], at, 0


# -- words


def _turn(word, factor):
    """Four numbers of e4m3 in a word, times a factor twice in a register: two pairs of float16."""
    i32 = mgpu.utils.ir.IntegerType.get_signless(32)
    return [
        two_numbers(
            mgpu.utils.inline_ptx(
                "{ .reg .b16 x, y; .reg .b32 z; mov.b32 {x, y}, $1; "
                f"cvt.rn.f16x2.e4m3x2 z, {half}; mul.rn.f16x2 $0, z, $2; }}",
                word,
                factor,
                result_types=i32,
            ),
            TURNED,
        )
        for half in "xy"
    ]


def _interleave(one, two, pick):
    """Bytes of two words in one of the orders `_INTERLEAVED`."""
    i32 = mgpu.utils.ir.IntegerType.get_signless(32)
    return mgpu.utils.inline_ptx(f"prmt.b32 $0, $1, $2, 0x{pick:X};", one, two, result_types=i32)


def _inverse():
    """What the bits of a power of two are taken from for those of 2^HEADROOM over it."""
    return (2 * 127 + HEADROOM) << 23


def _array(registers, layout, is_signed):
    flat = np.empty((len(registers),), dtype=object)
    flat[:] = registers
    return mgpu.FragmentedArray(_registers=flat, _layout=layout.to_mgpu(), _is_signed=is_signed)
