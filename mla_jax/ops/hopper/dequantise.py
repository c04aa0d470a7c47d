"""Tiles of fp8 latents become tiles of bfloat16 in shared memory: the decode kernel's producer.

A number of e4m3 becomes one of bfloat16 by its bits. The byte's sign, four bits of exponent and
three of significand go where bfloat16 has its sign, the last four bits of its exponent and the
first three of its significand; then the number is 2^120 too small, the numbers below e4m3's normal
range too, and one multiplication by 2^120 and the scale, itself a power of two, makes it exact.
That is four instructions for two numbers, where a conversion by way of float32 takes a dozen.

None of this runs in the interpreter.

Bytes and bfloat16 share the tile's memory: bytes lie in its upper half, [64, C] in rows of 64 or
128 swizzled bytes. The first 32 slots go to the lower half, where nothing lies; the last 32 go
where the bytes lay, once the warpgroup has all of these in registers.

A thread of the warpgroup takes, for every 32 slots, one slot and 16 of every 64 channels. 8 lanes
lie on 8 slots, so that their loads and stores of 16 bytes go to different banks, and 4 on 64
channels.

Letters: R latent width, G groups of 128 channels, C = R / 2 channels of a tile.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.cache.scaled import GROUP
from mla_jax.ops.hopper.mosaic import load_shared, shared_address
from mla_jax.ops.hopper.schedule import BLOCK

_COLUMNS = 64  # channels of a load: 4 lanes of 16
_ROWS = (0, 32)  # of a thread, beyond its first: 4 warps of 8 slots
_LARGE = 2.0**7  # the largest scale whose product with 2^120 is a bfloat16
_SPLAT = plgpu.Layout.WG_SPLAT
_SCALES = plgpu.Layout.WG_STRIDED((512,), 4)  # two groups of two slots a thread


def swizzle(columns: int) -> int:
    """How many bytes of a slot lie side by side in the layout of a tile's bytes."""
    return 64 if columns % 128 else 128


def load_scales(scale, source, live, half: int, columns: int):
    """The scales of half `half` of the block that begins at slot `source`, in registers.

    Slots from `live` on are not read: their scales are zeros, and so will be their numbers.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), _SPLAT, _SPLAT),
        return_type=plgpu.ShapeDtypeStruct((512,), jnp.dtype(jnp.float32), _SCALES),
    )
    def call(_, scale, source, live):
        arith, c = mgpu.utils.arith, mgpu.utils.c
        row, _ = _lanes()
        i32, f32 = row.type, mgpu.utils.ir.F32Type.get()
        groups = row_bytes(scale) // 4
        at = address(scale, arith.addi(source.registers.item(), row), 4 * groups)
        live = live.registers.item()
        values = []
        for slot in _ROWS:
            is_live = arith.cmpi(arith.CmpIPredicate.slt, arith.addi(row, c(slot, i32)), live)
            is_live = arith.extui(i32, is_live)
            for group in _groups_of(half, columns):
                values.append(
                    mgpu.utils.inline_ptx(
                        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; "
                        f"@p ld.global.nc.f32 $0, [$1 + {4 * (slot * groups + group)}]; }}",
                        at,
                        is_live,
                        result_types=f32,
                        has_side_effects=True,
                    )
                )
        register = mgpu.utils.vector.from_elements(mgpu.utils.ir.VectorType.get((4,), f32), values)
        flat = np.empty((1,), dtype=object)
        flat[:] = [register]
        return mgpu.FragmentedArray(_registers=flat, _layout=_SCALES.to_mgpu(), _is_signed=None)

    return call(scale, source, live)


def turn(buffer, scales, half: int, transforms):
    """Turns the bytes of a tile into bfloat16.

    Args:
        buffer: the tile in shared memory, [64, C], of these transforms.
        scales: what `load_scales` gave for it.
        half: which half of a latent it holds.
    """
    columns = buffer.shape[-1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), _SCALES))
    def call(_, buffer, scales):
        raw, store = _Raw(buffer, columns), _Store(buffer, scales, half, columns)
        each = range(columns // _COLUMNS)
        low, high = [raw.load(0, j) for j in each], []
        for j, codes in zip(each, low, strict=True):
            store(0, j, codes)
            high.append(raw.load(1, j))  # not before, as registers are few
        mgpu.warpgroup_barrier()
        for j, codes in zip(each, high, strict=True):
            store(1, j, codes)
        store.enlarge()

    call(buffer, scales)


class _Raw:
    """A tile's bytes in shared memory: [8, C / w, 8, w], w bytes swizzled."""

    def __init__(self, buffer, columns):
        arith, c = mgpu.utils.arith, mgpu.utils.c
        self.columns, self.width = columns, swizzle(columns)
        row, quad = _lanes()
        i32 = row.type
        inner = arith.andi(row, c(7, i32))
        outer = arith.shrui(row, c(3, i32))
        at = arith.addi(shared_address(buffer), arith.muli(outer, c(8 * columns, i32)))
        at = arith.addi(at, arith.muli(inner, c(self.width, i32)))
        key = inner if self.width == 128 else arith.shrui(inner, c(1, i32))
        # The four chunks of 16 bytes of channels 0 to 63 of this slot, and those of 64 to 127.
        self.at = []
        for first in range(0, self.width // 16, 4):
            chunk = arith.xori(arith.addi(quad, c(first, i32)), key)
            self.at.append(arith.addi(at, arith.muli(chunk, c(16, i32))))

    def load(self, i, j):
        """16 bytes: channels 64 j on of this thread's slot i."""
        square, within = divmod(j * _COLUMNS, self.width)
        offset = BLOCK * self.columns + _ROWS[i] * self.columns + square * 8 * self.width
        return load_shared(self.at[within // _COLUMNS], offset)


class _Store:
    """Stores a tile in bfloat16; `buffer` is [8, C / 64, 8, 64] in 128 swizzled bytes a row."""

    def __init__(self, buffer, scales, half, columns):
        arith, c, ir = mgpu.utils.arith, mgpu.utils.c, mgpu.utils.ir
        self.i32, self.f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        self.columns, self.half = columns, half
        self.first_group = _groups_of(half, columns)[0]
        row, quad = _lanes()
        inner = arith.andi(row, c(7, self.i32))  # of the eight rows of a swizzled square
        outer = arith.shrui(row, c(3, self.i32))
        at = arith.muli(outer, c(1024 * columns // _COLUMNS, self.i32))
        at = arith.addi(shared_address(buffer), at)
        at = arith.addi(at, arith.muli(inner, c(128, self.i32)))
        chunk = arith.xori(arith.muli(quad, c(2, self.i32)), inner)
        self.at = arith.addi(at, arith.muli(chunk, c(16, self.i32)))
        self.odd = arith.xori(self.at, c(16, self.i32))
        [register] = scales.registers
        self.scale = [
            mgpu.utils.vector.extract(register, dynamic_position=[], static_position=[n])
            for n in range(4)
        ]
        self.factor = [self._factor(scale) for scale in self.scale]

    def _ptx(self, text, *args):
        return mgpu.utils.inline_ptx(text, *args, result_types=self.i32)

    def _factor(self, scale):
        """2^120 and the scale, twice in a register; of a NaN and of a large scale, a finite one."""
        return self._ptx(
            f"{{ .reg .f32 f; .reg .b32 x; min.f32 f, $1, 0f{bits(_LARGE)}; "
            f"mul.f32 f, f, 0f{bits(2.0**120)}; mov.b32 x, f; prmt.b32 $0, x, x, 0x3232; }}",
            scale,
        )

    def _which(self, i, j):
        channel = self.half * self.columns + j * _COLUMNS
        return 2 * i + channel // GROUP - self.first_group

    def _places(self, i, j):
        offset = (_ROWS[i] // 8 * (self.columns // _COLUMNS) + j) * 1024
        return [(self.at, offset), (self.odd, offset)]

    def __call__(self, i, j, codes):
        factor, words = self.factor[self._which(i, j)], []
        for word in codes:
            # Two bytes, each below eight copies of its sign; shifted by four, then masked.
            for pick in ("0x9180", "0xB3A2"):
                words.append(
                    self._ptx(
                        f"{{ .reg .b32 x; prmt.b32 x, $1, 0, {pick}; shl.b32 x, x, 4; "
                        "and.b32 x, x, 0x87f087f0; mul.rn.bf16x2 $0, x, $2; }",
                        word,
                        factor,
                    )
                )
        for (at, offset), four in zip(self._places(i, j), (words[:4], words[4:]), strict=True):
            mgpu.utils.inline_ptx(
                f"st.shared.v4.b32 [$0 + {offset}], {{$1, $2, $3, $4}};",
                at,
                *four,
                has_side_effects=True,
            )

    def enlarge(self):
        """Multiplies what was stored with what of a scale was left, if any scale was so large.

        A NaN comes here as well, because it is not small.
        """
        arith, c = mgpu.utils.arith, mgpu.utils.c
        large = [
            arith.cmpf(arith.CmpFPredicate.UGT, scale, c(_LARGE, self.f32)) for scale in self.scale
        ]
        some = arith.ori(arith.ori(large[0], large[1]), arith.ori(large[2], large[3]))
        with mgpu.utils.when(some):
            rest = [
                arith.select(is_large, arith.mulf(scale, c(1 / _LARGE, self.f32)), c(1.0, self.f32))
                for is_large, scale in zip(large, self.scale, strict=True)
            ]
            rest = [
                self._ptx("{ .reg .b32 x; mov.b32 x, $1; prmt.b32 $0, x, x, 0x3232; }", x)
                for x in rest
            ]
            for i in range(len(_ROWS)):
                for j in range(self.columns // _COLUMNS):
                    for at, offset in self._places(i, j):
                        mgpu.utils.inline_ptx(
                            "{ .reg .b32 a, b, c, d; "
                            f"ld.shared.v4.b32 {{a, b, c, d}}, [$0 + {offset}]; "
                            "mul.rn.bf16x2 a, a, $1; mul.rn.bf16x2 b, b, $1; "
                            "mul.rn.bf16x2 c, c, $1; mul.rn.bf16x2 d, d, $1; "
                            f"st.shared.v4.b32 [$0 + {offset}], {{a, b, c, d}}; }}",
                            at,
                            rest[self._which(i, j)],
                            has_side_effects=True,
                        )


def _groups_of(half, columns):
    """The first and the last group of 128 channels to which a tile's channels belong."""
    return half * columns // GROUP, (half * columns + columns - 1) // GROUP


def _lanes():
    """This thread's first slot of a tile, and which 16 of 64 channels it has."""
    arith, c = mgpu.utils.arith, mgpu.utils.c
    thread = mgpu.utils.thread_idx()
    i32 = thread.type
    in_warp = arith.andi(thread, c(31, i32))
    warp = arith.andi(arith.shrui(thread, c(5, i32)), c(3, i32))
    row = arith.addi(arith.muli(warp, c(8, i32)), arith.andi(in_warp, c(7, i32)))
    return row, arith.shrui(in_warp, c(3, i32))


def row_bytes(ref):
    kind = mgpu.utils.ir.MemRefType(ref.type)
    return kind.shape[-1] * mgpu.utils.bitwidth(kind.element_type) // 8


def address(ref, row, width):
    """Where a row of an array in device memory begins, as a number of 64 bits."""
    arith, i64 = mgpu.utils.arith, mgpu.utils.ir.IntegerType.get_signless(64)
    base = mgpu.utils.llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))
    row = arith.muli(arith.extsi(i64, row), mgpu.utils.c(width, i64))
    return arith.addi(base, row)


def bits(x):
    return f"{int(np.float32(x).view(np.uint32)):08X}"
