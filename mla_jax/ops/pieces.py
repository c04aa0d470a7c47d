"""Context attention by pieces: cached latents are expanded, attended and forgotten.

A piece of the cache becomes keys and values by two matmuls into a workspace of bounded size; the
expanded form's kernel attends to it as to any keys, and its result is merged with that of the
pieces before it by lse. Pieces that no query sees are neither expanded nor attended. Of the cache
nothing but a piece is ever copied.

Letters: B batch, T query tokens, S slots, N heads, R latent, P rotary, H key and V value channels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mla_jax.cache import PAGE, Dense, Store
from mla_jax.ops import dispatch
from mla_jax.ops.merge import merge_attention
from mla_jax.ops.seen import Seen
from mla_jax.ops.xla import varying_zero
from mla_jax.target import Target

_WORKSPACE = 2**28  # bytes of the keys and values of a piece
_LEAST = 8 * PAGE  # slots of a piece, so that a kernel has whole blocks


def piece_of(call: dispatch.Call) -> dispatch.Call:
    """The call of the expanded form that attends to a piece: all are alike but a shorter last."""
    size = jnp.dtype(call.dtype).itemsize
    per_slot = call.batch * call.heads * (call.key_dims[0] + call.value_dim) * size
    count = -(-call.slots // max(_WORKSPACE // per_slot, _LEAST))
    slots = -(-call.slots // count)
    options = {*call.options} - {"lengths"} | {"lengths per query"}
    return dataclasses.replace(
        call,
        op="expanded_attention",
        slots=call.slots if count == 1 else -(-slots // PAGE) * PAGE,
        options=tuple(sorted(options)),
        store="dense",
    )


def why_not(call: dispatch.Call, device: Target, *, backend: str) -> str | None:
    """Why a backend of the expanded form cannot serve the pieces of `call` on `device`, or None."""
    if not all(isinstance(size, int) for size in (call.batch, call.queries, call.slots)):
        return "needs sizes that are known when it is compiled"
    if others := set(call.options) - {"lengths", "lengths per query", "window"}:
        return f"takes lengths and a window, not {', '.join(sorted(others))}"
    return dict(dispatch.report(piece_of(call), device))[backend]


def context_attention(
    queries: tuple[Float[Array, "B T N H"], Float[Array, "B T N P"]],
    store: Store,
    seen: Seen,
    call: dispatch.Call,
    *,
    kv_b: Float[Array, "R N H+V"],
    backend: str,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """The expanded form over cached latents: see `ops.context_attention`."""
    part, nope = piece_of(call), call.key_dims[0]
    limits, live = seen.limits, seen.limits.max(1)
    oldest = jnp.int32(0)  # the first slot that any query sees
    if seen.window is not None:
        oldest = jnp.where(limits > 0, limits - seen.window, call.slots).min()
    expand = functools.partial(jnp.einsum, "BSR,RNK->BSNK", precision=call.precision)

    @functools.partial(jax.checkpoint, static_argnums=(0,))
    def attend(size, start, queries, store, kv_b):
        rows = store.block(start, size, pages=True)
        # The gradient of kv_b is a sum over slots, so what nobody sees is cleared.
        held = (start + jnp.arange(size, dtype=jnp.int32))[None] < live[:, None]
        latent = jnp.where(held[..., None], rows["latent"], jnp.zeros((), rows["latent"].dtype))
        kernel = kv_b.astype(latent.dtype)
        arrays = {
            "k_nope": expand(latent, kernel[..., :nope]),
            "k_rope": rows["k_rope"],
            "value": expand(latent, kernel[..., nope:]),
        }
        now = Seen(limits=limits - start, window=seen.window)
        piece = dataclasses.replace(part, slots=size)
        out, lse = dispatch.attend(queries, Dense(arrays), now, piece, {piece.op: backend})
        return out.astype(jnp.float32), lse

    def step(size, so_far, start):
        def more():
            return merge_attention(so_far, attend(size, start, queries, store, kv_b))

        met = (start < live.max()) & (start + size > oldest)
        return jax.lax.cond(met, more, lambda: so_far), None

    batch, tokens, heads = queries[0].shape[:3]
    zero = varying_zero(queries, store, kv_b, seen)
    so_far = (
        jnp.zeros((batch, tokens, heads, call.value_dim), jnp.float32) + zero,
        jnp.full((batch, tokens, heads), -jnp.inf, jnp.float32) + zero,
    )
    whole, rest = divmod(call.slots, part.slots)
    starts = jnp.arange(whole, dtype=jnp.int32) * part.slots
    so_far, _ = jax.lax.scan(functools.partial(step, part.slots), so_far, starts)
    if rest:
        so_far, _ = step(rest, so_far, jnp.int32(whole * part.slots))
    return so_far[0].astype(queries[0].dtype), so_far[1]
