"""The gated MLP of a dense layer.

Letters: D width of the model, B any leading axes.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float

from mla_jax import sharding
from mla_jax.ops import dense


class GatedMLP(nnx.Module):
    """down(silu(gate x) * up x), arXiv 2002.05202."""

    def __init__(self, width: int, inner: int, *, precision, **types):
        def linear(inputs, outputs, letters):
            return nnx.Linear(
                inputs, outputs, use_bias=False, precision=precision, **dense.linear(*letters),
                **types,
            )  # fmt: skip

        self.gate_proj = linear(width, inner, "DF")
        self.up_proj = linear(width, inner, "DF")
        self.down_proj = linear(inner, width, "FD")

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
        return sharding.beside(y, x)
