"""Register-level pieces of the choice of slots: what Pallas has no words for.

None of them runs in the interpreter; `interpreted.py` does without them. A warpgroup handles GROUP
numbers at once, four neighbours a thread, so that a warp has WARP of them side by side.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

GROUP, WARP, BINS, LANES = 512, 128, 256, 32
FOURS = plgpu.Layout.WG_STRIDED((GROUP,), vec_size=4)
SPLAT = plgpu.Layout.WG_SPLAT
_REF = plgpu.RefType()
_INT = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), SPLAT)


def load_scores(ref, row, start, limit):
    """float32 ref[row, start : start + GROUP], of which nothing from `limit` on need be there.

    Four neighbours are loaded if the first of them lies below the limit, and are -inf if not.
    """
    result = plgpu.ShapeDtypeStruct((GROUP,), jnp.dtype(jnp.float32), FOURS)

    @plgpu.inline_mgpu(arg_types=(_REF, SPLAT, SPLAT, SPLAT), return_type=result)
    def load(_, ref, row, start, limit):
        slot = _add(_scalar(start), _mul(_lane(127), 4))
        width = mgpu.utils.ir.MemRefType(ref.type).shape[-1]
        at = _add(_mul64(_wide(_scalar(row)), width), _wide(slot))
        words = mgpu.utils.inline_ptx(
            "{ .reg .pred p; setp.lt.s32 p, $5, $6; mov.b32 $0, 0xff800000; mov.b32 $1, $0; "
            "mov.b32 $2, $0; mov.b32 $3, $0; @p ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }",
            _global(ref, at),
            slot,
            _scalar(limit),
            result_types=[_i32()] * 4,
            has_side_effects=True,
        )
        return _from_words(words, mgpu.utils.ir.F32Type.get())

    return load(ref, row, start, limit)


def count_digits(ref, keys, prefix, shift: int, dummy, apart: bool = False) -> None:
    """ref[d] += 1 for every key whose bits above shift + 8 are `prefix`, and d the eight below.

    The sign bit counts the other way, so that digits order as keys do. Keys that do not agree are
    counted in dummy[0]: a branch around each of them takes longer. Threads of whose four keys none
    agrees go on at once.

    With `apart` it is ref[32 d + lane] += 1: the lanes of a warp, which add to one number one after
    the other, never meet. `add_lanes` sums these.
    """
    size = 7 if apart else 2  # 2^size bytes from a digit's number to the next one's

    @plgpu.inline_mgpu(arg_types=(_REF, FOURS, SPLAT, _REF))
    def count(_, ref, keys, prefix, dummy):
        base = _shared(ref)
        if apart:
            base = _add(base, _mul(_lane(31), 4))
        if shift == 24:
            for key in _words(keys):
                mgpu.utils.inline_ptx(
                    "{ .reg .u32 d; xor.b32 d, $1, 0x80000000; shr.u32 d, d, 24; "
                    f"shl.b32 d, d, {size}; add.u32 d, d, $0; red.shared.add.u32 [d], 1; }}",
                    base,
                    key,
                    has_side_effects=True,
                )
            return
        # How far a key lies above the first that agrees, in integers without a sign.
        first = mgpu.utils.arith.shli(_scalar(prefix), _c(shift + 8))
        first = mgpu.utils.arith.xori(first, _c(-(2**31)))
        body = [".reg .pred p0, p1, p2, p3, any; .reg .u32 d0, d1, d2, d3;"]
        for i in range(4):
            body.append(f"sub.u32 d{i}, ${i + 1}, $5; setp.lt.u32 p{i}, d{i}, {1 << (shift + 8)};")
        body.append("or.pred any, p0, p1; or.pred any, any, p2; or.pred any, any, p3;")
        body.append("@!any bra none;")
        for i in range(4):
            body.append(
                f"shr.u32 d{i}, d{i}, {shift}; shl.b32 d{i}, d{i}, 2; add.u32 d{i}, d{i}, $0; "
                f"selp.b32 d{i}, d{i}, $6, p{i}; red.shared.add.u32 [d{i}], 1;"
            )
        mgpu.utils.inline_ptx(
            f"{{ {' '.join(body)} none: }}",
            base,
            *_words(keys),
            first,
            _shared(dummy),
            has_side_effects=True,
        )

    count(ref, keys, prefix, dummy)


def add_lanes(ref, lanes, warpgroups: int) -> None:
    """ref[d] = the sum of lanes[32 d : 32 d + 32], by all warps of a block."""

    @plgpu.inline_mgpu(arg_types=(_REF, _REF))
    def call(_, ref, lanes):
        warps = 4 * warpgroups
        warp = mgpu.utils.arith.shrui(mgpu.utils.thread_idx(), _c(5))
        base = _add(_shared(lanes), _add(_mul(warp, 4 * LANES), _mul(_lane(31), 4)))
        to = _add(_shared(ref), _mul(warp, 4))
        loaded = [
            mgpu.utils.inline_ptx(
                f"ld.shared.b32 $0, [$1 + {4 * LANES * first}];",
                base,
                result_types=_i32(),
                has_side_effects=True,
            )
            for first in range(0, BINS, warps)
        ]
        for i, count in enumerate(loaded):
            mgpu.utils.inline_ptx(
                "{ .reg .pred p; .reg .u32 s; redux.sync.add.u32 s, $1, 0xffffffff; "
                f"setp.eq.u32 p, $2, 0; @p st.shared.b32 [$0 + {4 * warps * i}], s; }}",
                to,
                count,
                _lane(31),
                has_side_effects=True,
                convergent=True,
            )

    call(ref, lanes)


def find_digit(ref, found, want, blocks: int) -> None:
    """Finds the bin with the `want`-th of all that is counted in the first `blocks` blocks.

    found[0] becomes that bin and found[1] how many are in the bins before it. Where fewer are
    counted than wanted, it is the last bin. One warpgroup calls this; found[4:8] is its scratch.
    """

    @plgpu.inline_mgpu(arg_types=(_REF, _REF, SPLAT))
    def find(_, ref, found, want):
        base = _add(_shared(ref), _mul(_lane(127), 8))
        pairs = [_load_pair(base, block if blocks > 1 else None) for block in range(blocks)]
        first, second = (_sum(x) for x in zip(*pairs, strict=True))
        before, _ = _scan(_add(first, second), _shared(found))
        middle = _add(before, first)
        after = _add(middle, second)
        mgpu.utils.inline_ptx(
            "{ .reg .pred p, q, r, e; .reg .u32 d; "
            "shl.b32 d, $5, 1; setp.lt.s32 p, $1, $4; setp.le.and.s32 q, $4, $2, p; "
            "@q st.shared.v2.b32 [$0], {d, $1}; "
            "setp.lt.s32 p, $2, $4; setp.le.s32 r, $4, $3; setp.eq.s32 e, $5, 127; or.pred r, r, e;"
            "and.pred p, p, r; add.u32 d, d, 1; @p st.shared.v2.b32 [$0], {d, $2}; }",
            _shared(found),
            before,
            middle,
            after,
            _scalar(want),
            _lane(127),
            has_side_effects=True,
        )

    find(ref, found, want)


def tally(ref, index, counts) -> None:
    """ref[4 index + w] = the sum of the counts of warp w."""

    @plgpu.inline_mgpu(arg_types=(_REF, SPLAT, FOURS))
    def call(_, ref, index, counts):
        mgpu.utils.inline_ptx(
            "{ .reg .pred p; .reg .u32 s; redux.sync.add.u32 s, $1, 0xffffffff; "
            "setp.eq.u32 p, $2, 0; @p st.shared.b32 [$0], s; }",
            _add(_shared(ref), _mul(_unit(index), 4)),
            _sum(_words(counts)),
            _lane(31),
            has_side_effects=True,
            convergent=True,
        )

    call(ref, index, counts)


def scan_tallies(ref, total, scratch) -> None:
    """Replaces ref[0 : BINS] by the sums before each, and puts the sum of all into total[0].

    One warpgroup calls this; scratch[4:8] is its own.
    """

    @plgpu.inline_mgpu(arg_types=(_REF, _REF, _REF))
    def call(_, ref, total, scratch):
        base = _add(_shared(ref), _mul(_lane(127), 8))
        first, second = _load_pair(base)
        before, whole = _scan(_add(first, second), _shared(scratch))
        mgpu.utils.inline_ptx(
            "{ .reg .pred p; st.shared.v2.b32 [$0], {$1, $2}; setp.eq.u32 p, $5, 0; "
            "@p st.shared.b32 [$3], $4; }",
            base,
            before,
            _add(before, first),
            _shared(total),
            whole,
            _lane(127),
            has_side_effects=True,
        )

    call(ref, total, scratch)


def sums_before(ref, index, counts):
    """The sum of all counts before each, of this warpgroup's and, by `scan_tallies`, of others."""
    result = plgpu.ShapeDtypeStruct((GROUP,), jnp.dtype(jnp.int32), FOURS)

    @plgpu.inline_mgpu(arg_types=(_REF, SPLAT, FOURS), return_type=result)
    def call(_, ref, index, counts):
        words = _words(counts)
        own = _sum(words)
        before = mgpu.utils.inline_ptx(
            "ld.shared.b32 $0, [$1];",
            _add(_shared(ref), _mul(_unit(index), 4)),
            result_types=_i32(),
            has_side_effects=True,
        )
        at = mgpu.utils.arith.subi(_add(before, _scan_warp(own)), own)
        sums = []
        for word in words:
            sums.append(at)
            at = _add(at, word)
        return _from_words(sums, _i32())

    return call(ref, index, counts)


def sum_of_earlier(ref, block, blocks: int):
    """Sums of the high and of the low 16 bits of ref[0] in the blocks of a cluster before this."""

    @plgpu.inline_mgpu(arg_types=(_REF, SPLAT), return_type=(_INT, _INT))
    def call(_, ref, block):
        arith = mgpu.utils.arith
        zero, base, block = _c(0), _shared(ref), _scalar(block)
        high, low = zero, zero
        for other in range(blocks - 1):
            word = mgpu.utils.inline_ptx(
                f"{{ .reg .u32 a; mapa.shared::cluster.u32 a, $1, {other}; "
                "ld.shared::cluster.b32 $0, [a]; }",
                base,
                result_types=_i32(),
                has_side_effects=True,
            )
            earlier = arith.cmpi(arith.CmpIPredicate.sgt, block, _c(other))
            word = arith.select(earlier, word, zero)
            high = _add(high, arith.shrui(word, _c(16)))
            low = _add(low, arith.andi(word, _c(0xFFFF)))
        return [mgpu.FragmentedArray.splat(x, (), is_signed=True) for x in (high, low)]

    return call(ref, block)


def store_chosen(ref, row, slots, flags, before, earlier, equals) -> None:
    """ref[row, p] = slots wherever a flag is not 0, p the number of those chosen before.

    Args:
        flags: 2^16 is chosen; 1 is, where fewer than `equals` such flags lie before it.
        before: sums of all flags before in this block.
        earlier: how many flags of either kind, 2^16 and 1, earlier blocks have.
        equals: how many with flag 1 are chosen.
    """

    @plgpu.inline_mgpu(arg_types=(_REF, SPLAT, FOURS, FOURS, FOURS, SPLAT, SPLAT, SPLAT))
    def store(_, ref, row, slots, flags, before, less, equal, equals):
        width = mgpu.utils.ir.MemRefType(ref.type).shape[-1]
        base = _global(ref, _mul64(_wide(_scalar(row)), width))
        for slot, flag, sums in zip(*map(_words, (slots, flags, before)), strict=True):
            mgpu.utils.inline_ptx(
                "{ .reg .pred p; .reg .s32 l, e; .reg .u64 a; setp.eq.s32 p, $2, 0; @p bra none; "
                "and.b32 e, $3, 0xffff; add.s32 e, e, $5; setp.ge.s32 p, e, $6; "
                "setp.eq.and.s32 p, $2, 1, p; @p bra none; "
                "shr.u32 l, $3, 16; add.s32 l, l, $4; min.s32 e, e, $6; add.s32 l, l, e; "
                "mul.wide.u32 a, l, 4; add.u64 a, a, $0; st.global.b32 [a], $1; none: }",
                base,
                slot,
                flag,
                sums,
                _scalar(less),
                _scalar(equal),
                _scalar(equals),
                has_side_effects=True,
            )

    store(ref, row, slots, flags, before, *earlier, equals)


def fill(ref, row, first, value, threads: int) -> None:
    """ref[row, first :] = value, by so many threads of a block."""

    @plgpu.inline_mgpu(arg_types=(_REF, SPLAT, SPLAT, SPLAT))
    def call(_, ref, row, first, value):
        width = mgpu.utils.ir.MemRefType(ref.type).shape[-1]
        base = _global(ref, _mul64(_wide(_scalar(row)), width))
        mgpu.utils.inline_ptx(
            "{ .reg .pred p; .reg .u32 i; .reg .u64 a; mov.u32 i, %tid.x; add.u32 i, i, $1; "
            f"again: setp.ge.s32 p, i, {width}; @p bra done; mul.wide.u32 a, i, 4; "
            "add.u64 a, a, $0; st.global.b32 [a], $2; "
            f"add.u32 i, i, {threads}; bra again; done: }}",
            base,
            _scalar(first),
            _scalar(value),
            has_side_effects=True,
        )

    call(ref, row, first, value)


def cluster_sync() -> None:
    """Waits for all threads of all blocks of the cluster; their shared memory is visible then.

    A fence of what lies in shared memory only: the ordinary one would wait for device memory too.
    """

    @plgpu.inline_mgpu()
    def call(_):
        for what in (
            "fence.release.sync_restrict::shared::cta.cluster",
            "barrier.cluster.arrive.relaxed.aligned",
            "barrier.cluster.wait.acquire.aligned",
        ):
            mgpu.utils.inline_ptx(f"{what};", has_side_effects=True, convergent=True)

    call()


def _scan(x, scratch):
    """The sum of x in the threads of the warpgroup before this one, and in all of them."""
    inclusive = _scan_warp(x)
    slots = _add(scratch, _c(16))
    mgpu.utils.inline_ptx(
        "{ .reg .pred p; .reg .u32 a; setp.eq.u32 p, $2, 31; shr.u32 a, $3, 5; shl.b32 a, a, 2; "
        "add.u32 a, a, $0; @p st.shared.b32 [a], $1; }",
        slots,
        inclusive,
        _lane(31),
        _lane(127),
        has_side_effects=True,
    )
    mgpu.warpgroup_barrier()
    warps = mgpu.utils.inline_ptx(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
        slots,
        result_types=[_i32()] * 4,
        has_side_effects=True,
    )
    arith = mgpu.utils.arith
    before = arith.subi(inclusive, x)
    for warp, total in enumerate(warps[:3]):
        later = arith.cmpi(arith.CmpIPredicate.ugt, _lane(127), _c(32 * warp + 31))
        before = _add(before, arith.select(later, total, _c(0)))
    return before, _sum(warps)


def _scan_warp(x):
    """The sum of x in the threads of the warp up to this one."""
    for distance in (1, 2, 4, 8, 16):
        x = mgpu.utils.inline_ptx(
            "{ .reg .pred p; .reg .u32 y; "
            f"shfl.sync.up.b32 y|p, $1, {distance}, 0, 0xffffffff; "
            "mov.b32 $0, $1; @p add.u32 $0, $1, y; }",
            x,
            result_types=_i32(),
            has_side_effects=True,
            convergent=True,
        )
    return x


def _load_pair(address, block: int | None = None):
    """Two words of shared memory, of this block or of another of the cluster."""
    kind = "shared" if block is None else "shared::cluster"
    to = "mov.u32 a, $2;" if block is None else f"mapa.shared::cluster.u32 a, $2, {block};"
    return mgpu.utils.inline_ptx(
        f"{{ .reg .u32 a; {to} ld.{kind}.v2.b32 {{$0, $1}}, [a]; }}",
        address,
        result_types=[_i32()] * 2,
        has_side_effects=True,
    )


def _words(array):
    """The words that a thread has of GROUP numbers, in their order."""
    vector = mgpu.utils.vector
    (register,) = array.registers
    return [vector.extract(register, dynamic_position=[], static_position=[i]) for i in range(4)]


def _from_words(words, kind):
    """The GROUP numbers of which a thread has these words."""
    ir, vector = mgpu.utils.ir, mgpu.utils.vector
    register = vector.from_elements(ir.VectorType.get((4,), _i32()), list(words))
    register = vector.bitcast(ir.VectorType.get((4,), kind), register)
    registers = np.array([register], dtype=object)
    signed = True if isinstance(kind, ir.IntegerType) else None
    return mgpu.FragmentedArray(_registers=registers, _layout=FOURS.to_mgpu(), _is_signed=signed)


def _unit(index):
    """4 index and this thread's warp in the warpgroup."""
    warp = mgpu.utils.arith.shrui(_lane(127), _c(5))
    return _add(_mul(_scalar(index), 4), warp)


def _lane(mask: int):
    """This thread's number in its warp (31) or warpgroup (127)."""
    return mgpu.utils.arith.andi(mgpu.utils.thread_idx(), _c(mask))


def _shared(ref):
    pointer = mgpu.utils.memref_ptr(ref)
    return mgpu.utils.llvm.ptrtoint(_i32(), pointer)


def _global(ref, element):
    kind = mgpu.utils.ir.MemRefType(ref.type).element_type
    return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [element], kind)


def _i32():
    return mgpu.utils.ir.IntegerType.get_signless(32)


def _i64():
    return mgpu.utils.ir.IntegerType.get_signless(64)


def _c(value):
    return mgpu.utils.c(value, _i32())


def _scalar(x):
    return x.registers.item()


def _wide(x):
    return mgpu.utils.arith.extsi(_i64(), x)


def _add(x, y):
    return mgpu.utils.arith.addi(x, y)


def _mul(x, factor: int):
    return mgpu.utils.arith.muli(x, _c(factor))


def _mul64(x, factor: int):
    return mgpu.utils.arith.muli(x, mgpu.utils.c(factor, _i64()))


def _sum(values):
    values = list(values)
    total = values[0]
    for value in values[1:]:
        total = _add(total, value)
    return total
