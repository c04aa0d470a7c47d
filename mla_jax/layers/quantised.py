"""Linear maps whose weights stay as a checkpoint stores them, in place of `Projection` and Linear.

They take and give flat channels, so that adapters (`nnx.LoRA`) can be put around them. Their
numbers are no parameters: an optimizer of `nnx.Param` leaves them alone.

Letters: M outputs, K inputs, E experts.
"""

from flax import nnx
from jaxtyping import Array, Float

from mla_jax import sharding
from mla_jax.ops.weights import Weight, matmul


class Frozen(nnx.Variable):
    """Numbers that are not trained: quantised weights and their scales.

    >>> import jax.numpy as jnp
    >>> isinstance(Frozen(jnp.zeros(3, jnp.int8)), nnx.Param)
    False
    """


class Quantised(nnx.Module):
    """A matrix [M K], or one for every expert [E M K], in torch's order, with scales.

    Args:
        weight: values and scales, arrays or `jax.ShapeDtypeStruct`.
        bias: [M], or None.
        dtype: of the computation; None is the input's.
        precision: of the product, as in jax.lax.dot.
        stored: how the file had it, for saving; hashable.

    >>> import jax.numpy as jnp
    >>> weight = Weight(jnp.array([[2, -3]], jnp.int8), jnp.array([[0.5]]), (1, None))
    >>> Quantised(weight)(jnp.array([[1.0, 10.0]]))
    Array([[-14.]], dtype=float32)
    """

    def __init__(self, weight: Weight, *, bias=None, dtype=None, precision=None, stored=None):
        self.values, self.scale = Frozen(weight.values), Frozen(weight.scale)
        self.bias = bias
        self.block, self.dtype, self.precision = weight.block, dtype, precision
        self.stored = stored

    @property
    def weight(self) -> Weight:
        """Values and scales.

        Raises:
            NotImplementedError: they lie on a mesh with Explicit axes.
        """
        if sharding.mesh_of(self.values[...]) is not None:
            raise NotImplementedError(
                "weights as a checkpoint stores them do not run on a mesh with Explicit axes yet: "
                "load them dequantised there."
            )
        return Weight(self.values[...], self.scale[...], self.block)

    def __call__(self, x: Float[Array, "*B K"]) -> Float[Array, "*B M"]:
        """The map of one matrix."""
        y = matmul(x.astype(self.dtype or x.dtype), self.weight, precision=self.precision)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)
