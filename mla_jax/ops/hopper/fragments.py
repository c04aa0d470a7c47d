"""Bytes of latents become left sides of matrix products in registers: pieces of `few_scaled.py`.

A number of e4m3 becomes one of bfloat16 by its bits, as `dequantise.py` describes, but 2^60 too
small (`SMALL`): 2^60 times the scale, which these bits are multiplied with, is then finite for any
scale up to 2^67, and the product exact from 2^-57 on. A larger scale gives infinity or NaN. A
rotary query is made as small, and the kernel makes scores and outputs large again. A left side in
registers may have its rows and its inner axis in any order, as long as whatever meets it has the
same; the orders here are such that every thread loads 16 bytes of a slot at once and that eight
neighbours load from different banks.

Thread 4 g + t of warp w, of a tile whose slots are 16 w + 8 h + r:

    keys      row 8 h + g is the slot r = PERMUTED[g]; of 64 channels, it has 16 t to 16 t + 15
    values    16 channels from 128 w + 16 PERMUTED[g], in slots r = t and r = t + 4
    rope      slots as keys; of 64 channels, it has 8 t to 8 t + 7 and 32 + 8 t to 39 + 8 t

None of this runs in the interpreter, which has `order_pattern` and the like.
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
    two_numbers,
    vector_of,
)
from mla_jax.ops.hopper.dequantise import address, bits, row_bytes
from mla_jax.ops.hopper.mosaic import load_shared, shared_address
from mla_jax.ops.hopper.schedule import BLOCK

STRIDED = plgpu.Layout.WG_STRIDED
GROUPS = RANK // 128
SMALL = 2.0**-60  # what numbers in registers are too small by
_SCALES = STRIDED((1024,), 4)  # the groups of two slots a thread
_FACTORS = STRIDED((1024,), 4)
_BYTES = STRIDED((2048,), 4)  # four times 16 bytes a thread
BYTES = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))  # of a tile of bytes
ROPES = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # of one of rotary keys


# -- the orders, for queries, for the interpreter and for tests


def slot_of_row(row):
    """The slot of a block that is row `row` of its scores."""
    return (row & ~7) | ((row & 7) >> 1) | ((row & 1) << 2)


def order_pattern(pattern):
    """[..., 512] in the order of the inner axis of keys: 64-channel pieces of (j, h, t, e)."""
    shape = pattern.shape
    x = pattern.reshape(*shape[:-1], RANK // 64, 4, 4, 2, 2)  # piece, t, j, h, e
    return jnp.moveaxis(x, -4, -2).reshape(shape)


def order_rope(rope):
    """[..., 64] in the order of the inner axis of rotary keys: (b, p // 2, p % 2, t, e)."""
    shape = rope.shape
    x = rope.reshape(*shape[:-1], 2, 4, 2, 2, 2)  # b, t, p // 2, p % 2, e
    return jnp.moveaxis(x, -4, -2).reshape(shape)


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
    """What bits of numbers are multiplied with: of this thread's keys, and in `shared` of values.

    2^120, `SMALL` and the scale: twice in a register, and [4, 64] in shared memory in the order of
    rows.
    """

    @plgpu.inline_mgpu(
        arg_types=(_SCALES, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((1024,), jnp.dtype(jnp.int32), _FACTORS),
    )
    def call(_, scales, shared):
        arith, c = mgpu.utils.arith, mgpu.utils.c
        me = Thread()
        base = shared_address(shared)
        row = arith.addi(arith.muli(me.warp, c(16, me.i32)), me.g)
        at = arith.addi(arith.muli(me.t, c(BLOCK, me.i32)), row)
        at = arith.addi(base, arith.muli(at, c(2, me.i32)))
        registers = []
        for h, register in enumerate(scales.registers.flat):
            words = [
                mgpu.utils.inline_ptx(
                    f"{{ .reg .f32 f; .reg .b32 x; mul.f32 f, $1, 0f{bits(2.0**120 * SMALL)}; "
                    "mov.b32 x, f; "
                    "prmt.b32 $0, x, x, 0x3232; }",
                    scale,
                    result_types=me.i32,
                )
                for scale in elements(register, 4)
            ]
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
        return _array(registers, _FACTORS, True)

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
        return_type=plgpu.ShapeDtypeStruct((BLOCK, 64), jnp.dtype(jnp.bfloat16), WG),
    )
    def call(_, held, factors):
        layout = WG.to_mgpu()
        registers = np.empty(layout.registers_shape((BLOCK, 64)), dtype=object)
        for h in range(2):
            factor = elements(factors.registers.flat[h], 4)[group]
            words = elements(held.registers.flat[2 * piece + h], 4)
            for j, word in enumerate(words):
                for pair in range(2):
                    pick = 0x9180 + 0x2222 * pair
                    value = _turn(word, word, pick, factor)
                    registers[0, 2 * j + pair, 0, 0, h, 0, 0, 0, 0] = value
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return call(held, factors)


def load_rope(tile):
    """The left side [64, 64] of rotary keys."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(ROPES),),
        return_type=plgpu.ShapeDtypeStruct((BLOCK, ROPE), jnp.dtype(jnp.bfloat16), WG),
    )
    def call(_, tile):
        arith, c = mgpu.utils.arith, mgpu.utils.c
        me = Thread()
        at = arith.addi(shared_address(tile), arith.muli(me.warp, c(2 * 1024, me.i32)))
        at = arith.addi(at, arith.muli(me.permuted, c(128, me.i32)))
        chunk = arith.xori(me.t, me.permuted)
        layout = WG.to_mgpu()
        registers = np.empty(layout.registers_shape((BLOCK, ROPE)), dtype=object)
        for b in range(2):
            base = arith.xori(chunk, c(4 * b, me.i32))
            base = arith.addi(at, arith.muli(base, c(16, me.i32)))
            for h in range(2):
                for p, word in enumerate(load_shared(base, 1024 * h)):
                    registers[0, 4 * b + p, 0, 0, h, 0, 0, 0, 0] = two_numbers(word)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return call(tile)


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
        return_type=plgpu.ShapeDtypeStruct((RANK, 16), jnp.dtype(jnp.bfloat16), WG),
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
                for e in range(2):
                    pick = 0xC480 + 0x1111 * (2 * (i % 2) + e)
                    value = _turn(one[i // 2], two[i // 2], pick, factor)
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


def _turn(one, two, pick, factor):
    """Two bytes, each below eight copies of its sign; shifted by four, masked, and multiplied."""
    i32 = mgpu.utils.ir.IntegerType.get_signless(32)
    return two_numbers(
        mgpu.utils.inline_ptx(
            f"{{ .reg .b32 x; prmt.b32 x, $1, $2, 0x{pick:X}; shl.b32 x, x, 4; "
            "and.b32 x, x, 0x87f087f0; mul.rn.bf16x2 $0, x, $3; }",
            one,
            two,
            factor,
            result_types=i32,
        )
    )


def _array(registers, layout, is_signed):
    flat = np.empty((len(registers),), dtype=object)
    flat[:] = registers
    return mgpu.FragmentedArray(_registers=flat, _layout=layout.to_mgpu(), _is_signed=is_signed)
