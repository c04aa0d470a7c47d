"""Matrix products of row tiles with kernels that each tile names: experts on Hopper GPUs.

Tiles of rows belong to one expert each, so no tile is masked or cut, and a kernel that no tile
names is never read: a decode step moves the weights of the chosen experts once, where a gather in
XLA would move them three times and a product over all experts would read those of the others too.
One warpgroup copies, two multiply (jax's own Hopper matmul is built the same way).

Letters: J tiles of rows, M rows of a tile, E experts, K inputs, N outputs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from mla_jax.ops import hopper

try:
    from jax.experimental.pallas import mosaic_gpu
except ImportError:  # a jax without it
    mosaic_gpu = None
plgpu: Any = mosaic_gpu

FEW, MANY = 64, 256  # M: the least a warpgroup multiplies, and what keeps the tensor cores busy
_WIDTH, _DEPTH = 128, 64  # of N and of K that a step takes
_EPILOGUE = 64  # rows and columns written at a time


def why_not(shape: tuple[int, ...], dtype, device) -> str | None:
    """Why kernels of this shape [E K N] cannot be served on `device`, or None."""
    if reason := hopper.not_hopper(device):
        return reason
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if shape[1] % _WIDTH or shape[2] % _WIDTH:
        return f"widths must be multiples of {_WIDTH}, not {shape[1]} and {shape[2]}"
    return None


@functools.partial(jax.jit, static_argnames=("rows", "sms", "interpret"))
def grouped_matmul(
    x: Float[Array, "J*M K"],
    kernels: Float[Array, "E K N"],
    owner: Int[Array, "J"],
    used: Int[Array, "1"],
    *,
    rows: int,
    sms: int,
    interpret: Any = None,
) -> Float[Array, "J*M N"]:
    """`x[tile j] @ kernels[owner[j]]` for the first `used` tiles.

    Args:
        x: tiles of `rows` rows each, one after the other.
        kernels: of all experts, in x's dtype.
        owner: each tile's expert.
        used: tiles that count; the output's others hold anything.
        rows: M, `FEW` or `MANY`.
        sms: multiprocessors of the device.
        interpret: parameters of the interpreter, to run on a CPU.

    Returns:
        in x's dtype, accumulated in float32.
    """
    (_, depth), width = x.shape, kernels.shape[-1]
    few = rows == FEW  # then the two warpgroups share the columns, else the rows
    tile = (rows, _WIDTH // 2) if few else (rows // 2, _WIDTH)
    columns = width // _WIDTH
    slots = min(2, tile[0] * tile[1] // _EPILOGUE**2)
    swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def pipeline(body, context):
        spec = functools.partial(
            plgpu.BlockSpec, transforms=swizzle, memory_space=plgpu.SMEM, delay_release=0
        )
        return plgpu.emit_pipeline_warp_specialized(
            body, grid=(depth // _DEPTH,), memory_registers=40,
            in_specs=[
                spec((rows, _DEPTH), lambda k: (0, k)), spec((_DEPTH, _WIDTH), lambda k: (k, 0)),
            ],
            wg_axis="wg", num_compute_wgs=2, max_concurrent_steps=8 if few else 4,
            compute_context=context,
        )  # fmt: skip

    def kernel(x_ref, kernels_ref, owner_ref, used_ref, out_ref):
        nothing = lambda *_: None  # noqa: E731

        @functools.partial(
            pl.run_scoped,
            copies=pipeline(nothing, nothing).get_allocations(x_ref, kernels_ref.at[0]),
            out=plgpu.SMEM((2, slots, _EPILOGUE, _EPILOGUE), x.dtype, transforms=swizzle),
            collective_axes="wg",
        )
        def _(copies, out):
            first, wg = lax.axis_index("sm"), lax.axis_index("wg")
            own_rows = slice(None) if few else pl.ds(wg * tile[0], tile[0])
            own_columns = pl.ds(wg * tile[1], tile[1]) if few else slice(None)
            total = used_ref[0] * columns

            def turn(index, carry):
                # Columns first: the blocks at work share x and a few experts in the L2 cache.
                at = first + index * sms
                j, n = lax.div(at, columns), lax.rem(at, columns)
                goal = (pl.ds(j * rows, rows), pl.ds(n * _WIDTH, _WIDTH))

                def context(multiply):
                    @functools.partial(pl.run_scoped, acc=plgpu.ACC(tile, jnp.float32))
                    def _(acc):
                        multiply(acc)
                        result = acc[...].astype(x.dtype)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        own = out_ref.at[goal].at[own_rows, own_columns]
                        step, slot = _EPILOGUE, 0
                        for row in range(0, tile[0], step):
                            for column in range(0, tile[1], step):
                                part = (slice(row, row + step), slice(column, column + step))
                                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                                out[wg, slot] = result[part]
                                plgpu.commit_smem()
                                plgpu.copy_smem_to_gmem(out.at[wg, slot], own.at[part])
                                slot = (slot + 1) % slots

                def multiply(_, x_tile, kernel_tile, acc):
                    plgpu.wgmma(acc, x_tile.at[own_rows], kernel_tile.at[:, own_columns])
                    plgpu.wgmma_wait(0)
                    return acc

                pipeline(multiply, context)(
                    x_ref.at[goal[0], :],
                    kernels_ref.at[owner_ref[j]].at[:, goal[1]],
                    allocations=copies,
                )
                return carry

            lax.fori_loop(0, lax.div(total - first + (sms - 1), jnp.int32(sms)), turn, None)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        kernel, out_type=jax.ShapeDtypeStruct((x.shape[0], width), x.dtype), grid=(sms,),
        grid_names=("sm",), num_threads=3, thread_name="wg", kernel_name="grouped_matmul",
        interpret=interpret, compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )(x, kernels, owner, used)  # fmt: skip
