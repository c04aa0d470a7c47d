"""The order in which kernels that widen 8-bit weights read activations: see `widen.py`.

Where XLA brings activations into this order, that is a kernel. It is none where what makes them
makes them so: products with weights whose outputs stand in this order, and sums of products whose
inputs do. Such an array goes on as its `restored` numbers, of which the next `in_order` leaves
nothing: XLA cancels the two.

Letters: K channels.
"""

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def in_order(x: Shaped[Array, "*B K"], row: int) -> Shaped[Array, "*B K"]:
    """Channels in the order of `widened`, for rows of 128 or 64 bytes; K is a multiple of `row`.

    >>> in_order(jnp.arange(64), 64)[:12].tolist()
    [0, 1, 16, 17, 32, 33, 48, 49, 2, 3, 18, 19]
    """
    x_ = x.reshape(*x.shape[:-1], x.shape[-1] // row, 4, row // 16, 2, 2)
    return jnp.moveaxis(x_, -4, -2).reshape(x.shape)


def restored(x: Shaped[Array, "*B K"], row: int) -> Shaped[Array, "*B K"]:
    """The inverse of `in_order`.

    >>> restored(in_order(jnp.arange(128), 64), 64).tolist() == list(range(128))
    True
    """
    x_ = x.reshape(*x.shape[:-1], x.shape[-1] // row, row // 16, 2, 4, 2)
    return jnp.moveaxis(x_, -2, -4).reshape(x.shape)
