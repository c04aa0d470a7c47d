"""Products of activations with a layer's kernel, and where they run on a mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from mla_jax import sharding, target

_ROWS = 8  # that XLA multiplies as matrices


def copies(x: Float[Array, "B T D"]) -> int:
    """How many equal rows a single token is best carried in through the layers of a model.

    On a GPU XLA makes fewer and faster kernels of 8 rows than of one: see `dot_general`. It makes
    one kernel of a norm, where that of a single row is two.
    """
    single = x.shape[:-1] == (1, 1) and sharding.mesh_of(x) is None
    return _ROWS if single and target.current().platform == "gpu" else 1


def copied(x: Shaped[Array, "B *D"], count: int) -> Shaped[Array, "C *D"]:
    """A single row as `count` equal ones."""
    return x if count == 1 else jnp.broadcast_to(x, (count, *x.shape[1:]))


def dot_general(x, kernel, dimension_numbers, precision=None, **options):
    """`lax.dot_general`, in place of it in nnx.Linear and nnx.LinearGeneral.

    On a GPU XLA turns the product of one row with a kernel into as many products as the kernel has
    elements, rounded and stored, and their sum: three times the kernel's bytes, and less exact. So
    there a single row (one token of one sequence, of those on a device) is multiplied as 8 equal
    ones. Zeros in their place would be a kernel more.
    """
    (contracted, _), (batched, _) = dimension_numbers
    free = [axis for axis in range(x.ndim) if axis not in contracted]
    mesh, split = sharding.mesh_of(x), sharding.spec(x)
    rows = [x.shape[axis] // sharding.count(mesh, split[axis]) for axis in free]
    whole = [axis for axis in free if not split[axis]]  # on a mesh only these can be padded
    alone = not batched and bool(whole) and all(size == 1 for size in rows)
    alone = alone and target.current().platform == "gpu"
    if alone:
        shape = [_ROWS if axis == whole[0] else size for axis, size in enumerate(x.shape)]
        own = jax.typeof(x).sharding if mesh is not None else None
        x = jnp.broadcast_to(x, shape, out_sharding=own)
    out = lax.dot_general(x, kernel, dimension_numbers, precision=precision, **options)
    return lax.slice_in_dim(out, 0, 1, axis=free.index(whole[0])) if alone else out


@dataclasses.dataclass(frozen=True)
class Product:
    """A `dot_general` for a kernel with these letters: the one rule of all linear maps on a mesh.

    Activations move to where the kernel lies, and what they are summed over stays split. Of the
    kernel only the axes of D move (FSDP): it is gathered over those that the batch is split over.

    Attributes:
        letters: of the kernel's dimensions.
        plain: leaves out the padding of `dot_general`.
    """

    letters: tuple[str | None, ...]
    plain: bool = False

    def __call__(self, x, kernel, dimension_numbers, precision=None, **options):
        """See `dot_general`."""
        (contracted, summed), (batched, _) = dimension_numbers
        if sharding.mesh_of(x, kernel) is not None and not batched:
            x, kernel, own = self._placed(x, kernel, contracted, summed)
            options = options | {"out_sharding": own}
        product = lax.dot_general if self.plain else dot_general
        return product(x, kernel, dimension_numbers, precision=precision, **options)

    def _placed(self, x, kernel, contracted, summed):
        x_at, k_at = list(sharding.spec(x)), list(sharding.spec(kernel))
        free_x = [axis for axis in range(x.ndim) if axis not in contracted]
        free_k = [axis for axis in range(kernel.ndim) if axis not in summed]
        batch = tuple(axis for n in free_x for axis in x_at[n])
        for n, letter in enumerate(self.letters):
            if letter == "D":
                k_at[n] = sharding.without(k_at[n], batch)
        held = tuple(axis for entry in k_at for axis in entry)
        for n in free_x:
            x_at[n] = sharding.without(x_at[n], held)
        for mine, theirs in zip(contracted, summed, strict=True):
            x_at[mine] = k_at[theirs]
        out = sharding.pspec(*(x_at[n] for n in free_x), *(k_at[n] for n in free_k))
        return sharding.move(x, *x_at), sharding.move(kernel, *k_at), out


def linear(*letters: str | None, plain: bool = False) -> dict[str, Any]:
    """What nnx.Linear and its like are given so that they run on a mesh: see `Product`.

    >>> sorted(linear("D", "F"))
    ['dot_general', 'kernel_metadata']
    """
    return {
        "dot_general": Product(letters, plain),
        "kernel_metadata": sharding.metadata(*letters),
    }
