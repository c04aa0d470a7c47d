"""The gated MLP of a dense layer.

Letters: D width of the model, B any leading axes.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float

from mla_jax.ops import dense


class GatedMLP(nnx.Module):
    """down(silu(gate x) * up x), arXiv 2002.05202."""

    def __init__(self, width: int, inner: int, *, precision, **types):
        def linear(inputs, outputs):
            return nnx.Linear(
                inputs, outputs, use_bias=False, precision=precision,
                dot_general=dense.dot_general, **types,
            )  # fmt: skip

        self.gate_proj = linear(width, inner)
        self.up_proj = linear(width, inner)
        self.down_proj = linear(inner, width)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
