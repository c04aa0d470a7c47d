"""Absorbed decode as one Mosaic TPU kernel: attention of all heads over a latent cache.

`kernel.py` is the kernel's loop, over the blocks of `walk.py`, with the copies of `copies.py` and
the arithmetic of `compute.py`; `planning.py` says how it is built for a shape and a chip. It reads
dense caches, and paged ones through their table. It is forward only: derivatives are those of the
XLA backend.

Letters: B batch, T query tokens, S cache slots, N heads, R latent, P rotary channels; a paged cache
has G pages of 128 slots, of which a row may have M.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mla_jax import ops, target
from mla_jax.ops.merge import merge_attention
from mla_jax.ops.tpu.planning import LANES, Plan, make_plan, vmem_limit

_MOST_ROWS = 1024  # T N of a call of the kernel; of more, T is cut into groups
_MOST_PAGES = 2**17  # B M; the table lies in scalar memory, which is 1 MiB


def why_not(call, device: target.Target) -> str | None:
    """Why the kernel cannot serve `call` on `device`, or None."""
    if device.platform != "tpu" and device.interprets != "tpu":
        return f"needs a TPU, this is {device}"
    if device.partitioned:
        return device.partitioned
    rank, rope = call.key_dims
    if not all(isinstance(size, int) for size in (call.batch, call.slots, call.queries)):
        return "needs sizes that are known when it is compiled"
    if call.store == "paged" and call.batch * call.slots > _MOST_PAGES * LANES:
        return (
            f"the page table has {call.batch} x {call.slots // LANES} entries, scalar memory takes "
            f"{_MOST_PAGES}: use fewer rows or a shorter max_length"
        )
    if call.soft_cap is not None:
        return "takes no soft_cap"
    if call.dtype not in ("bfloat16", "float32"):
        return f"takes bfloat16 and float32, not {call.dtype}"
    if others := set(call.options) - {"lengths", "lengths per query"}:
        return f"no {', '.join(sorted(others))}"
    if call.heads > 128:
        return f"takes up to 128 heads on one chip, not {call.heads}: shard them"
    if rank % LANES or rank > 512:
        return f"kv_lora_rank must be a multiple of 128 up to 512, not {rank}"
    if rope % 16 or rope > LANES:
        return f"qk_rope_head_dim must be a multiple of 16 up to 128, not {rope}"
    if call.slots % LANES:
        return f"the cache's slots must be a multiple of 128, not {call.slots}"
    size = jnp.dtype(call.dtype).itemsize
    shape = call.batch, _group(call) * call.heads, call.slots
    needed = make_plan(*shape, size, device.kind).vmem_bytes >> 20
    limit = vmem_limit(device.kind)
    if needed > limit and device.platform == "tpu":
        return f"needs {needed} MiB of VMEM, {device.kind} is known to have {limit}"
    return None


def latent_attention(queries, store, seen, call):
    """The absorbed form: see `ops.latent_attention`. Its backward is XLA's."""
    table = store.table if call.store == "paged" else None
    attend = functools.partial(_attention, scale=call.scale)
    if call.queries > _group(call):
        return _by_groups(attend, queries, store, seen.limits, table, _group(call))
    lengths = None if seen.full else seen.limits
    if seen.ends is not None and seen.counts is None and not seen.full:
        lengths = seen.ends  # one number a row
    return attend(*queries, store.latent, store.k_rope, lengths, table)


def _group(call):
    """How many tokens a call of the kernel takes."""
    return min(call.queries, max(_MOST_ROWS // call.heads, 1))


def _by_groups(attend, queries, store, limits, table, size):
    """A call of the kernel for each group of tokens, all of which read the cache."""
    batch, tokens = limits.shape
    count = -(-tokens // size)

    def cut(x):  # [B T ...] to [groups B size ...], with queries that see nothing at the end
        x = jnp.pad(x, [(0, 0), (0, count * size - tokens), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    def group(part):
        return attend(part[0], part[1], store.latent, store.k_rope, part[2], table)

    made = jax.lax.map(group, tuple(map(cut, (*queries, limits))))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :tokens]  # noqa: E731
    return join(made[0]), join(made[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(pattern, q_rope, latent, k_rope, lengths, table, scale):
    batch, tokens, heads, _ = pattern.shape
    slots = latent.shape[1] if table is None else table.shape[1] * LANES
    size = jnp.dtype(latent.dtype).itemsize
    chosen = make_plan(batch, tokens * heads, slots, size)
    return decode(pattern, q_rope, latent, k_rope, lengths, scale, chosen, table)


def _forward(pattern, q_rope, latent, k_rope, lengths, table, scale):
    arrays = (pattern, q_rope, latent, k_rope)
    return _attention(*arrays, lengths, table, scale), (arrays, lengths, table)


def _backward(scale, residuals: Any, cotangents: Any):
    arrays, lengths, table = residuals
    return *ops.latent_gradients(arrays, table, lengths, scale, cotangents), None, None


_attention.defvjp(_forward, _backward)


# This is jitted, so that the layers of a model share one lowering.
@functools.partial(jax.jit, static_argnames=("scale", "plan"))
def decode(pattern, q_rope, latent, k_rope, lengths, scale, plan: Plan, table=None):
    """Runs the kernel by `plan`; arguments and results as `ops.latent_attention`.

    With a table [B M], latent and k_rope are the pages of a pool, [G 128 R] and [G 128 P].
    """
    from mla_jax.ops.tpu.kernel import launch  # where it runs, since Pallas takes long to import

    batch, tokens, heads, rank = pattern.shape
    slots = latent.shape[1] if table is None else table.shape[1] * LANES
    out, lse, *parts = launch(pattern, q_rope, latent, k_rope, lengths, scale, plan, table=table)
    out, lse = out.reshape(batch, -1, rank), lse.reshape(batch, -1)
    if parts:
        row = _shared_row(lengths, slots, batch, plan)
        out, lse = _join(out, lse, parts[0], parts[1], row)
    out = out[:, : tokens * heads].reshape(batch, tokens, heads, rank)
    return out, lse[:, : tokens * heads].reshape(batch, tokens, heads)


def _shared_row(lengths, slots, batch, plan):
    """The row that both cores worked on, or `batch` where the halves meet between rows."""
    if lengths is None:
        lengths = jnp.full((batch,), slots, jnp.int32)
    longest = jnp.clip(lengths.reshape(batch, -1).max(1), 0, slots)
    counts = jnp.maximum(-(-longest // plan.piece), 1)
    ends, pieces = jnp.cumsum(counts), plan.block // plan.piece
    half = (-(-ends[-1] // pieces) + 1) // 2 * pieces
    shared = (ends > half) & (ends - counts < half)
    return jnp.where(shared.any(), jnp.argmax(shared), batch).astype(jnp.int32)


def _join(out, lse, part, part_lse, row):
    """Puts the merged parts of the shared row into it; a row of `batch` changes nothing."""
    parts = zip(part, part_lse.reshape(len(part), -1)[:, : part.shape[1]], strict=True)
    merged, merged_lse = merge_attention(*parts)
    merged_lse = jnp.pad(merged_lse, (0, lse.shape[1] - len(merged_lse)))
    out = out.at[row].set(merged.astype(out.dtype), mode="drop")
    return out, lse.at[row].set(merged_lse, mode="drop")
