"""The gated MLP of a dense layer.

Letters: D width of the model, B any leading axes.
"""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from mla_jax import sharding
from mla_jax.layers.quantised import Quantised
from mla_jax.ops import dense
from mla_jax.ops.experts import gated_mlp


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
        kernels = self.kernels()
        if kernels is not None and self.down_proj.dtype in (None, x.dtype):
            y = gated_mlp(x, kernels)
            if y is not None:
                return y
        y = self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))
        return sharding.beside(y, x)

    def kernels(self) -> list[Any] | None:
        """Gate, up and down as experts have them, [1 D F], or as a checkpoint stores them.

        None where one is another module, such as `nnx.LoRA`, or has a bias.
        """
        linears: list[Any] = [self.gate_proj, self.up_proj, self.down_proj]
        if any(getattr(linear, "bias", None) is not None for linear in linears):
            return None
        if all(type(linear) is Quantised for linear in linears):
            return [linear.weight.stacked() for linear in linears]
        if all(type(linear) is nnx.Linear for linear in linears):
            return [linear.kernel[...][None] for linear in linears]
        return None
