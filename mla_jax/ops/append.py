"""What a decode step appends to a cache, and its queries, by two kernels of a Hopper GPU.

XLA makes a kernel of either part of the queries, of the latents' norm, of the scales of latents in
8 bits, and of the write of every array; most of these take less time than their start. Here one
kernel of XLA's puts rotary queries, keys, latents and the other queries side by side, rotated, as
sums of what the projections left in parts; and one, `hopper.append`, normalises and writes.

Letters: A rows of activations: B of the cache, or more where a single one comes in copies
(`dense.copies`); T tokens, N heads, H nope and P rope width, R latent width, S slots, L lines of P
numbers: N + 1 + R / P and those of the other queries.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mla_jax import sharding, target
from mla_jax.cache import Dense, Paged, Store
from mla_jax.ops import hopper
from mla_jax.ops.norm import rms_norm


class _How(NamedTuple):
    """What is known when the program is compiled."""

    heads: int
    epsilon: float
    interpret: Any


def append_token(
    q_nope: Float[Array, "A T N H"],
    q_rope: Float[Array, "A T N P"],
    latent: Float[Array, "A T R"],
    k_rope: Float[Array, "A T P"],
    scale: Float[Array, "R"],
    store: Store,
    place: Int[Array, "B T"],
    epsilon: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N P"], Dense] | None:
    """The queries, and `store.write` of normalised latents; None where no kernel serves.

    There is one on a Hopper GPU for one token of every row and a dense store on one device, of
    latents and rotary keys alone, in 16 bits or latents in float8_e4m3fn. Derivatives are those of
    XLA's way.

    Args:
        q_nope: queries that are not rotated. They are summed with the others where they fill lines.
        q_rope: rotated queries.
        latent: before the norm.
        k_rope: rotated keys.
        scale: of the norm, as `epsilon`.
        store: of B rows.
        place: the slots of the tokens.
        epsilon: of the norm.
    """
    here, count = target.current(), place.shape[0]
    if not _serves(q_rope, latent, k_rope, store, place, here):
        return None
    assert isinstance(store, Dense)
    q_rope, latent, k_rope = q_rope[:count], latent[:count], k_rope[:count]
    lines = latent.reshape(count, -1, k_rope.shape[2])
    rest = _lines(q_nope[:count, 0], k_rope)
    # Behind the barrier XLA does not see what each part is made of, which it would make apart.
    whole = lax.optimization_barrier(jnp.concatenate([q_rope[:, 0], k_rope, lines, rest], axis=1))
    how = _How(q_rope.shape[2], epsilon, here.interpret)
    q_rope, rest, store = _append(how, whole, scale.astype(whole.dtype), place[:, 0], store)
    q_nope = rest.reshape(q_nope[:count].shape) if rest.size else q_nope[:count]
    return q_nope, q_rope[:, None], store


def _lines(query, like):
    """Queries [B N H] as lines of P numbers, [B 0 P] where they cannot be."""
    count, width, rope = len(query), math.prod(query.shape[1:]), like.shape[2]
    # A copy is of up to 256 lines.
    fits = query.dtype == like.dtype and width % rope == 0 and width // rope <= 256
    return query.reshape(count, -1, rope) if fits else like[:, :0]


def _serves(q_rope, latent, k_rope, store, place, here) -> bool:
    arrays = (q_rope, latent, k_rope)
    if (
        isinstance(store, Paged)
        or hopper.not_hopper(here)
        or sharding.mesh_of(arrays, store.arrays)
    ):
        return False
    # Pallas refuses references within `jax.shard_map` where that looks after types.
    if any(jax.typeof(x).mat.varying for x in jax.tree.leaves((arrays, store, place))):
        return False
    if store.arrays.keys() - {"latent_scale"} != {"latent", "k_rope"}:
        return False
    sizes = (*place.shape, *q_rope.shape, *store.latent.shape)
    if not all(isinstance(size, int) for size in sizes) or place.shape[1] != 1:
        return False
    kinds = {array.dtype.name for array in (*arrays, store.k_rope)}
    if len(kinds) > 1 or store.encoding not in (None, "float8_e4m3fn"):
        return False
    # A warpgroup loads 128 numbers at once; a copy is of up to 256 by 256, and of whole 16 bytes.
    (heads, rope), rank = q_rope.shape[2:], latent.shape[2]
    fits = rope and not rope % 8 and not rank % 128 and not rank % rope and max(heads, rope) <= 256
    return bool(fits) and kinds.pop() in ("bfloat16", "float16")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _append(how: _How, whole, scale, place, store):
    @jax.custom_batching.custom_vmap
    def call(whole, scale, place, store):
        from mla_jax.ops.hopper import append

        *queries, arrays = append.append(whole, scale, place, store.arrays, **how._asdict())
        return *queries, type(store)(arrays)

    @call.def_vmap
    def _(size, mapped, *arguments):
        del size
        axes = tuple(jax.tree.map(lambda is_mapped: 0 if is_mapped else None, mapped))
        made = jax.vmap(functools.partial(_by_xla, how), in_axes=axes)(*arguments)
        return made, jax.tree.map(lambda _: True, made)

    return call(whole, scale, place, store)


def _by_xla(how, whole, scale, place, store):
    rank, (count, _, rope) = store.latent.shape[2], store.k_rope.shape
    q_rope, k_rope, latent, rest = jnp.split(
        whole, [how.heads, how.heads + 1, how.heads + 1 + rank // rope], axis=1
    )
    latent = rms_norm(latent.reshape(count, 1, rank), scale, how.epsilon)
    return q_rope, rest, store.write(place[:, None], latent=latent, k_rope=k_rope)


def _forward(how, whole, scale, place, store):
    return _append(how, whole, scale, place, store), (whole, scale, place, store)


def _backward(how, residuals, cotangents):
    whole, scale, place, store = residuals
    plain = lambda whole, scale, store: _by_xla(how, whole, scale, place, store)  # noqa: E731
    d_whole, d_scale, d_store = jax.vjp(plain, whole, scale, store)[1](cotangents)
    return d_whole, d_scale, None, d_store


_append.defvjp(_forward, _backward)
