"""The linear maps of an attention layer, which may be wrapped as any `nnx.Linear` may.

Letters: R input channels, N heads, K channels of a head, C channels of all heads.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mla_jax.layers.quantised import Quantised
from mla_jax.ops import dense


class Projection(nnx.LinearGeneral):
    """A linear map whose kernel keeps its axes apart, [R N K] or [N K D], between flat channels.

    Activations go in and come out with one axis of channels, of all heads one after the other, as
    with `nnx.Linear`: so `nnx.LoRA` and other adapters can be put around it.

    Args:
        inputs, outputs: sizes of the kernel's axes, first those that are summed over.
        letters: of the kernel's axes, by which a mesh may split them; None is by none.
        types: as in `nnx.LinearGeneral`.

    >>> projection = Projection((16,), (4, 8), use_bias=False, rngs=nnx.Rngs(0))
    >>> projection.kernel.shape, projection(jnp.ones((2, 5, 16))).shape
    ((16, 4, 8), (2, 5, 32))
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        letters: Sequence[str | None] | None = None,
        **types,
    ):
        axes = tuple(range(-len(inputs), 0))
        own = (None,) * len(inputs + outputs) if letters is None else tuple(letters)
        super().__init__(inputs, outputs, axis=axes, **dense.linear(*own), **types)

    def __call__(self, inputs: Float[Array, "*B R"], out_sharding=None) -> Float[Array, "*B C"]:
        lead = inputs.shape[:-1]
        apart = inputs.reshape(*lead, *self.in_features)
        return super().__call__(apart, out_sharding=out_sharding).reshape(*lead, -1)


def kernel_of(projection: nnx.Module, inputs: int, outputs: tuple[int, ...]) -> Array:
    """The kernel [R N K] that a projection, wrapped or not, multiplies with.

    Args:
        projection: a `Projection` or a `Quantised`, an `nnx.LoRA` around one, or another module
            that maps linearly.
        inputs: R.
        outputs: N and K.

    >>> base = Projection((16,), (4, 8), use_bias=False, rngs=nnx.Rngs(0))
    >>> wrapped = nnx.LoRA(16, 2, 32, base_module=base, rngs=nnx.Rngs(1))
    >>> kernel_of(wrapped, 16, (4, 8)).shape
    (16, 4, 8)
    """
    if isinstance(projection, nnx.LinearGeneral | nnx.Linear):
        return projection.kernel[...]
    if isinstance(projection, Quantised):
        return projection.weight.dense(projection.dtype or jnp.float32).T.reshape(inputs, *outputs)
    if isinstance(projection, nnx.LoRA) and isinstance(projection.base_module, nnx.Module):
        base = kernel_of(projection.base_module, inputs, outputs)
        update = projection.lora_a[...] @ projection.lora_b[...]
        return base + update.reshape(base.shape).astype(base.dtype)
    if not callable(projection):
        raise ValueError(f"{type(projection).__name__} in place of a projection must be callable.")
    # What it does to every input channel alone.
    return projection(jnp.eye(inputs)).reshape(inputs, *outputs)


def apart(x: Float[Array, "*B C"], heads: int) -> Float[Array, "*B {heads} K"]:
    """Flat channels of all heads as channels of each head."""
    return x.reshape(*x.shape[:-1], heads, -1)


def together(x: Float[Array, "*B N K"]) -> Float[Array, "*B N*K"]:
    """Channels of each head as flat channels."""
    return x.reshape(*x.shape[:-2], math.prod(x.shape[-2:]))
