"""What a decode step appends to a cache, in one kernel: the norm of latents and all writes.

A thread block takes one row. It waits for nothing but its own loads, so that all of it takes little
longer than one of the kernels that XLA makes of the norm, the scales and the write of every array.

Letters: B batch rows, N heads, P rope width, R latent width, L lines, at least N + 1 + R / P,
S slots, C groups of 128 latent channels.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from mla_jax.cache.scaled import GROUP, scale_of
from mla_jax.ops import guard
from mla_jax.ops.hopper.merge import like
from mla_jax.ops.hopper.mosaic import kernel

_MOST = 4  # numbers that a thread loads at once


@functools.partial(jax.jit, static_argnames=("heads", "epsilon", "interpret"))
def append(
    whole: Float[Array, "B L P"],
    scale: Float[Array, "R"],
    place: Int[Array, "B"],
    arrays: dict[str, Array],
    *,
    heads: int,
    epsilon: float,
    interpret: Any = None,
) -> tuple[Float[Array, "B N P"], Float[Array, "B _ P"], dict[str, Array]]:
    """The queries of every row, and a store's arrays with its token; they are written to.

    Args:
        whole: of each row N rotary queries, the rotary key, the latent before its norm, and the
            other queries, up to 256 lines or none.
        scale: of the norm.
        place: the slot of each row's token; at S or beyond it is dropped.
        arrays: latent [B S R], k_rope [B S P]; and where latents are in 8 bits, latent_scale
            [B S C].
        heads: N.
        epsilon: of the norm.
        interpret: parameters of the interpreter, to run on a CPU.
    """
    names, (batch, slots, rank) = list(arrays), arrays["latent"].shape
    held_in, (_, lines, rope) = arrays["latent"].dtype, whole.shape
    first = heads + 1 + rank // rope
    parts = [(0, heads), *([(first, lines - first)] if lines > first else [])]

    def body(whole_ref, flat_ref, scale_ref, place_ref, *refs):
        held = dict(zip(names, refs[: len(names)], strict=True))
        out_refs = refs[len(names) : len(names) + len(parts)]
        key, numbers, scales, copied, *queries = refs[len(names) + len(parts) :]
        row = lax.axis_index("row")
        slot = place_ref[row]
        for query, (begin, count) in zip(queries, parts, strict=True):
            plgpu.copy_gmem_to_smem(whole_ref.at[row, pl.ds(begin, count)], query, copied)
        plgpu.copy_gmem_to_smem(flat_ref.at[row, pl.ds(heads * rope, rope)], key, copied)
        latent = _load(flat_ref.at[row, pl.ds((heads + 1) * rope, rank)]).astype(jnp.float32)
        factors = _load(scale_ref).astype(jnp.float32)
        mean = (latent * latent).sum() * (1 / rank)
        latent = (latent * lax.rsqrt(mean + epsilon) * factors).astype(whole.dtype)
        plgpu.barrier_wait(copied)
        for query, out_ref in zip(queries, out_refs, strict=True):
            plgpu.copy_smem_to_gmem(query, out_ref.at[row])

        @pl.when(slot < slots)
        def _():
            plgpu.copy_smem_to_gmem(key, held["k_rope"].at[row, slot])
            made = latent
            if "latent_scale" in held:
                numbers[...] = latent.astype(jnp.float32)
                for group in range(rank // GROUP):
                    own = numbers.at[pl.ds(group * GROUP, GROUP)]
                    values = _load(own)
                    # As many equal numbers: a scalar's bits cannot be had.
                    largest = lax.broadcast_in_dim(jnp.abs(values).max(), values.shape, ())
                    largest = plgpu.layout_cast(largest, _layout(GROUP))
                    scales[...], inverse = scale_of(largest, held_in.name)
                    held["latent_scale"][row, slot, group] = scales[0]
                    own[...] = values * inverse
                made = _load(numbers).astype(held_in)
            held["latent"][row, slot] = made

        plgpu.wait_smem_to_gmem(0)

    write = kernel(
        body,
        out_type=[like(whole, (batch, count, rope), whole.dtype) for _, count in parts],
        scratch_types=[
            plgpu.SMEM((rope,), whole.dtype),
            plgpu.SMEM((rank,), jnp.float32),
            plgpu.SMEM((GROUP,), jnp.float32),
            plgpu.Barrier(num_arrivals=1 + len(parts)),
            *[plgpu.SMEM((count, rope), whole.dtype) for _, count in parts],
        ],
        grid=(batch,),
        grid_names=("row",),
        kernel_name="append_token",
        interpret=interpret,
    )

    def run(whole, scale, place, *held):
        refs = [jax.new_ref(array) for array in held]
        queries = write(whole, whole.reshape(len(whole), -1), scale, place, *refs)
        return *queries, *(jax.freeze(ref) for ref in refs)

    run = guard.unsplit(run, "append_token", interpret)
    made = run(whole, scale, place, *arrays.values())
    queries, written = made[: len(parts)], made[len(parts) :]
    rest = queries[1] if len(parts) > 1 else whole[:, first:]
    return queries[0], rest, dict(zip(names, written, strict=True))


def _layout(size: int):
    return plgpu.Layout.WG_STRIDED((size,), math.gcd(size // 128, _MOST))


def _load(ref):
    """All of an array in registers."""
    return plgpu.load(ref, layout=_layout(ref.shape[0]), optimized=False)
