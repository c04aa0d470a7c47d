"""The norm of a transformer's layers.

Letters: D channels.
"""

from flax import nnx
from jaxtyping import Array, Float

from mla_jax.ops.norm import rms_norm


class RMSNorm(nnx.RMSNorm):
    """`ops.norm.rms_norm` with the arguments of `nnx.RMSNorm`, which multiplies in another order.

    >>> import jax.numpy as jnp
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
        return rms_norm(x, scale, self.epsilon)
