"""Cross-entropy of a head's words without the logits of all tokens at once.

Logits [M W] in float32, and their gradient, are a small model's largest arrays: 16,384 tokens of
102,400 words are 6.7 GB each. Here they exist for some tokens at a time. Of every token's loss, the
backward makes them again: one matmul more than the three of the usual loss (Wijmans et al. 2024,
arXiv 2411.09009, who cut words as well, in a kernel). Of the mean, the slope of every logit is
known but for one factor, so the forward makes the gradients while it has the logits (Hsu et al.
2024, arXiv 2410.10989): three matmuls.

Letters: B any leading axes, T tokens, D hidden size, W words, C tokens of a chunk.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mla_jax import sharding
from mla_jax.ops.guard import varying
from mla_jax.plain import Ready


def linear_cross_entropy(
    hidden: Float[Array, "*B T D"],
    kernel: Float[Array, "D W"],
    labels: Int[Ready, "*B T"],
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


def mean_linear_cross_entropy(
    hidden: Float[Array, "*B T D"],
    kernel: Float[Array, "D W"],
    labels: Int[Ready, "*B T"],
    counted: Bool[Array, "*B T"] | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 2048,
    precision=None,
) -> Float[Array, ""]:
    """The mean of `linear_cross_entropy` over the tokens that count: what a model is trained on.

    It takes a matmul with the head less than the mean of those losses where gradients are asked
    for, and keeps the gradients of `hidden` and `kernel` in float32 from the forward to the
    backward.

    Args:
        hidden, kernel, labels, scale, chunk, precision: as in `linear_cross_entropy`.
        counted: which tokens count; the others' labels may be anything under jit. None is all.

    Returns:
        The mean in nats, 0 where no token counts; NaN under jit where the label of one that counts
        is no word.

    Raises:
        ValueError: as `linear_cross_entropy`, or counted is not [*B T].

    >>> hidden, kernel = jnp.ones((2, 3, 4)), jnp.zeros((4, 8))
    >>> loss = mean_linear_cross_entropy(hidden, kernel, jnp.zeros((2, 3), int))
    >>> round(float(loss) / math.log(8), 6)
    1.0
    """
    counted = jnp.ones(labels.shape, bool) if counted is None else counted
    if counted.shape != labels.shape:
        raise ValueError(
            f"counted has shape {counted.shape}: it must be [*B T] = {labels.shape}, as labels."
        )
    words = _checked(hidden, kernel, labels, chunk, counted)
    total: Any = functools.partial(_total_by_chunks, scale=scale, chunk=chunk, precision=precision)
    if sharding.mesh_of(hidden, kernel, labels, counted) is not None:
        total = jax.sharding.auto_axes(total, out_sharding=jax.P())
    mean = total(hidden, kernel, labels, counted) / jnp.maximum(counted.sum(), 1)
    wrong = counted & ((labels < 0) | (labels >= words))
    return jnp.where(wrong.any(), jnp.nan, mean)


def _by_chunks(hidden, kernel, labels, *, scale, chunk, precision):
    *lead, tokens = labels.shape
    if lead and math.prod(lead) > chunk:  # rows are cut too, not their tokens alone
        flat = hidden.reshape(-1, hidden.shape[-1]), kernel, labels.reshape(-1)
        how = {"scale": scale, "chunk": chunk, "precision": precision}
        return _by_chunks(*flat, **how).reshape(labels.shape)
    cut = _cut(labels.shape, chunk)
    losses = _losses((float(scale), precision), cut(hidden), varying(kernel, hidden), cut(labels))
    count, _, size = losses.shape
    return jnp.moveaxis(losses, 0, 1).reshape(-1, count * size)[:, :tokens].reshape(labels.shape)


def _total_by_chunks(hidden, kernel, labels, counted, *, scale, chunk, precision):
    *lead, _ = labels.shape
    if lead and math.prod(lead) > chunk:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        labels, counted = labels.reshape(-1), counted.reshape(-1)
    cut, static = _cut(labels.shape, chunk), (float(scale), precision)
    return _total(static, cut(hidden), varying(kernel, hidden), cut(labels), cut(counted))


def _cut(shape, chunk):
    """[*B T ...] to [count, rows, size, ...]: every chunk has tokens of all rows."""
    *lead, tokens = shape
    rows = math.prod(lead)
    count = -(-tokens // max(1, min(tokens, chunk // rows)))
    size = -(-tokens // count)  # chunks of one size, the last one padded by less than `count`

    def cut(x):
        x = x.reshape(rows, tokens, *x.shape[len(lead) + 1 :])
        x = jnp.pad(x, [(0, 0), (0, count * size - tokens)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(-1, count, size, *x.shape[2:]), 1, 0)

    return cut


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(static, hidden, kernel, labels):
    return _forward(static, hidden, kernel, labels)[0]


def _forward(static, hidden, kernel, labels):
    narrow = kernel.astype(hidden.dtype)

    def one(chunk):
        states, label = chunk
        logits = _logits(static, states, narrow)
        lse = jax.nn.logsumexp(logits, axis=-1)
        return lse - _of_label(label, logits), lse

    with jax.named_scope("linear_cross_entropy"):
        losses, lse = lax.map(one, (hidden, labels))
    return losses, (hidden, kernel, labels, lse)


def _backward(static, residuals, slopes):
    hidden, kernel, labels, lse = residuals
    narrow = kernel.astype(hidden.dtype)

    def one(total, chunk):
        states, label, lse, slope = chunk
        logits = _logits(static, states, narrow)
        of_states, of_kernel = _gradients(static, states, narrow, label, logits, lse, slope)
        return total + of_kernel, of_states.astype(states.dtype)

    with jax.named_scope("linear_cross_entropy"):
        empty = varying(jnp.zeros(kernel.shape, lse.dtype), hidden)
        of_kernel, of_hidden = lax.scan(one, empty, (hidden, labels, lse, slopes))
    return of_hidden, of_kernel.astype(kernel.dtype), None


_losses.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(static, hidden, kernel, labels, counted):
    losses = _losses(static, hidden, kernel, labels)
    return jnp.where(counted, losses, 0).sum()


def _total_forward(static, hidden, kernel, labels, counted):
    narrow = kernel.astype(hidden.dtype)
    wide = jnp.promote_types(hidden.dtype, jnp.float32)

    def one(carry, chunk):
        total, of_kernel = carry
        states, label, counts = chunk
        logits = _logits(static, states, narrow)
        lse = jax.nn.logsumexp(logits, axis=-1)
        total += jnp.where(counts, lse - _of_label(label, logits), 0).sum()
        of_states, more = _gradients(static, states, narrow, label, logits, lse, counts)
        return (total, of_kernel + more), of_states

    with jax.named_scope("linear_cross_entropy"):
        empty = (jnp.zeros((), wide), jnp.zeros(kernel.shape, wide))
        empty = jax.tree.map(lambda x: varying(x, hidden), empty)
        (total, of_kernel), of_hidden = lax.scan(one, empty, (hidden, labels, counted))
    # Gradients stay wide until they have their factor, which may lift them out of float16's depths.
    dtypes = jnp.zeros(0, hidden.dtype), jnp.zeros(0, kernel.dtype)
    return total, (of_hidden, of_kernel, dtypes)


def _total_backward(static, residuals, slope):
    del static
    of_hidden, of_kernel, (narrow, own) = residuals
    return (
        (slope * of_hidden).astype(narrow.dtype),
        (slope * of_kernel).astype(own.dtype),
        None,
        None,
    )


_total.defvjp(_total_forward, _total_backward)


def _of_label(label, logits):
    # A sum, not a gather, whose derivative scatters and which a split vocabulary cannot do.
    return jnp.where(_is_label(label, logits), logits, 0).sum(-1)


def _gradients(static, states, kernel, label, logits, lse, slope):
    """Of a chunk's states and of the kernel, float32, from the slopes of its losses."""
    scale, precision = static
    product = functools.partial(
        jnp.einsum, precision=precision, preferred_element_type=logits.dtype
    )
    shares = jnp.exp(logits - lse[..., None]) - _is_label(label, logits).astype(logits.dtype)
    of_logits = (shares * (scale * slope)[..., None]).astype(states.dtype)
    of_states = product("BCW,DW->BCD", of_logits, kernel)
    return of_states, product("BCD,BCW->DW", states, of_logits)


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


def _checked(hidden, kernel, labels, chunk, counted=True) -> int:
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
    if not isinstance(labels, jax.core.Tracer) and not isinstance(counted, jax.core.Tracer):
        known = np.asarray(labels)
        wrong = known[((known < 0) | (known >= words)) & np.asarray(counted)]
        if wrong.size:
            raise ValueError(f"labels has {wrong[0]}: the head has {words} words.")
    return words
