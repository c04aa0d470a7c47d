"""Linear maps whose weights stay as a checkpoint stores them, in place of `Projection` and Linear.

They take and give flat channels, so that adapters (`nnx.LoRA`) can be put around them. Their
numbers are no parameters: an optimizer of `nnx.Param` leaves them alone.

Letters: M outputs, K inputs, E experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from mla_jax import sharding
from mla_jax.ops import weights_mesh
from mla_jax.ops.weights import Weight, matmuls, order_for

Letters = tuple[str | None, ...]


class Frozen(nnx.Variable):
    """Numbers that are not trained: quantised weights and their scales.

    >>> import jax.numpy as jnp
    >>> isinstance(Frozen(jnp.zeros(3, jnp.int8)), nnx.Param)
    False
    """


class Kept(nnx.Variable):
    """A part of a parameter as it was, for a model that does not change any more.

    >>> import jax.numpy as jnp
    >>> isinstance(Kept(jnp.zeros(3)), nnx.Param)
    False
    """


def made(make: Callable[[Any], Any], of: Any) -> Any:
    """make(of), or the shapes of that where shapes stand for the arrays of `of`.

    >>> import jax.numpy as jnp
    >>> made(jnp.transpose, jax.ShapeDtypeStruct((2, 3), jnp.int8)).shape
    (3, 2)
    """
    shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(of))
    return jax.eval_shape(make, of) if shapes else make(of)


class Quantised(nnx.Module):
    """A matrix [M K], or one for every expert [E M K], in torch's order, with scales.

    Args:
        weight: values and scales, arrays or `jax.ShapeDtypeStruct`.
        bias: [M], or None.
        dtype: of the computation; None is the input's.
        precision: of the product, as in jax.lax.dot.
        stored: how the file had it, for saving; hashable.
        letters: of the values' axes, by which a mesh may split them; see `letters_of`. Scales are
            split by E alone.

    >>> import jax.numpy as jnp
    >>> weight = Weight(jnp.array([[2, -3]], jnp.int8), jnp.array([[0.5]]), (1, None))
    >>> Quantised(weight)(jnp.array([[1.0, 10.0]]))
    Array([[-14.]], dtype=float32)
    """

    def __init__(
        self,
        weight: Weight,
        *,
        bias=None,
        dtype=None,
        precision=None,
        stored=None,
        letters: Letters | None = None,
    ):
        self.letters = (None,) * len(weight.shape) if letters is None else tuple(letters)
        self.values = Frozen(weight.values, **sharding.metadata(*self.letters))
        self.scale = Frozen(weight.scale, **sharding.metadata(*of_scales(self.letters)))
        self.bias = bias
        self.block, self.dtype, self.precision = weight.block, dtype, precision
        self.stored = stored

    @property
    def weight(self) -> Weight:
        """Values and scales."""
        return Weight(self.values[...], self.scale[...], self.block)

    def order_for(self, dtype, tokens: int = 1) -> int | None:
        """See `ops.weights.order_for`; of shapes as of arrays. None on a mesh."""
        values, scale = self.values.get_value(), self.scale.get_value()
        if sharding.mesh_of(values) is not None:
            return None
        return order_for(Weight(values, scale, self.block), dtype, tokens)

    def __call__(self, x: Float[Array, "*B K"]) -> Float[Array, "*B M"]:
        """The map of one matrix."""
        x = x.astype(self.dtype or x.dtype)
        y = weights_mesh.matmul(x, self.weight, self.letters, precision=self.precision)
        return self.biased(y)

    def biased(self, y: Float[Array, "*B M"]) -> Float[Array, "*B M"]:
        """A product with the bias, where there is one."""
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def maps_of(x: Float[Array, "*B K"], maps: Sequence[nnx.Module]) -> list[Float[Array, "*B _"]]:
    """What each map makes of x, by one kernel where they are `Quantised` and one serves them."""
    kept = [each for each in maps if isinstance(each, Quantised)]
    apart = len(kept) < len(maps) or len({(each.dtype, each.precision) for each in kept}) > 1
    if apart or sharding.mesh_of(x, [each.weight for each in kept]) is not None:
        return [each(x) for each in maps]  # pyrefly: ignore
    x = x.astype(kept[0].dtype or x.dtype)
    made = matmuls(x, [each.weight for each in kept], precision=kept[0].precision)
    return [each.biased(y) for each, y in zip(kept, made, strict=True)]


def letters_of(kernel: nnx.Variable, inputs: int = 1) -> Letters:
    """The letters of values [M K], or [E M K], that stand in the place of a kernel.

    Args:
        kernel: of a linear map, or of experts [E K M].
        inputs: how many of its axes are inputs.

    >>> from mla_jax.layers.projection import Projection
    >>> made = Projection((4, 8), (16,), letters=("N", None, "D"), rngs=nnx.Rngs(0))
    >>> letters_of(made.kernel, 2)
    ('D', 'N')
    """
    own = kernel.get_metadata().get("out_sharding") or (None,) * len(kernel.shape)
    return (own[0], None, None) if own[0] == "E" else (own[inputs], own[0])


def of_scales(letters: Letters) -> Letters:
    """The letters of the scales of values with these."""
    return (*letters[:-2], None, None)
