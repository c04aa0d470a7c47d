"""Products of activations with a layer's kernel."""

import jax.numpy as jnp
from jax import lax

from mla_jax import target

_ROWS = 8  # that XLA multiplies as matrices


def dot_general(x, kernel, dimension_numbers, precision=None, **options):
    """`lax.dot_general`, in place of it in nnx.Linear and nnx.LinearGeneral.

    On a GPU XLA turns the product of one row with a kernel into as many products as the kernel has
    elements, rounded and stored, and their sum: three times the kernel's bytes, and less exact. So
    there a single row (one token of one sequence) is padded with zero rows.
    """
    (contracted, _), (batched, _) = dimension_numbers
    free = [axis for axis in range(x.ndim) if axis not in contracted]
    alone = not batched and bool(free) and all(x.shape[axis] == 1 for axis in free)
    alone = alone and target.current().platform == "gpu"
    if alone:
        padding = [(0, _ROWS - 1) if axis == free[0] else (0, 0) for axis in range(x.ndim)]
        x = jnp.pad(x, padding)
    out = lax.dot_general(x, kernel, dimension_numbers, precision=precision, **options)
    return out[:1] if alone else out
