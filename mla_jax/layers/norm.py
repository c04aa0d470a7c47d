"""The norm of a transformer's layers, in the order in which XLA makes one GPU kernel of it.

Letters: D channels.
"""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float


class RMSNorm(nnx.RMSNorm):
    """x / rms(x) * scale (arXiv 1910.07467), computed in float32; arguments as in `nnx.RMSNorm`.

    Flax multiplies 1 / rms by the scale first. XLA for GPUs fuses a reduction with what follows
    only where its result meets x before it meets anything else of x's size.

    >>> norm = RMSNorm(4, epsilon=0.0, rngs=nnx.Rngs(0))
    >>> norm(jnp.array([[2.0, -2.0, 2.0, 2.0]]))
    Array([[ 1., -1.,  1.,  1.]], dtype=float32)
    """

    def __call__(self, x: Float[Array, "*B D"], mask=None) -> Float[Array, "*B D"]:
        """The norm over the last axis; `mask` is not taken."""
        if mask is not None:
            raise ValueError("mask: this norm is over all channels, it must be None.")
        assert self.scale is not None
        x, scale = self.promote_dtype((x, self.scale[...]), dtype=self.dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = jnp.square(wide).mean(-1, keepdims=True)
        normal = wide * lax.rsqrt(mean + self.epsilon)
        scale = lax.expand_dims(scale.astype(wide.dtype), range(x.ndim - 1))
        return (normal * scale).astype(x.dtype)
