"""Cross-entropy of a head's words without the logits of all tokens at once.

Logits [M W] in float32, and their gradient, are a small model's largest arrays: 16,384 tokens of
102,400 words are 6.7 GB each. Here they exist for some tokens at a time, and the backward makes
them again: one matmul more than the three of the usual loss (Wijmans et al. 2024,
arXiv 2411.09009, who cut words as well, in a kernel).

Letters: B any leading axes, T tokens, D hidden size, W words, C tokens of a chunk.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from mla_jax import sharding


def linear_cross_entropy(
    hidden: Float[Array, "*B T D"],
    kernel: Float[Array, "D W"],
    labels: Int[Array, "*B T"],
    *,
    scale: float = 1.0,
    chunk: int = 2048,
    precision=None,
) -> Float[Array, "*B T"]:
    """Every token's -log softmax(scale hidden @ kernel)[label], in float32.

    What `optax.softmax_cross_entropy_with_integer_labels` gives for these logits, and its gradients
    with respect to `hidden` and `kernel`.

    Args:
        hidden: states of the tokens; their dtype is the computation's. Logits, softmax and what is
            summed over tokens are float32 (float64 for float64).
        kernel: of the head, in any floating dtype; its gradient has the same. A tied embedding
            [W D] goes in as `embedding.T`.
        labels: the words that came, 0 to W - 1.
        scale: factor of the logits.
        chunk: tokens, over all leading axes, whose logits exist at once: 4 chunk W bytes, two to
            three times.
        precision: of the matmuls, as in jax.lax.dot.

    Returns:
        Losses in nats. Their caller leaves out tokens that do not count, which under jit may have
        any label: `jnp.where(valid, losses, 0).sum() / valid.sum()`.

    Raises:
        ValueError: shapes or dtypes that do not go together, chunk below 1, or, outside jit, a
            label that is not a word (under jit its loss is NaN).

    >>> hidden, kernel = jnp.ones((2, 3, 4)), jnp.zeros((4, 8))
    >>> losses = linear_cross_entropy(hidden, kernel, jnp.zeros((2, 3), int))
    >>> losses.shape, round(float(losses[0, 0]) / math.log(8), 6)
    ((2, 3), 1.0)
    """
    words = _checked(hidden, kernel, labels, chunk)
    by_chunks: Any = functools.partial(_by_chunks, scale=scale, chunk=chunk, precision=precision)
    if sharding.mesh_of(hidden, kernel, labels) is not None:  # XLA splits the loop's products
        rows = jax.P(*sharding.spec(hidden)[:-1])
        by_chunks = jax.sharding.auto_axes(by_chunks, out_sharding=rows)
    losses = by_chunks(hidden, kernel, labels)
    return jnp.where((labels >= 0) & (labels < words), losses, jnp.nan)


def _by_chunks(hidden, kernel, labels, *, scale, chunk, precision):
    *lead, tokens = labels.shape
    if lead and math.prod(lead) > chunk:  # rows are cut too, not their tokens alone
        flat = hidden.reshape(-1, hidden.shape[-1]), kernel, labels.reshape(-1)
        how = {"scale": scale, "chunk": chunk, "precision": precision}
        return _by_chunks(*flat, **how).reshape(labels.shape)
    size = max(1, min(tokens, chunk // math.prod(lead)))
    count = -(-tokens // size)
    size = -(-tokens // count)  # chunks of one size, the last one padded by less than `count`

    def cut(x):  # [*B T ...] to [count, rows, size, ...]: every chunk has tokens of all rows
        x = x.reshape(math.prod(lead), tokens, *x.shape[len(lead) + 1 :])
        x = jnp.pad(x, [(0, 0), (0, count * size - tokens)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(-1, count, size, *x.shape[2:]), 1, 0)

    static = (float(scale), precision)
    losses = _losses(static, cut(hidden), _varying(kernel, hidden), cut(labels))
    return jnp.moveaxis(losses, 0, 1).reshape(-1, count * size)[:, :tokens].reshape(labels.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(static, hidden, kernel, labels):
    return _forward(static, hidden, kernel, labels)[0]


def _forward(static, hidden, kernel, labels):
    narrow = kernel.astype(hidden.dtype)

    def one(chunk):
        states, label = chunk
        logits = _logits(static, states, narrow)
        lse = jax.nn.logsumexp(logits, axis=-1)
        # A sum, not a gather, whose derivative scatters and which a split vocabulary cannot do.
        return lse - jnp.where(_is_label(label, logits), logits, 0).sum(-1), lse

    with jax.named_scope("linear_cross_entropy"):
        losses, lse = lax.map(one, (hidden, labels))
    return losses, (hidden, kernel, labels, lse)


def _backward(static, residuals, slopes):
    hidden, kernel, labels, lse = residuals
    scale, precision = static
    narrow, wide = kernel.astype(hidden.dtype), lse.dtype
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=wide)

    def one(total, chunk):
        states, label, lse, slope = chunk
        logits = _logits(static, states, narrow)
        shares = jnp.exp(logits - lse[..., None]) - _is_label(label, logits).astype(wide)
        of_logits = (shares * (scale * slope)[..., None]).astype(states.dtype)
        of_states = product("BCW,DW->BCD", of_logits, narrow).astype(states.dtype)
        return total + product("BCD,BCW->DW", states, of_logits), of_states

    with jax.named_scope("linear_cross_entropy"):
        empty = _varying(jnp.zeros(kernel.shape, wide), hidden)
        of_kernel, of_hidden = lax.scan(one, empty, (hidden, labels, lse, slopes))
    return of_hidden, of_kernel.astype(kernel.dtype), None


_losses.defvjp(_forward, _backward)


def _logits(static, states, kernel):
    """Float32 [B C W]."""
    scale, precision = static
    wide = jnp.promote_types(states.dtype, jnp.float32)
    logits = jnp.einsum(
        "BCD,DW->BCW", states, kernel, precision=precision, preferred_element_type=wide
    )
    return logits if scale == 1 else logits * scale


def _is_label(label, logits):
    return label[..., None] == jnp.arange(logits.shape[-1], dtype=label.dtype)[None, None]


def _varying(x, operand):
    """Under shard_map, x as what varies over the mesh axes that the operand varies over."""
    axes = lambda x: getattr(getattr(jax.typeof(x), "mat", None), "varying", frozenset())  # noqa: E731
    missing = axes(operand) - axes(x)
    return lax.pcast(x, tuple(missing), to="varying") if missing else x


def _checked(hidden, kernel, labels, chunk) -> int:
    """W, or a ValueError that names the argument at fault."""
    if hidden.ndim < 2 or kernel.ndim != 2 or kernel.shape[0] != hidden.shape[-1]:
        raise ValueError(
            f"hidden has shape {hidden.shape} and kernel {kernel.shape}: they must be [*B T D] and "
            "[D W]."
        )
    if labels.shape != hidden.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels is {labels.dtype} of shape {labels.shape}: it must be an integer array "
            f"[*B T] = {hidden.shape[:-1]}."
        )
    for name, array in (("hidden", hidden), ("kernel", kernel)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} is {array.dtype}: it must be floating.")
    if 0 in hidden.shape or chunk < 1:
        raise ValueError(f"hidden has shape {hidden.shape}, chunk={chunk}: all must be at least 1.")
    words = kernel.shape[1]
    if not isinstance(labels, jax.core.Tracer):
        known = np.asarray(labels)
        wrong = known[(known < 0) | (known >= words)]
        if wrong.size:
            raise ValueError(f"labels has {wrong[0]}: the head has {words} words.")
    return words
