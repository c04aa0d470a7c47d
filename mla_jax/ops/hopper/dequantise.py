"""fp8 latents from device memory to tiles of bfloat16 in shared memory: the decode kernel's producer.

A number of e4m3 becomes one of bfloat16 by its bits. The byte's sign, four bits of exponent and
three of significand go where bfloat16 has its sign, the last four bits of its exponent and the
first three of its significand; then the number is 2^120 too small, the numbers below e4m3's normal
range too, and one multiplication by 2^120 and the scale, itself a power of two, makes it exact.
That is four instructions for two numbers, where a conversion by way of float32 takes a dozen.

None of this runs in the interpreter.

A thread of the warpgroup holds, of a tile [64, C], 16 channels of a slot in every load: 8 lanes lie
on 8 slots, so that their stores of 16 bytes go to different banks of the swizzled tile, and 4 on 64
channels, so that they load 64 bytes side by side.

Letters: R latent width, G groups of 128 channels, C = R / 2 channels of a tile.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.cache.scaled import GROUP
from mla_jax.ops.hopper.schedule import BLOCK

_COLUMNS = 64  # channels of a load: 4 lanes of 16
_ROWS = (0, 32)  # of a thread, beyond its first: 4 warps of 8 slots
_LARGE = 2.0**7  # the largest scale whose product with 2^120 is a bfloat16
_SPLAT = plgpu.Layout.WG_SPLAT
SCALES = plgpu.Layout.WG_STRIDED((512,), 4)  # two groups of two slots a thread


def codes_layout(columns: int):
    """The layout of a tile's bytes in registers, as int32 [32 C]: a vector of 4 for every load."""
    return plgpu.Layout.WG_STRIDED((BLOCK * columns // 4,), 4)


def held_types(columns: int):
    """What `load` returns: the bytes of a tile and their scales."""
    layout = codes_layout(columns)
    codes = plgpu.ShapeDtypeStruct((BLOCK * columns // 4,), jnp.dtype(jnp.int32), layout)
    return codes, plgpu.ShapeDtypeStruct((512,), jnp.dtype(jnp.float32), SCALES)


def load(latent, scale, source, live, half: int, columns: int):
    """The bytes of half `half` of the block that begins at slot `source`, and their scales.

    Slots from `live` on are not read: they are zeros.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), _SPLAT, _SPLAT),
        return_type=held_types(columns),
    )
    def call(_, latent, scale, source, live):
        tile = _Tile(latent, scale, source, live, half, columns)
        return tile.held([tile.load(*where) for where in tile.places], tile.load_scales())

    return call(latent, scale, source, live)


def turn(buffer, codes, scales, half: int, latent, scale, source, live, then: int, transforms):
    """Stores a loaded tile of half `half` in bfloat16 and loads the next one meanwhile.

    Args:
        buffer: in shared memory, [64, C], of these transforms.
        codes, scales: what `load` gave for it.
        latent, scale, source, live, then: as `load` takes them, of the next tile.
    """
    columns = buffer.shape[-1]

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(transforms),
            codes_layout(columns),
            SCALES,
            plgpu.RefType(),
            plgpu.RefType(),
            _SPLAT,
            _SPLAT,
        ),
        return_type=held_types(columns),
    )
    def call(_, buffer, codes, scales, latent, scale, source, live):
        after = _Tile(latent, scale, source, live, then, columns)
        store = _Store(buffer, scales, half, columns)
        loaded = []
        for where, register in zip(after.places, codes.registers, strict=True):
            store(*where, register)
            loaded.append(after.load(*where))
        held = after.held(loaded, after.load_scales())
        store.enlarge()
        return held

    return call(buffer, codes, scales, latent, scale, source, live)


def prefetch(latent, scale, rope, source, live, step: int):
    """Asks for the `live` first slots of a step of 128 to be brought to the L2 cache.

    The loads above wait for what they ask; so many bytes in flight as device memory wants would not
    fit the registers.
    """
    refs = [ref for ref in (latent, scale, rope) if ref is not None]

    @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType() for _ in refs], _SPLAT, _SPLAT))
    def call(_, *args):
        *refs, source, live = args
        arith, i32 = mgpu.utils.arith, mgpu.utils.ir.IntegerType.get_signless(32)
        source, live = (x.registers.item() for x in (source, live))
        each = mgpu.utils.c(step // 4, i32)
        warp = arith.andi(mgpu.utils.warp_idx(), mgpu.utils.c(3, i32))
        first = arith.muli(warp, each)
        count = arith.minsi(arith.subi(live, first), each)
        some = arith.cmpi(arith.CmpIPredicate.sgt, count, mgpu.utils.c(0, i32))
        elected = mgpu.utils.nvvm.elect_sync()
        with mgpu.utils.when(arith.andi(elected, some)):
            for ref in refs:
                width = _row_bytes(ref)
                if width % 16:  # what it asks of addresses and sizes
                    continue
                address = _address(ref, arith.addi(source, first), width)
                size = arith.muli(count, mgpu.utils.c(width, i32))
                mgpu.utils.inline_ptx(
                    "cp.async.bulk.prefetch.L2.global [$0], $1;",
                    address,
                    size,
                    has_side_effects=True,
                )

    call(*refs, source, live)


class _Tile:
    """Where this thread's bytes of a tile lie in device memory."""

    def __init__(self, latent, scale, source, live, half, columns):
        arith, c = mgpu.utils.arith, mgpu.utils.c
        self.columns, self.half = columns, half
        self.places = [(i, j) for i in range(len(_ROWS)) for j in range(columns // _COLUMNS)]
        row, quad = _lanes()
        self.i32 = row.type
        self.live = [
            arith.cmpi(
                arith.CmpIPredicate.slt, arith.addi(row, c(r, self.i32)), live.registers.item()
            )
            for r in _ROWS
        ]
        self.width, self.groups = _row_bytes(latent), _row_bytes(scale) // 4
        slot = arith.addi(source.registers.item(), row)
        at = _address(latent, slot, self.width)
        i64 = at.type
        lane = arith.extui(i64, arith.muli(quad, c(16, self.i32)))
        self.at = arith.addi(at, lane)
        self.scale_at = _address(scale, slot, 4 * self.groups)
        self.first_group, self.last_group = _groups_of(half, columns)

    def load(self, i, j):
        """16 bytes: channels 64 j on of this thread's slot i."""
        offset = _ROWS[i] * self.width + self.half * self.columns + j * _COLUMNS
        words = mgpu.utils.inline_ptx(
            "{ .reg .pred p; setp.ne.b32 p, $5, 0; "
            "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
            f"@p ld.global.nc.L1::no_allocate.v4.b32 {{$0, $1, $2, $3}}, [$4 + {offset}]; }}",
            self.at,
            mgpu.utils.arith.extui(self.i32, self.live[i]),
            result_types=[self.i32] * 4,
            has_side_effects=True,
        )
        return mgpu.utils.vector.from_elements(
            mgpu.utils.ir.VectorType.get((4,), self.i32), list(words)
        )

    def load_scales(self):
        """Of both slots and both groups that the tile's channels may belong to."""
        f32 = mgpu.utils.ir.F32Type.get()
        values = []
        for i, row in enumerate(_ROWS):
            for group in (self.first_group, self.last_group):
                offset = 4 * (row * self.groups + group)
                values.append(
                    mgpu.utils.inline_ptx(
                        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; "
                        f"@p ld.global.nc.f32 $0, [$1 + {offset}]; }}",
                        self.scale_at,
                        mgpu.utils.arith.extui(self.i32, self.live[i]),
                        result_types=f32,
                        has_side_effects=True,
                    )
                )
        return mgpu.utils.vector.from_elements(mgpu.utils.ir.VectorType.get((4,), f32), values)

    def held(self, codes, scales):
        """These registers as arrays."""
        arrays = []
        for kind, registers, signed in zip(
            held_types(self.columns), (codes, [scales]), (True, None), strict=True
        ):
            flat = np.empty((len(registers),), dtype=object)
            flat[:] = registers
            arrays.append(
                mgpu.FragmentedArray(
                    _registers=flat, _layout=kind.layout.to_mgpu(), _is_signed=signed
                )
            )
        return tuple(arrays)


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
        base = mgpu.utils.llvm.ptrtoint(self.i32, mgpu.utils.memref_ptr(buffer))
        at = arith.addi(base, arith.muli(outer, c(1024 * columns // _COLUMNS, self.i32)))
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
            f"{{ .reg .f32 f; .reg .b32 x; min.f32 f, $1, 0f{_bits(_LARGE)}; "
            f"mul.f32 f, f, 0f{_bits(2.0**120)}; mov.b32 x, f; prmt.b32 $0, x, x, 0x3232; }}",
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
        for n in range(4):
            word = mgpu.utils.vector.extract(codes, dynamic_position=[], static_position=[n])
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


def _row_bytes(ref):
    kind = mgpu.utils.ir.MemRefType(ref.type)
    return kind.shape[-1] * mgpu.utils.bitwidth(kind.element_type) // 8


def _address(ref, row, width):
    """Where a row of an array in device memory begins, as a number of 64 bits."""
    arith, i64 = mgpu.utils.arith, mgpu.utils.ir.IntegerType.get_signless(64)
    base = mgpu.utils.llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))
    row = arith.muli(arith.extsi(i64, row), mgpu.utils.c(width, i64))
    return arith.addi(base, row)


def _bits(x):
    return f"{int(np.float32(x).view(np.uint32)):08X}"
