"""The root-mean-square norm, in the order in which XLA makes one GPU kernel of it.

Letters: D channels.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, "D"], epsilon: float
) -> Float[Array, "*B D"]:
    """The norm x / rms(x) * scale (arXiv 1910.07467), computed in float32, in x's dtype.

    XLA for GPUs fuses a reduction with what follows only where its result meets x before it meets
    anything else of x's size.

    >>> rms_norm(jnp.array([[2.0, -2.0, 2.0, 2.0]]), jnp.ones(4), 0.0)
    Array([[ 1., -1.,  1.,  1.]], dtype=float32)
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.square(wide).mean(-1, keepdims=True)
    normal = wide * lax.rsqrt(mean + epsilon)
    scale = lax.expand_dims(scale.astype(wide.dtype), range(x.ndim - 1))
    return (normal * scale).astype(x.dtype)
