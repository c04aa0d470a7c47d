"""What Pallas lacks for the decode kernel: register-level pieces of Mosaic GPU.

None of them runs in the interpreter; the kernel takes the plain way there.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

WG = plgpu.Layout.WGMMA
SPLAT = plgpu.Layout.WG_SPLAT
_SPIN_LIMIT = 4_000_000_000  # nanoseconds


def named_barrier(op: str, index: int, threads: int = 256) -> None:
    """`bar.sync` or `bar.arrive`: 20 cycles, where an mbarrier costs 128 arrivals and a poll."""

    @plgpu.inline_mgpu()
    def call(_):
        mgpu.utils.inline_ptx(f"bar.{op} {index}, {threads};", has_side_effects=True)

    call()


@plgpu.inline_mgpu()
def fence_async(_):
    """Makes this thread's writes to shared memory visible to matrix products and copies."""
    mgpu.utils.inline_ptx("fence.proxy.async.shared::cta;", has_side_effects=True)


@plgpu.inline_mgpu()
def warpgroup_sync(_):
    """Matrix products retire per warp: all four wait before one lane lets a copy overwrite."""
    mgpu.warpgroup_barrier()


def opaque(value: int):
    """`value`, unknown to LLVM: it would move every descriptor out of the loop, and spill."""

    @plgpu.inline_mgpu(return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), SPLAT))
    def call(_):
        i32 = mgpu.utils.ir.IntegerType.get_signless(32)
        x = mgpu.utils.inline_ptx(f"mov.u32 $0, {value};", result_types=i32, has_side_effects=True)
        return mgpu.FragmentedArray.splat(x, (), is_signed=True)

    return call()


def partial_sums(x):
    """float32 [64, 64] to [64, 8]: adds the columns that one thread holds, without shuffles."""

    @plgpu.inline_mgpu(
        arg_types=(WG,), return_type=plgpu.ShapeDtypeStruct((x.shape[0], 8), x.dtype, WG)
    )
    def call(_, x):
        add = np.vectorize(mgpu.utils.arith.addf, otypes=[object])
        columns = [x.registers[:, i : i + 1] for i in range(x.registers.shape[1])]
        total = functools.reduce(add, columns)
        return mgpu.FragmentedArray(_registers=total, _layout=x.layout, _is_signed=None)

    return call(x)


def store_rows(ref, value, row, column, count, layout) -> None:
    """ref[row : row + count, column : ...] = value[:count]: no row of another tile is touched."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, SPLAT, SPLAT, SPLAT))
    def store(_, ref, value, row, column, count):
        arith, llvm, ir = mgpu.utils.arith, mgpu.utils.llvm, mgpu.utils.ir
        index = ir.IndexType.get()
        width = ir.MemRefType(ref.type).shape[-1] if len(value.shape) == 2 else 1
        row, column, count = _index(row), _index(column), _index(count)
        rows, first = _by_row(value.layout, value.shape)
        if len(first) == 2:
            column = arith.addi(column, first[1])
        for offset, registers in rows.items():
            r = arith.addi(first[0], mgpu.utils.c(offset, index))
            at = arith.muli(arith.addi(r, row), mgpu.utils.c(width, index))
            if len(first) == 2:
                at = arith.addi(at, column)
            with mgpu.utils.when(arith.cmpi(arith.CmpIPredicate.ult, r, count)):
                base = _pointer(ref, at)  # one address a row: one a register would spill
                for register, offset_in_row in registers:
                    llvm.store(value.registers[register], _offset(ref, base, offset_in_row))

    store(ref, value, row, column, count)


def load_rows(ref, row, shape, dtype):
    """ref[row : row + 64] in the layout of matrix products; rows past the end repeat the last."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), SPLAT), return_type=plgpu.ShapeDtypeStruct(shape, dtype, WG)
    )
    def load(_, ref, row):
        arith, llvm, ir = mgpu.utils.arith, mgpu.utils.llvm, mgpu.utils.ir
        total, width = ir.MemRefType(ref.type).shape
        index = ir.IndexType.get()
        row = _index(row)
        layout = WG.to_mgpu()
        values = np.empty(layout.registers_shape(shape), dtype=object)
        kind = layout.registers_element_type(ir.MemRefType(ref.type).element_type)
        rows, first = _by_row(layout, shape)
        for offset, registers in rows.items():
            r = arith.addi(arith.addi(first[0], row), mgpu.utils.c(offset, index))
            r = arith.minui(r, mgpu.utils.c(total - 1, index))
            base = _pointer(ref, arith.addi(arith.muli(r, mgpu.utils.c(width, index)), first[1]))
            for register, column in registers:
                values[register] = llvm.load(kind, _offset(ref, base, column))
        return mgpu.FragmentedArray(_registers=values, _layout=layout, _is_signed=None)

    return load(ref, row)


def arrive_global(ref, index) -> None:
    """Adds one to ref[index] once all writes of this warpgroup are visible to the device."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT))
    def call(_, ref, index):
        mgpu.warpgroup_barrier()
        mgpu.utils.SemaphoreRef(_pointer(ref, _index(index))).signal(1, memory_scope="gpu")

    call(ref, index)


def wait_global(ref, index, count) -> None:
    """Waits until ref[index] >= count; a wait without end becomes an error of the device."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, SPLAT))
    def call(_, ref, index, count):
        with mgpu.utils.single_thread(mgpu.utils.ThreadSubset.WARPGROUP):
            mgpu.utils.inline_ptx(
                "{ .reg .pred p; .reg .u32 v; .reg .u64 t0, t; mov.u64 t0, %globaltimer; "
                "again: ld.acquire.gpu.global.u32 v, [$0]; setp.ge.u32 p, v, $1; @p bra done; "
                "mov.u64 t, %globaltimer; sub.u64 t, t, t0; "
                f"setp.gt.u64 p, t, {_SPIN_LIMIT}; @p trap; bra again; done: }}",
                _pointer(ref, _index(index)), count.registers.item(), has_side_effects=True,
            )  # fmt: skip
        mgpu.warpgroup_barrier()

    call(ref, index, count)


def leave_global(ref, index, last) -> None:
    """Adds one to ref[index]; the visitor that finds `last` there puts it back to zero."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, SPLAT))
    def call(_, ref, index, last):
        mgpu.warpgroup_barrier()
        i32 = mgpu.utils.ir.IntegerType.get_signless(32)
        with mgpu.utils.single_thread(mgpu.utils.ThreadSubset.WARPGROUP):
            mgpu.utils.inline_ptx(
                "atom.inc.acq_rel.gpu.global.u32 $0, [$1], $2;",
                _pointer(ref, _index(index)), last.registers.item(), result_types=i32,
                has_side_effects=True,
            )  # fmt: skip

    call(ref, index, last)


def _index(x):
    return mgpu.utils.arith.index_cast(mgpu.utils.ir.IndexType.get(), x.registers.item())


def _pointer(ref, element):
    ir = mgpu.utils.ir
    i64 = mgpu.utils.arith.index_cast(ir.IntegerType.get_signless(64), element)
    pointer, kind = mgpu.utils.memref_ptr(ref), ir.MemRefType(ref.type).element_type
    return mgpu.utils.getelementptr(pointer, [i64], kind)


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
