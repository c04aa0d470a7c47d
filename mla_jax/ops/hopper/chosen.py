"""Attention to chosen slots on Hopper GPUs (sparse attention): dispatch, and the call on arrays.

Each query token attends to K slots of its own; `gathered.py` is the kernel. All tokens have the
same number of slots, so the cut of the work is known when the call is compiled. It is forward only:
derivatives are those of the XLA backend.

Letters: B batch, T query tokens, S cache slots, N heads, R latent width, P rope width, K chosen
slots; a paged cache has G pages of 128 slots, of which a row may have M.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mla_jax import ops
from mla_jax.ops import guard
from mla_jax.ops.hopper.mapped import joined
from mla_jax.ops.hopper.schedule import SLACK, STEP, TILE, equal_rows

_OPTIONS = {"chosen", "lengths", "lengths per query"}


def unsupported(call) -> str | None:
    """Why the kernel cannot serve a call with chosen slots, beyond what all calls need, or None."""
    options = [name for name in call.options if name not in _OPTIONS]
    if options:
        return f"takes chosen slots and lengths, not {', '.join(options)}"
    if call.encoding is not None:
        return f"takes no {call.encoding} latents with chosen slots"
    tokens = call.batch * call.queries
    if call.batch * call.slots >= 2**31 or tokens * max(-(-call.heads // 8) * 8, TILE) >= 2**31:
        return f"{tokens} tokens, {call.batch} rows of {call.slots} slots: too many for 32 bits"
    return None


def attend(
    pattern: Float[Array, "B T N R"],
    q_rope: Float[Array, "B T N P"],
    latent: Float[Array, "B S R"] | Float[Array, "G 128 R"],
    k_rope: Float[Array, "B S P"] | Float[Array, "G 128 P"],
    chosen: Int[Array, "B T K"],
    limits: Int[Array, "B T"],
    *,
    table: Int[Array, "B M"] | None = None,
    scale: float,
    interpret: Any = None,
    sms: int,
    slack: int = SLACK,
) -> tuple[Float[Array, "B T N R"], Float[Array, "B T N"]]:
    """The kernel on arrays.

    Args:
        pattern, q_rope: queries.
        latent, k_rope: the cache; with a table, the pool's pages.
        chosen: slots of each query, no slot twice; below 0 or at `limits` and above is none.
        limits: slots that each query may see.
        table: the page of every 128 slots of a row, G where it has none.
        scale: softmax temperature.
        interpret: parameters of Pallas's interpreter, which runs the kernel on a CPU.
        sms: multiprocessors to use.
        slack: as in `make_schedule`.
    """
    arrays = guard.alike(pattern, q_rope, latent, k_rope)
    return _attention(scale, interpret, sms, slack, arrays, table, chosen, limits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attention(scale, interpret, sms, slack, arrays, table, chosen, limits):
    @jax.custom_batching.custom_vmap
    def call(arrays, table, chosen, limits):
        count, heads = limits.size, arrays[0].shape[2]
        steps = max(1, -(-chosen.shape[2] // STEP))
        cut = equal_rows(count, steps, rows=heads, num_sms=sms, slack=slack)
        run = functools.partial(_call, scale, interpret)
        return guard.unsplit(run, "pallas_gpu", interpret)(arrays, table, chosen, limits, cut)

    @call.def_vmap
    def _(size, mapped, arrays, table, chosen, limits):
        # The calls become one call of more rows.
        of_arrays, of_table, of_chosen, of_limits = mapped
        arrays, table, join = joined(size, arrays, of_arrays, table, of_table)
        rest = join(chosen, of_chosen), join(limits, of_limits)
        results = _attention(scale, interpret, sms, slack, arrays, table, *rest)
        return [x.reshape(size, -1, *x.shape[1:]) for x in results], [True, True]

    return tuple(call(arrays, table, chosen, limits))


def _forward(scale, interpret, sms, slack, arrays, table, chosen, limits):
    results = _attention(scale, interpret, sms, slack, arrays, table, chosen, limits)
    return results, (arrays, table, chosen, limits)


def _backward(scale, interpret, sms, slack, residuals, cotangents):
    del interpret, sms, slack
    arrays, table, chosen, limits = residuals
    gradients = ops.latent_gradients(arrays, table, limits, scale, cotangents, chosen)
    return tuple(gradients), None, None, None


_attention.defvjp(_forward, _backward)


# This is jitted, so that the layers of a model share one lowering, which takes seconds.
@functools.partial(jax.jit, static_argnames=("scale", "interpret"))
def _call(scale, interpret, arrays, table, chosen, limits, schedule):
    from mla_jax.ops.hopper import gathered, kernel

    pattern, q_rope, latent, k_rope = arrays
    batch, tokens, heads, rank = pattern.shape
    count, rope = batch * tokens, k_rope.shape[2]
    # Copies take query rows by eights; the interpreter stores whole tiles only.
    unit = TILE if interpret else 8
    rows = -(-heads // unit) * unit

    def flat(query):
        query = query.reshape(count, heads, query.shape[-1])
        query = jnp.pad(query, ((0, 0), (0, rows - heads), (0, 0)))
        query = query.reshape(count * rows, query.shape[-1])
        return jnp.pad(query, ((0, max(0, TILE - count * rows)), (0, 0)))

    operands = [flat(pattern), flat(q_rope)]
    operands += [x.reshape(x.shape[0] * x.shape[1], x.shape[2]) for x in (latent, k_rope)]
    if not rope:
        operands = operands[::2]
    chosen, limits = (x.astype(jnp.int32).reshape(count, -1) for x in (chosen, limits))
    steps = max(1, -(-chosen.shape[1] // STEP))
    chosen = jnp.pad(
        chosen, ((0, 0), (0, steps * STEP - chosen.shape[1])), constant_values=-1
    ).reshape(-1)
    limits = limits[:, 0]
    shape = kernel.Shape(
        tokens=1,
        heads=heads,
        slots=steps * STEP,
        rank=rank,
        rope=rope,
        rows=rows,
        tiles=-(-heads // TILE),
        parts=schedule.part.shape[0],
        scale=float(scale),
        dtype=pattern.dtype,
        sharing=tokens,
    )
    # No compiler can fold these zeros; `make_schedule` says why.
    zero = jnp.where(limits < 0, 1, 0).astype(jnp.int32)
    arrivals = jnp.broadcast_to(zero[:, None], (count, shape.tiles)).reshape(-1)
    schedule = schedule._replace(arrivals=arrivals)
    out, lse = gathered.attend(operands, chosen, limits, schedule, table, shape, interpret)
    out = out.reshape(count, rows, rank)[:, :heads]
    lse = lse.reshape(count, rows)[:, :heads]
    return [out.reshape(pattern.shape), lse.reshape(pattern.shape[:-1])]
