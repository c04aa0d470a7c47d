"""8-bit numbers from shared memory as the 16-bit left side of matrix products, in registers.

The inner axis of a left side may have any order, as long as the right side has the same
(`order.in_order`): here it is such that a thread loads 16 bytes at once, and that eight neighbours
load from different banks. Of a step's 128 bytes of a row, thread t of four has the 32 from 32 t on;
where rows of shared memory are only 64 bytes long, it has 16 from 16 t on of each half.

An e4m3 number's bits stand in a bfloat16's place for exponent and mantissa: it is 2^120 times
smaller then, subnormal numbers included, and a product with 2^120 makes it right, exactly. NaN is
the one that another product makes infinite, and zero times that is NaN. An int8 number's lower
seven bits stand in the mantissa of 128, from which 128 is taken, or 256 where its sign bit is set.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper.columns import Thread, two_numbers
from mla_jax.ops.hopper.mosaic import load_shared, shared_address

DEPTH = 128  # inputs of a step
_SIGNS = (0x9180, 0xB3A2)  # two bytes of a word, each below eight copies of its sign
_ASSEMBLY = {
    jnp.dtype(jnp.float8_e4m3fn): """
shl.b32 x, x, 4;
and.b32 x, x, 0x87f087f0;
mov.b32 y, 0x7B807B80;
mul.rn.bf16x2 x, x, y;
mov.b32 y, 0x7B107B10;
mul.rn.bf16x2 y, x, y;
mov.b32 z, 0;
fma.rn.bf16x2 $0, y, z, x;""",
    jnp.dtype(jnp.int8): """
and.b32 y, x, 0x43004300;
and.b32 x, x, 0x007f007f;
or.b32 x, x, 0x43004300;
mov.b32 z, 0x43004300;
add.rn.bf16x2 y, y, z;
sub.rn.bf16x2 $0, x, y;""",
}


def widened(ref, row: int, order: int | None):
    """This warpgroup's half of numbers [128 128], float8_e4m3fn or int8, in bfloat16.

    They are the left side of matrix products.

    Args:
        ref: in shared memory, in rows of so many bytes.
        row: 128 or 64.
        order: None takes 64 rows as they follow each other. Else the two warpgroups take rows so
            that what they multiply is `in_order(..., order)`, of whole tiles of 128 or 64 rows.
    """
    layout, assembly = plgpu.Layout.WGMMA, _ASSEMBLY[ref.dtype]
    transforms = (plgpu.TilingTransform((8, row)), plgpu.SwizzleTransform(row))

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(transforms),),
        return_type=plgpu.ShapeDtypeStruct((64, DEPTH), jnp.dtype(jnp.bfloat16), layout),
    )
    def call(_, ref):
        arith, c, me = mgpu.utils.arith, mgpu.utils.c, Thread()
        first = shared_address(ref)
        registers = np.empty(layout.to_mgpu().registers_shape((64, DEPTH)), dtype=object)
        eight, place = _first_row(me, order)
        first = arith.addi(first, arith.muli(eight, c(8 * DEPTH, me.i32)))
        for h in range(2):  # rows of the product lie eight apart; in order they come from two apart
            offset = 8 * DEPTH * h if order is None else 0
            if order is not None and h:
                place = arith.addi(place, c(2, me.i32))
            base = arith.addi(first, arith.muli(place, c(row, me.i32)))
            # The swizzle: within a tile of eight rows the place of 16 bytes depends on the row.
            turn = place if row == 128 else arith.shrui(place, c(1, me.i32))
            for part in range(2):  # of the 32 bytes
                chunk = me.t
                if row == 128:
                    chunk = arith.addi(arith.muli(me.t, c(2, me.i32)), c(part, me.i32))
                at = arith.addi(base, arith.muli(arith.xori(chunk, turn), c(16, me.i32)))
                behind = offset + (8 * row * part if row == 64 else 0)
                for j, word in enumerate(load_shared(at, behind)):
                    for pair, signs in enumerate(_SIGNS):
                        index = 2 * (4 * part + j) + pair
                        made = mgpu.utils.inline_ptx(
                            f"{{ .reg .b32 x, y, z; prmt.b32 x, $1, 0, 0x{signs:X}; {assembly} }}",
                            word,
                            result_types=me.i32,
                        )
                        registers[0, index, 0, 0, h, 0, 0, 0, 0] = two_numbers(made)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

    return call(ref)


def _first_row(me, order):
    """The row of the 128 that is row 16 w + g of a product: its tile of eight, and where in it."""
    arith, c = mgpu.utils.arith, mgpu.utils.c
    times = lambda x, by: arith.muli(x, c(by, me.i32))  # noqa: E731
    wg = arith.shrui(me.thread, c(7, me.i32))
    if order is None:
        return arith.addi(times(wg, 8), times(me.warp, 2)), me.g
    # The inverse of `in_order`: what it puts at 16 j + 8 h + 2 t + e stands at 4 j + 2 h + e of a
    # quarter t of the order; here t = g // 2, e = g % 2, and j = w, or 4 wg + w where 128 are one.
    t, e = arith.shrui(me.g, c(1, me.i32)), arith.andi(me.g, c(1, me.i32))
    by_wg, by_t = (2, 4) if order == 128 else (8, 2)
    eight = arith.addi(times(wg, by_wg), times(t, by_t))
    eight = arith.addi(eight, arith.shrui(me.warp, c(1, me.i32)))
    return eight, arith.addi(times(arith.andi(me.warp, c(1, me.i32)), 4), e)


def all_have_read() -> None:
    """Waits until all threads of the warpgroup have in registers what they have read.

    Copies may then write over it: they need no fence after reads.
    """

    @plgpu.inline_mgpu()
    def call(_):
        mgpu.warpgroup_barrier()

    call()
