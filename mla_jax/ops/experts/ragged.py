"""The experts through `lax.ragged_dot` on rows sorted by expert, which XLA for TPUs has natively.

Letters: M tokens, K experts per token, E experts, D hidden size, F inner size.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.ops.experts.call import Call
from mla_jax.ops.experts.xla import DENSE_TOKENS
from mla_jax.target import Target


def why_not(call: Call, target: Target) -> str | None:
    """Why ragged products do not serve this call, or None."""
    if target.platform != "tpu":
        return f"needs a TPU, this is {target}"
    if call.stored:
        return "takes no weights as a checkpoint stores them"
    if not call.static:
        return "the number of tokens must be static"
    if call.tokens <= DENSE_TOKENS:
        return f"sorting pays above {DENSE_TOKENS} tokens, not for {call.tokens}"
    return None


def run(x, experts, weights, gate, up, down, *, precision, call: Call, target: Target):
    """See `routed_experts`."""
    count = experts.shape[1]
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    ragged = functools.partial(
        lax.ragged_dot,
        group_sizes=jnp.bincount(flat, length=call.experts).astype(jnp.int32),
        precision=precision,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
    gate, up, down = (kernel.astype(x.dtype) for kernel in (gate, up, down))
    rows = x[order // count]
    if call.partial:  # sorted behind all groups, where a product is anything
        rows = jnp.where((flat[order] < call.experts)[:, None], rows, 0)
    hidden = jax.nn.silu(ragged(rows, gate)) * ragged(rows, up)
    own = ragged(hidden.astype(x.dtype), down)[jnp.argsort(order)]  # back in the tokens' order
    own = own.reshape(*experts.shape, -1)
    if call.partial:
        own = jnp.where((experts < call.experts)[..., None], own, 0)
    mixed = (own * weights[..., None]).sum(1)
    return mixed.astype(x.dtype)
