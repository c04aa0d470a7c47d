"""Queries become right sides of products with what `fragments.py` makes of latents in fp8.

They come into shared memory as they are. There the two warpgroups bring their channels into the
order of the left sides, and what meets latents into float16: all queries of a tile are multiplied
with the power of two that makes the largest of them 2^14 to 2^15, which float16 holds exactly down
to 2^-32 of that. Infinities and NaN stay what they are, and do not count.

None of this runs in the interpreter.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper.columns import RANK, SPLAT, WIDTH, tiles_of
from mla_jax.ops.hopper.mosaic import load_shared, shared_address

_PATTERN, _ROTARY = range(RANK // 64), range(RANK // 64, RANK // 64 + 1)  # pieces
_LARGEST = 14  # log2 of what the largest query becomes at least
_TILES = tiles_of(jnp.bfloat16)


def clear(largest) -> None:
    """Sets int32 [1] in shared memory to zero."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def call(_, largest):
        mgpu.utils.inline_ptx(
            "{ .reg .b32 x; mov.b32 x, 0; st.shared.b32 [$0], x; }",
            shared_address(largest),
            has_side_effects=True,
        )

    call(largest)


def find_largest(queries, largest) -> None:
    """Raises `largest` to the bits of the largest finite magnitude of queries [9, 16, 64].

    The rotary piece, which stays in bfloat16, does not count.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(_TILES), plgpu.RefType()))
    def call(_, queries, largest):
        i32 = mgpu.utils.ir.IntegerType.get_signless(32)
        best = mgpu.utils.c(0, i32)
        for word in _unit(queries, _PATTERN).load():
            # What is not finite becomes negative.
            best = mgpu.utils.inline_ptx(
                "{ .reg .b32 x; and.b32 x, $1, 0x7fff7fff; add.u32 x, x, 0x00800080; "
                "max.s16x2 $0, x, $2; }",
                word,
                best,
                result_types=i32,
            )
        mgpu.utils.inline_ptx(
            "{ .reg .s16 x, y; .reg .b32 z; mov.b32 {x, y}, $1; max.s16 x, x, y; cvt.s32.s16 z, x; "
            "redux.sync.max.s32 z, z, 0xffffffff; red.shared.max.s32 [$0], z; }",
            shared_address(largest),
            best,
            has_side_effects=True,
            convergent=True,
        )

    call(queries, largest)


def turn(queries, largest):
    """Brings queries into the order and the units of left sides; returns what undoes the units."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(_TILES), plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.float32), SPLAT),
    )
    def call(_, queries, largest):
        f32 = mgpu.utils.ir.F32Type.get()
        # The bits are those of bfloat16, and 2^7 more for what is finite.
        factor, inverse = mgpu.utils.inline_ptx(
            "{ .reg .b32 x; ld.shared.b32 x, [$2]; sub.s32 x, x, 0x80; shr.s32 x, x, 7; "
            f"max.s32 x, x, {_LARGEST + 10}; sub.s32 x, {_LARGEST + 2 * 127}, x; shl.b32 x, x, 23; "
            "mov.b32 $0, x; sub.s32 x, 0x7F000000, x; mov.b32 $1, x; }",
            shared_address(largest),
            result_types=[f32] * 2,
            has_side_effects=True,
        )
        unit = _unit(queries, _PATTERN)
        turned = unit.times(
            factor,
            "{ .reg .b32 x; .reg .f32 a, b; shl.b32 x, $1, 16; mov.b32 a, x; "
            "and.b32 x, $1, 0xffff0000; mov.b32 b, x; mul.f32 a, a, $2; mul.f32 b, b, $2; "
            "cvt.rn.f16x2.f32 $0, b, a; }",
        )
        for j, h in np.ndindex(4, 2):
            unit.store(2 * j + h, [turned[8 * t + 2 * j + h] for t in range(4)])
        unit = _unit(queries, _ROTARY)
        turned = unit.times(
            factor,
            "{ .reg .b32 x; mov.b32 x, $2; prmt.b32 x, x, x, 0x3232; mul.rn.bf16x2 $0, $1, x; }",
        )
        for b, p in np.ndindex(2, 4):
            unit.store(4 * b + p, [turned[16 * b + 4 * t + p] for t in range(4)])
        return mgpu.FragmentedArray.splat(inverse, ())

    return call(queries, largest)


class _Unit:
    """A query's channels of a piece: eight chunks of 16 bytes, of which this thread may store."""

    def __init__(self, row, base, live):
        self.row, self.base, self.live = row, base, live

    def chunk(self, part):
        arith, c = mgpu.utils.arith, mgpu.utils.c
        inner = arith.andi(self.row, c(7, self.row.type))
        place = arith.xori(inner, c(part, self.row.type))
        return arith.addi(self.base, arith.muli(place, c(16, self.row.type)))

    def load(self):
        return [word for part in range(8) for word in load_shared(self.chunk(part), 0)]

    def times(self, factor, assembly):
        """What assembly makes of each word, of two numbers, and a factor."""
        return [
            mgpu.utils.inline_ptx(assembly, word, factor, result_types=self.row.type)
            for word in self.load()
        ]

    def store(self, part, words):
        mgpu.utils.inline_ptx(
            "{ .reg .pred p; setp.ne.b32 p, $5, 0; @p st.shared.v4.b32 [$0], {$1, $2, $3, $4}; }",
            self.chunk(part),
            *words,
            self.live,
            has_side_effects=True,
        )


def _unit(queries, pieces):
    """The query and the piece, one of `pieces`, that this thread of 256 takes.

    Threads past the end repeat the last one, and store nothing.
    """
    arith, c = mgpu.utils.arith, mgpu.utils.c
    thread = mgpu.utils.thread_idx()
    i32, units = thread.type, len(pieces) * WIDTH
    live = arith.cmpi(arith.CmpIPredicate.slt, thread, c(units, i32))
    index = arith.minsi(thread, c(units - 1, i32))
    row = arith.andi(index, c(WIDTH - 1, i32))
    piece = arith.addi(arith.divui(index, c(WIDTH, i32)), c(pieces[0], i32))
    at = arith.muli(piece, c(128 * WIDTH, i32))
    at = arith.addi(at, arith.muli(row, c(128, i32)))
    return _Unit(row, arith.addi(shared_address(queries), at), arith.extui(i32, live))
