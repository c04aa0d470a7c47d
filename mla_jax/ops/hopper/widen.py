"""8-bit numbers from shared memory as the 16-bit left side of matrix products, in registers.

An e4m3 number's bits stand in a bfloat16's place for exponent and mantissa: it is 2^120 times
smaller then, subnormal numbers included, and a product with 2^120 makes it right, exactly. Five
operations make two numbers, where the conversion by way of float16 and float32 takes eight.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

_UPCAST = plgpu.Layout.WGMMA_UPCAST_2X
_E4M3 = """{
.reg .b32 lo, hi, mlo, mhi, up, over, zero;
mov.b32 up, 0x7B807B80;
mov.b32 over, 0x7B107B10;
mov.b32 zero, 0;
prmt.b32 lo, $2, 0, 0x1404;
prmt.b32 hi, $2, 0, 0x3424;
shr.u32 mlo, lo, 4;
shr.u32 mhi, hi, 4;
and.b32 mlo, mlo, 0x07f007f0;
and.b32 mhi, mhi, 0x07f007f0;
and.b32 lo, lo, 0x80008000;
and.b32 hi, hi, 0x80008000;
or.b32 lo, lo, mlo;
or.b32 hi, hi, mhi;
mul.rn.bf16x2 lo, lo, up;
mul.rn.bf16x2 hi, hi, up;
mul.rn.bf16x2 mlo, lo, over;
mul.rn.bf16x2 mhi, hi, over;
fma.rn.bf16x2 $0, mlo, zero, lo;
fma.rn.bf16x2 $1, mhi, zero, hi;
}"""


def widened(ref, dtype):
    """The numbers [64 K] of float8_e4m3fn or int8 in bfloat16, as matrix products take them."""
    narrow = ref.dtype
    loaded = plgpu.load(ref, layout=_UPCAST, optimized=False)
    if narrow != jnp.float8_e4m3fn:
        return plgpu.layout_cast(loaded.astype(dtype), plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(
        arg_types=(_UPCAST,),
        return_type=plgpu.ShapeDtypeStruct(ref.shape, dtype, plgpu.Layout.WGMMA),
    )
    def call(_, x):
        ir, llvm, utils = mgpu.utils.ir, mgpu.utils.llvm, mgpu.utils
        i32 = ir.IntegerType.get_signless(32)
        pair = llvm.StructType.get_literal([i32, i32])
        registers = np.empty_like(x.registers)
        for index, register in np.ndenumerate(x.registers):
            word = utils.bitcast(register, i32)
            made: Any = llvm.inline_asm(pair, [word], _E4M3, "=r,=r,r")
            words = [llvm.extractvalue(i32, made, [i]) for i in range(2)]
            words = [utils.bitcast(word, ir.VectorType.get((1,), i32)) for word in words]
            both = utils.vector_concat(words)
            kind = ir.VectorType.get((4,), ir.BF16Type.get())
            registers[index] = utils.vector.bitcast(kind, both)
        wide = mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)
        return wide.to_layout(plgpu.Layout.WGMMA.to_mgpu())

    return call(loaded)
