"""Context attention by pieces: cached latents are expanded, attended and forgotten.

A piece of the cache becomes keys and values by two matmuls into a workspace of bounded size, to
which the expanded form's kernel attends as to any keys. A backend's `Core` says how its result goes
with that of the pieces before it: `merging` does it for any backend, by lse. Pieces that no query
sees are neither expanded nor attended. Of the cache nothing but a piece is ever copied.

Letters: B batch, T query tokens, S slots, N heads, R latent, P rotary, H key and V value channels,
C of both.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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


class Core(NamedTuple):
    """How a backend attends to one piece after the other.

    Attributes:
        begin: (queries, call, the call of a piece, zero) -> queries as it takes them, and its
            result over no slots; `zero` is 0.0 that varies over the mesh as results do.
        attend: (result so far, such queries, store of a piece's keys and values, seen, the call of
            this piece) -> result over this piece too. It differentiates in the first three.
        end: (result, call) -> out [B T N V] in the operands' dtype, and lse [B T N].
    """

    begin: Callable[..., tuple[Any, Any]]
    attend: Callable[..., Any]
    end: Callable[..., tuple[Array, Array]]


def merging(backend: str) -> Core:
    """Pieces by any backend of the expanded form, merged in float32 by lse."""

    def begin(queries, call, part, zero):
        shape = (call.batch, call.queries, call.heads)
        out = jnp.zeros((*shape, call.value_dim), jnp.float32) + zero
        return queries, (out, jnp.full(shape, -jnp.inf, jnp.float32) + zero)

    def attend(so_far, queries, store, seen, part):
        out, lse = dispatch.attend(queries, store, seen, part, {part.op: backend})
        return merge_attention(so_far, (out.astype(jnp.float32), lse))

    def end(so_far, call):
        return so_far[0].astype(call.dtype), so_far[1]

    return Core(begin, attend, end)


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
    kv_b: Float[Array, "R N C"],
    core: Core,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """The expanded form over cached latents: see `ops.context_attention`."""
    part, nope = piece_of(call), call.key_dims[0]
    limits = seen.limits
    oldest = jnp.int32(0)  # the first slot that any query sees
    if seen.window is not None:
        oldest = jnp.where(limits > 0, limits - seen.window, call.slots).min()
    expand = functools.partial(jnp.einsum, "BSR,RNK->BSNK", precision=call.precision)

    def attend(so_far, queries, rows, kv_b, limits):
        """The result over a piece too; `limits` count from its first slot."""
        size = rows["latent"].shape[1]
        # The gradient of kv_b is a sum over slots, so what nobody sees is cleared.
        held = jnp.arange(size, dtype=jnp.int32)[None] < limits.max(1, keepdims=True)
        latent = jnp.where(held[..., None], rows["latent"], jnp.zeros((), rows["latent"].dtype))
        kernel = kv_b.astype(latent.dtype)
        arrays = {
            "k_nope": expand(latent, kernel[..., :nope]),
            "k_rope": rows["k_rope"],
            "value": expand(latent, kernel[..., nope:]),
        }
        now, piece = Seen(limits=limits, window=seen.window), dataclasses.replace(part, slots=size)
        return core.attend(so_far, queries, Dense(arrays), now, piece)

    def gradients(kept, cotangents):
        """Of what differentiates: keys and values are made again, not kept."""
        *operands, limits = kept
        run = functools.partial(attend, limits=limits)
        return *jax.vjp(run, *operands)[1](cotangents), None

    again = jax.custom_vjp(attend)
    again.defvjp(lambda *operands: (attend(*operands), operands), gradients)

    def step(size, so_far, start):
        def more():
            rows = store.block(start, size, pages=True)
            return again(so_far, ready, rows, kv_b, limits - start)

        met = (start < limits.max()) & (start + size > oldest)
        return jax.lax.cond(met, more, lambda: so_far), None

    ready, so_far = core.begin(queries, call, part, varying_zero(queries, store, kv_b, seen))
    whole, rest = divmod(call.slots, part.slots)
    starts = jnp.arange(whole, dtype=jnp.int32) * part.slots
    so_far, _ = jax.lax.scan(functools.partial(step, part.slots), so_far, starts)
    if rest:
        so_far, _ = step(rest, so_far, jnp.int32(whole * part.slots))
    return core.end(so_far, call)
