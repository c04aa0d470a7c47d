"""What queries are multiplied by at their positions.

Letters: B batch, T tokens, N heads.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def llama_4(positions: Int[Array, "*B T"], beta: float, original: int) -> Float[Array, "#B T 1 1"]:
    """1 + beta ln(1 + floor(position / original)), float32 (Mistral 4).

    >>> llama_4(jnp.array([0, 7]), beta=1.0, original=7).ravel()
    Array([1.       , 1.6931472], dtype=float32)
    """
    turns = _by_head(positions) // original
    return 1 + beta * jnp.log1p(turns.astype(jnp.float32))


def ssmax(
    positions: Int[Array, "*B T"], slope: Float[Array, "N"], offset: Float[Array, "N"]
) -> Float[Array, "#B T N 1"]:
    """Slope ln(position + 1) + offset of every head, float32 (SSMax, arXiv 2501.19399).

    >>> ssmax(jnp.array([0, 1]), jnp.ones(1), jnp.ones(1)).ravel()
    Array([1.       , 1.6931472], dtype=float32)
    """
    slope, offset = (each.astype(jnp.float32)[None, None, :, None] for each in (slope, offset))
    return slope * jnp.log1p(_by_head(positions).astype(jnp.float32)) + offset


def _by_head(positions):
    return positions.reshape((-1, positions.shape[-1]))[..., None, None]
