"""Copies of single rows of a cache to shared memory, which Hopper's copy engine cannot gather.

A warpgroup that does nothing else copies 16 bytes a thread (`cp.async`) to where the swizzled
layout of matrix operands has them; a row that is not there is filled with zeros, and its memory is
not read. A barrier completes once the copies have arrived. Pallas does not say where its barriers
lie, so these are words of an array in shared memory, and who waits says for which turn.

None of this runs in the interpreter.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper.mosaic import SPLAT, index_of, pointer, shared_address
from mla_jax.ops.hopper.schedule import BLOCK

STEP = 128  # rows that a warpgroup lists at once, one a thread
LISTED = plgpu.Layout.WG_STRIDED((STEP,), 1)
PREFETCH = ".L2::256B"  # what a copy brings to the L2 cache beside its own 32-byte sectors


def start_barriers(words, first: int, count: int, threads: int) -> None:
    """Makes barriers of 128 arrivals in words first, first + 2, ...; all `threads` call this."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def call(_, words):
        utils = mgpu.utils
        with utils.single_thread(utils.ThreadSubset.BLOCK):
            for i in range(count):
                utils.inline_ptx(
                    "mbarrier.init.shared::cta.b64 [$0], $1;",
                    _word(words, first + 2 * i),
                    utils.c(128, utils.ir.IntegerType.get_signless(32)),
                    has_side_effects=True,
                )
            utils.inline_ptx("fence.mbarrier_init.release.cluster;", has_side_effects=True)
        utils.inline_ptx(f"bar.sync 0, {threads};", has_side_effects=True)

    call(words)


def arrive_copied(words, word: int) -> None:
    """Arrives at a barrier: at once with what was stored, and when this thread's copies are done.

    The barrier waits for copies because they add themselves to its count before the thread arrives.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def call(_, words):
        utils = mgpu.utils
        at = _word(words, word)
        utils.inline_ptx(
            "cp.async.mbarrier.arrive.shared::cta.b64 [$0];", at, has_side_effects=True
        )
        utils.inline_ptx(
            "mbarrier.arrive.release.cta.shared::cta.b64 _, [$0];", at, has_side_effects=True
        )

    call(words)


def wait_copied(words, word: int, turn) -> None:
    """Waits until a barrier has completed for the turn-th time, counted from zero.

    What was copied is visible to matrix products afterwards.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT))
    def call(_, words, turn):
        utils, arith = mgpu.utils, mgpu.utils.arith
        i32 = utils.ir.IntegerType.get_signless(32)
        parity = arith.andi(turn.registers.item(), utils.c(1, i32))
        utils.inline_ptx(
            "{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1, $2; "
            "@p bra done; bra again; done: }",
            _word(words, word),
            parity,
            utils.c(10_000_000, i32),
            has_side_effects=True,
        )
        utils.inline_ptx("fence.proxy.async.shared::cta;", has_side_effects=True)

    call(words, turn)


def listed(chosen, table, start, limit, row, slots: int):
    """Where in the flat cache 128 chosen slots of a row lie, one a thread; -1 is nowhere.

    Args:
        chosen: [K ...] in device memory, slots of rows.
        table: [B M], the page of every 128 slots; None where rows have slots of their own.
        start: of the 128 in `chosen`.
        limit: slots from here on are nowhere, as are those below zero.
        row: of the cache.
        slots: of a row; of all pages where there is a table.
    """
    tables = () if table is None else (table,)
    types = (plgpu.RefType(), [plgpu.RefType()] * len(tables), SPLAT, SPLAT, SPLAT)

    @plgpu.inline_mgpu(
        arg_types=types, return_type=plgpu.ShapeDtypeStruct((STEP,), jnp.dtype(jnp.int32), LISTED)
    )
    def call(_, chosen, tables, start, limit, row):
        utils, arith, llvm, ir = (mgpu.utils, *(getattr(mgpu.utils, x) for x in _DIALECTS))
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        c = lambda value: utils.c(value, i32)  # noqa: E731
        below = arith.CmpIPredicate.ult  # unsigned: nothing below zero is
        # Read anew, as an address of each thread's own would be kept from the kernel's start.
        thread = utils.inline_ptx("mov.u32 $0, %tid.x;", result_types=i32, has_side_effects=True)
        thread = arith.index_cast(index, arith.andi(thread, c(STEP - 1)))
        slot = llvm.load(i32, pointer(chosen, arith.addi(index_of(start), thread)))
        live = arith.cmpi(below, slot, limit.registers.item())
        row = row.registers.item()
        if tables:
            [table] = tables
            slot = arith.select(live, slot, c(0))  # a place in the table that is there
            page = arith.shrui(slot, c(7))
            page = arith.addi(arith.muli(row, c(ir.MemRefType(table.type).shape[1])), page)
            page = llvm.load(i32, pointer(table, arith.index_cast(index, page)))
            place = arith.addi(arith.shli(page, c(7)), arith.andi(slot, c(127)))
            live = arith.andi(live, arith.cmpi(below, page, c(slots // 128)))
        else:
            place = arith.addi(arith.muli(row, c(slots)), slot)
        place = arith.select(live, place, c(-1))
        place = utils.vector.broadcast(ir.VectorType.get((1,), i32), place)
        registers = np.array([place], dtype=object)
        return mgpu.FragmentedArray(_registers=registers, _layout=LISTED.to_mgpu(), _is_signed=True)

    return call(chosen, list(tables), start, limit, row)


def store_live(words, word: int, places, block: int) -> None:
    """Stores whether row r of a block is somewhere in bit r of two words from `word` on."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LISTED))
    def call(_, words, places):
        utils, arith = mgpu.utils, mgpu.utils.arith
        i32 = utils.ir.IntegerType.get_signless(32)
        thread = utils.thread_idx()
        warp = arith.andi(arith.shrui(thread, utils.c(5, i32)), utils.c(3, i32))
        at = arith.addi(_word(words, word), arith.shli(warp, utils.c(1, i32)))
        utils.inline_ptx(
            "{ .reg .pred p; .reg .b32 v; .reg .b16 h; setp.ge.s32 p, $1, 0; "
            "vote.sync.ballot.b32 v, p, 0xffffffff; "
            f"shr.u32 v, v, {16 * block}; cvt.u16.u32 h, v; "
            "and.b32 v, $2, 31; setp.eq.u32 p, v, 0; @p st.shared.b16 [$0], h; }",
            at,
            _place(places),
            thread,
            has_side_effects=True,
            convergent=True,
        )

    call(words, places)


def load_word(words, word: int):
    """The 32 bits of a word as a number."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), SPLAT),
    )
    def call(_, words):
        utils = mgpu.utils
        i32 = utils.ir.IntegerType.get_signless(32)
        x = utils.inline_ptx(
            "ld.shared.b32 $0, [$1];", _word(words, word), result_types=i32, has_side_effects=True
        )
        return mgpu.FragmentedArray.splat(x, (), is_signed=True)

    return call(words)


def gather(source, targets, buffer: int, places, block: int, column: int) -> None:
    """Starts the copies targets[buffer, r] = source[places[r], column : ...] for a block's 64 rows.

    Warp w copies rows 16 w to 16 w + 15, whose places lanes 16 block and on of it have: where the
    choice has its 128 slots is of no matter, as a softmax does not know their order.

    Args:
        source: [any, width] in device memory.
        targets: [buffers, 64, columns] in shared memory, tiled and swizzled. All buffers share the
            addresses that a thread computes, and few registers hold these.
        buffer: the one that is filled.
        places: of `listed`.
        block: 0 or 1, which half of the 128 places.
        column: of the source, where the target's columns begin.
    """
    columns = targets.shape[-1]
    tile = min(64, columns)  # columns of a swizzled tile
    transforms = (plgpu.TilingTransform((8, tile)), plgpu.SwizzleTransform(2 * tile))
    chunks = columns // 8  # of 16 bytes a row has
    at_once = 32 // chunks  # rows of one copy of a warp
    tile_rows, swizzled = 2 * tile, (2 * tile // 16 - 1) << 4  # bytes, bits of an address
    before = 2 * buffer * BLOCK * columns  # bytes

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(transforms), LISTED))
    def call(_, source, targets, places):
        utils, arith, llvm, ir = (mgpu.utils, *(getattr(mgpu.utils, x) for x in _DIALECTS))
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        c = lambda value: utils.c(value, i32)  # noqa: E731
        add, mul, div, rem = arith.addi, arith.muli, arith.divui, arith.remui
        thread = utils.thread_idx()
        lane, warp = arith.andi(thread, c(31)), arith.andi(arith.shrui(thread, c(5)), c(3))
        sub, chunk = div(lane, c(chunks)), rem(lane, c(chunks))
        # The target of the first copy; of those after it, bits are set that are zero here.
        per_tile = tile // 8
        row = add(mul(warp, c(16)), sub)
        first = mul(div(row, c(8)), c(8 * tile_rows * (columns // tile)))
        first = add(first, mul(div(chunk, c(per_tile)), c(8 * tile_rows)))
        first = add(first, mul(rem(row, c(8)), c(tile_rows)))
        first = add(first, mul(rem(chunk, c(per_tile)), c(16)))
        first = arith.xori(first, arith.andi(arith.shrui(first, c(3)), c(swizzled)))
        target = shared_address(targets)
        width = ir.MemRefType(source.type).shape[1]
        base = llvm.ptrtoint(i64, utils.memref_ptr(source))
        base = add(base, arith.extui(i64, mul(chunk, c(16))))
        place = _place(places)
        active = (
            None if at_once * chunks == 32 else arith.cmpi(arith.CmpIPredicate.ult, lane, c(chunks))
        )
        for i in range(16 // at_once):
            done = i * at_once
            of = c(16 * block + done) if at_once == 1 else add(sub, c(16 * block + done))
            at = utils.inline_ptx(
                "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;",
                place,
                of,
                result_types=i32,
                has_side_effects=True,
                convergent=True,
            )
            there = arith.extui(i64, arith.maxsi(at, c(0)))
            there = add(base, mul(there, utils.c(2 * width, i64)))
            offset = done // 8 * 8 * tile_rows * (columns // tile) + done % 8 * tile_rows
            to = add(target, arith.xori(first, c(offset >> 3 & swizzled)))
            copy = functools.partial(
                utils.inline_ptx,
                "{ .reg .pred none; setp.lt.s32 none, $2, 0; cp.async.cg.shared.global"
                f"{PREFETCH} [$0+{before + offset}], [$1+{2 * column}], 16, none; }}",
                to,
                there,
                at,
                has_side_effects=True,
            )
            if active is None:
                copy()
            else:
                with utils.when(active):
                    copy()

    call(source, targets, places)


_DIALECTS = ("arith", "llvm", "ir")


def _place(places):
    """This thread's place."""
    utils = mgpu.utils
    return utils.vector.extract(places.registers.item(), dynamic_position=[], static_position=[0])


def _word(words, word: int):
    """The address of a word in shared memory."""
    utils = mgpu.utils
    i32 = utils.ir.IntegerType.get_signless(32)
    return utils.arith.addi(shared_address(words), utils.c(4 * word, i32))
