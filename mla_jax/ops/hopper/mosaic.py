"""What Pallas lacks for the decode kernel: register-level pieces of Mosaic GPU.

None of them runs in the interpreter; `interpreted.py` does without them.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

WG = plgpu.Layout.WGMMA
SPLAT = plgpu.Layout.WG_SPLAT
_SPIN_LIMIT = 4_000_000_000  # nanoseconds


def kernel(body, *, interpret=None, **options):
    """`plgpu.kernel`, whose thread blocks are set up while the kernel before still runs.

    Before they do anything else they wait until all that it wrote may be read. Where a GPU does not
    begin a kernel early, as in graphs that jax before 0.12 makes, the wait ends at once.
    """

    def dependent(*refs, **scratch):
        plgpu.griddepcontrol_wait()
        body(*refs, **scratch)

    if interpret is not None:
        return plgpu.kernel(body, interpret=interpret, **options)
    return plgpu.kernel(dependent, **options)


def named_barrier(op: str, index: int, threads: int = 256) -> None:
    """Issues `bar.sync` or `bar.arrive`.

    These take 20 cycles, where an mbarrier costs 128 arrivals and a poll.
    """

    @plgpu.inline_mgpu()
    def call(_):
        mgpu.utils.inline_ptx(f"bar.{op} {index}, {threads};", has_side_effects=True)

    call()


def store(ref, value) -> None:
    """Stores to global memory, whatever part of a sector of 32 bytes a warp writes."""
    if hasattr(plgpu, "store"):  # since jax 0.12, where `ref[...] = value` asks for whole sectors
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


@plgpu.inline_mgpu()
def fence_async(_):
    """Makes this thread's writes to shared memory visible to matrix products and copies."""
    mgpu.utils.inline_ptx("fence.proxy.async.shared::cta;", has_side_effects=True)


@plgpu.inline_mgpu()
def fence_copies(_):
    """Lets copies from global memory see what other thread blocks have been seen to write."""
    mgpu.utils.inline_ptx("fence.proxy.async.global;", has_side_effects=True)


@plgpu.inline_mgpu()
def warpgroup_sync(_):
    """Waits for the four warps of the warpgroup.

    Matrix products retire in each warp by itself, and one lane starts a copy over what all of them
    have read.
    """
    mgpu.warpgroup_barrier()


def opaque(value: int):
    """`value`, hidden from LLVM, which would move every descriptor out of the loop and spill."""

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), SPLAT))
    def call(_):
        i32 = mgpu.utils.ir.IntegerType.get_signless(32)
        x = mgpu.utils.inline_ptx(f"mov.u32 $0, {value};", result_types=i32, has_side_effects=True)
        return mgpu.FragmentedArray.splat(x, (), is_signed=True)

    return call()


def warpgroup():
    """This warpgroup's number, read anew because one kept from the kernel's start would spill."""

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), SPLAT))
    def call(_):
        i32 = mgpu.utils.ir.IntegerType.get_signless(32)
        x = mgpu.utils.inline_ptx("mov.u32 $0, %tid.x;", result_types=i32, has_side_effects=True)
        x = mgpu.utils.arith.shrui(x, mgpu.utils.c(7, i32))
        return mgpu.FragmentedArray.splat(x, (), is_signed=True)

    return call()


def partial_sums(x):
    """Adds the columns that one thread holds, float32 [64, 64] to [64, 8], without shuffles."""

    @plgpu.inline_mgpu(
        arg_types=(WG,), return_type=plgpu.ShapeDtypeStruct((x.shape[0], 8), x.dtype, WG)
    )
    def call(_, x):
        add = np.vectorize(mgpu.utils.arith.addf, otypes=[object])
        columns = [x.registers[:, i : i + 1] for i in range(x.registers.shape[1])]
        total = functools.reduce(add, columns)
        return mgpu.FragmentedArray(_registers=total, _layout=x.layout, _is_signed=None)

    return call(x)


def store_rows(ref, value, row, column, count) -> None:
    """Stores ref[row : row + count, column : ...] = value[:count], and touches no other row.

    A quad of threads holds pairs of neighbours. The threads exchange pairs, so that each of them
    writes 16 bytes of a row at once and the quad writes 64 bytes side by side. Stores of single
    pairs would take 10 us a tile, and stores of half a 32-byte sector twice as long as whole ones.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WG, SPLAT, SPLAT, SPLAT))
    def store(_, ref, value, row, column, count):
        arith, ir, c = mgpu.utils.arith, mgpu.utils.ir, mgpu.utils.c
        index, i32 = ir.IndexType.get(), ir.IntegerType.get_signless(32)
        width = ir.MemRefType(ref.type).shape[-1]
        row, column, count = index_of(row), index_of(column), count.registers.item()
        lane = arith.andi(mgpu.utils.thread_idx(), c(3, i32))
        groups = 4 // len(_words(value.registers.flat[0]))  # of eight columns, in one store
        if groups == 4:
            at = arith.muli(lane, c(8, i32))
        else:  # threads 0 and 2 write the first group, threads 1 and 3 the second
            odd, high = arith.andi(lane, c(1, i32)), arith.shrui(lane, c(1, i32))
            at = arith.addi(arith.muli(odd, c(8, i32)), arith.muli(high, c(4, i32)))
        column = arith.addi(column, arith.index_cast(index, at))
        rows, first = _by_row(value.layout, value.shape)
        for offset, registers in rows.items():
            r = arith.addi(first[0], c(offset, index))
            at = arith.addi(arith.muli(arith.addi(r, row), c(width, index)), column)
            base = pointer(ref, at)  # one address a row, since one a register would spill
            live = arith.cmpi(arith.CmpIPredicate.slt, arith.index_cast(i32, r), count)
            live = arith.extui(i32, live)
            for g in range(0, len(registers), groups):
                pairs = [_words(value.registers[index]) for index, _ in registers[g : g + groups]]
                # words[k][w] is word w of neighbour k's pair, in the thread that writes it.
                words = zip(*(_transpose(w, lane) for w in zip(*pairs, strict=True)), strict=True)
                words = [word for pair in words for word in pair]
                to = _offset(ref, base, registers[g][1])
                mgpu.utils.inline_ptx(
                    "{ .reg .pred p; setp.ne.b32 p, $0, 0; "
                    "@p st.global.v4.b32 [$1], {$2, $3, $4, $5}; }",
                    live,
                    to,
                    *words,
                    has_side_effects=True,
                )

    store(ref, value, row, column, count)


def store_row_values(ref, value, row, count) -> None:
    """Stores ref[row : row + count] = value[:count] of one value per row."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), WG.reduce(1), SPLAT, SPLAT))
    def store(_, ref, value, row, count):
        arith, c = mgpu.utils.arith, mgpu.utils.c
        index = mgpu.utils.ir.IndexType.get()
        row, count = index_of(row), index_of(count)
        rows, first = _by_row(value.layout, value.shape)
        for offset, [(register, _)] in rows.items():
            r = arith.addi(first[0], c(offset, index))
            with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, r, count)):
                to = pointer(ref, arith.addi(r, row))
                mgpu.utils.llvm.store(value.registers[register], to)

    store(ref, value, row, count)


def load_rows(ref, row, shape, dtype):
    """Loads ref[row : row + 64] in the layout of matrix products.

    Rows past the end repeat the last one.
    """

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SPLAT), return_type=plgpu.ShapeDtypeStruct(shape, dtype, WG)
    )
    def load(_, ref, row):
        arith, llvm, ir = mgpu.utils.arith, mgpu.utils.llvm, mgpu.utils.ir
        total, width = ir.MemRefType(ref.type).shape
        index = ir.IndexType.get()
        row = index_of(row)
        layout = WG.to_mgpu()
        values = np.empty(layout.registers_shape(shape), dtype=object)
        kind = layout.registers_element_type(ir.MemRefType(ref.type).element_type)
        rows, first = _by_row(layout, shape)
        for offset, registers in rows.items():
            r = arith.addi(arith.addi(first[0], row), mgpu.utils.c(offset, index))
            r = arith.minui(r, mgpu.utils.c(total - 1, index))
            base = pointer(ref, arith.addi(arith.muli(r, mgpu.utils.c(width, index)), first[1]))
            for register, column in registers:
                values[register] = llvm.load(kind, _offset(ref, base, column))
        return mgpu.FragmentedArray(_registers=values, _layout=layout, _is_signed=None)

    return load(ref, row)


def arrive_global(ref, index) -> None:
    """Adds one to ref[index] once all writes of this warpgroup are visible to the device."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT))
    def call(_, ref, index):
        mgpu.warpgroup_barrier()
        mgpu.utils.SemaphoreRef(pointer(ref, index_of(index))).signal(1, memory_scope="gpu")

    call(ref, index)


def meet_global(ref, index, count, waiting) -> None:
    """Waits until `count` have arrived at ref[index]; the last of `waiting` puts it back to zero.

    A wait of more than four seconds becomes an error of the device.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, SPLAT, SPLAT))
    def call(_, ref, index, count, waiting):
        arith, i32 = mgpu.utils.arith, mgpu.utils.ir.IntegerType.get_signless(32)
        count, waiting = count.registers.item(), waiting.registers.item()
        with mgpu.utils.single_thread(mgpu.utils.ThreadSubset.WARPGROUP):
            counter = pointer(ref, index_of(index))
            mgpu.utils.inline_ptx(
                "{ .reg .pred p; .reg .u32 v; .reg .u64 t0, t; mov.u64 t0, %globaltimer; "
                "again: ld.acquire.gpu.global.u32 v, [$0]; setp.ge.u32 p, v, $1; @p bra done; "
                "mov.u64 t, %globaltimer; sub.u64 t, t, t0; "
                f"setp.gt.u64 p, t, {_SPIN_LIMIT}; @p trap; bra again; done: }}",
                counter,
                count,
                has_side_effects=True,
            )
            last = arith.subi(arith.addi(count, waiting), mgpu.utils.c(1, i32))  # wraps to zero
            mgpu.utils.inline_ptx(
                "red.inc.relaxed.gpu.global.u32 [$0], $1;", counter, last, has_side_effects=True
            )
        mgpu.warpgroup_barrier()

    call(ref, index, count, waiting)


def _words(register):
    """The 32-bit words of a pair of 16 or 32 bits each."""
    ir, vector = mgpu.utils.ir, mgpu.utils.vector
    i32 = ir.IntegerType.get_signless(32)
    count = mgpu.utils.bitwidth(register.type) // 32
    words = vector.bitcast(ir.VectorType.get((count,), i32), register)
    return [vector.extract(words, dynamic_position=[], static_position=[w]) for w in range(count)]


def _transpose(words, lane):
    """Exchanges words among 2 or 4 neighbouring threads, so that thread l gets word l of each."""
    arith, c = mgpu.utils.arith, mgpu.utils.c
    i32 = mgpu.utils.ir.IntegerType.get_signless(32)
    words = list(words)
    for bit in (1, 2)[: len(words) // 2]:
        odd = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, c(bit, i32)), c(0, i32))
        for low in (w for w in range(len(words)) if not w & bit):
            high = low | bit
            sent = arith.select(odd, words[low], words[high])
            kept = arith.select(odd, words[high], words[low])
            got = mgpu.utils.shfl_bfly(sent, bit)
            words[low] = arith.select(odd, got, kept)
            words[high] = arith.select(odd, kept, got)
    return words


def index_of(x):
    return mgpu.utils.arith.index_cast(mgpu.utils.ir.IndexType.get(), x.registers.item())


def pointer(ref, element):
    ir = mgpu.utils.ir
    i64 = mgpu.utils.arith.index_cast(ir.IntegerType.get_signless(64), element)
    pointer, kind = mgpu.utils.memref_ptr(ref), ir.MemRefType(ref.type).element_type
    return mgpu.utils.getelementptr(pointer, [i64], kind)


def shared_address(ref):
    """The 32-bit address of an array in shared memory."""
    i32 = mgpu.utils.ir.IntegerType.get_signless(32)
    return mgpu.utils.llvm.ptrtoint(i32, mgpu.utils.memref_ptr(ref))


def load_shared(at, offset):
    """Four words from shared memory, `offset` bytes behind the address `at`."""
    i32 = mgpu.utils.ir.IntegerType.get_signless(32)
    return mgpu.utils.inline_ptx(
        f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4 + {offset}];",
        at,
        result_types=[i32] * 4,
        has_side_effects=True,
    )


def _offset(ref, pointer, elements):
    kind = mgpu.utils.ir.MemRefType(ref.type).element_type
    return mgpu.utils.getelementptr(pointer, [elements], kind)


def _by_row(layout, shape):
    """A thread's registers of a tile, {row: [(register, column)]}, and its first row and column."""
    width = shape[-1] if len(shape) == 2 else 1
    strides = layout.tiling.tile_strides((width, 1) if len(shape) == 2 else (1,))
    rows = {}
    for index in np.ndindex(layout.registers_shape(shape)):
        flat = sum(i * s for i, s in zip(index, strides, strict=True))
        rows.setdefault(flat // width, []).append((index, flat % width))
    return rows, next(iter(layout.thread_idxs(shape)))
