"""Products with weights as a checkpoint stores them on a mesh: every device with its own part.

Activations move to where the values lie, as in `ops.dense.Product`. A block of scales may straddle
two devices: so each has the scales of all of a matrix, a small part of its bytes, and cuts out its
own.

Letters: M outputs, K inputs (torch's [out, in]), N heads, R latent, H and V channels of a head.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mla_jax import sharding
from mla_jax.ops import weights
from mla_jax.ops.weights import Weight
from mla_jax.sharding import Axes


def matmul(
    x: Float[Array, "*B K"], weight: Weight, letters: Sequence[str | None], *, precision=None
) -> Float[Array, "*B M"]:
    """`ops.weights.matmul`, on a mesh too.

    Args:
        x: activations.
        weight: a matrix; a mesh may split its values, and has the scales whole everywhere.
        letters: of M and K. The values are gathered over axes of D that the batch is split over.
        precision: as in `jax.lax.dot`.

    Raises:
        NotImplementedError: inputs that are split elsewhere than between blocks of scales.
    """
    product = functools.partial(weights.matmul, precision=precision)
    if sharding.mesh_of(weight.values) is None:
        return product(x, weight)
    *lead, _ = sharding.spec(x)
    batch = tuple(axis for entry in lead for axis in entry)
    rows, columns = (
        sharding.without(own, batch) if letter == "D" else own
        for own, letter in zip(sharding.spec(weight.values), letters, strict=True)
    )
    lead = [sharding.without(entry, rows + columns) for entry in lead]
    return _each(product, x, weight, (*lead, columns), (rows, columns), (*lead, rows))


def fold_keys(
    query: Float[Array, "B T N H"], weight: Weight, *, precision=None
) -> Float[Array, "B T N R"]:
    """`ops.weights.fold_keys`, on a mesh too, whose devices may share out heads."""
    return _of_heads(functools.partial(weights.fold_keys, precision=precision), query, weight)


def unfold_values(
    mixed: Float[Array, "B T N R"], weight: Weight, value_dim: int, *, precision=None
) -> Float[Array, "B T N V"]:
    """`ops.weights.unfold_values`, on a mesh too, whose devices may share out heads."""
    unfold = functools.partial(weights.unfold_values, value_dim=value_dim, precision=precision)
    return _of_heads(unfold, mixed, weight)


def _of_heads(f, x, weight):
    if sharding.mesh_of(weight.values) is None:
        return f(x, weight)
    heads = sharding.spec(weight.values)[0]
    lead = [sharding.without(entry, heads) for entry in sharding.spec(x)[:2]]
    place = (*lead, heads, ())
    return _each(f, x, weight, place, (heads, ()), place)


def _each(
    f: Callable,
    x: Any,
    weight: Weight,
    x_at: Sequence[Axes],
    at: tuple[Axes, Axes],
    y_at: Sequence[Axes],
) -> Any:
    """`f(x, weight)` of every device's parts, summed over the axes of K."""
    mesh, whole = sharding.mesh_of(weight.values), weight.shape
    every = tuple({axis: None for entry in (*x_at, *at) for axis in entry})

    def own(x, values, scale):
        x, values, scale = sharding.varying((x, values, scale), every)
        y = f(x, _part(values, scale, weight.block, whole, at))
        return lax.psum(y, at[1]) if at[1] else y

    specs = sharding.pspec(*x_at), sharding.pspec(*at), sharding.pspec()
    island = sharding.island(own, mesh, specs, sharding.pspec(*y_at))
    # Numbers that are not trained: nothing is summed over devices for them.
    values, scale = lax.stop_gradient((weight.values, weight.scale))
    values, scale = sharding.move(values, *at), sharding.move(scale, mesh=mesh)
    return island(sharding.move(x, *x_at, mesh=mesh), values, scale)


def _part(values, scale, block, whole, at) -> Weight:
    """A device's own values with their scales."""
    block = list(block)
    for axis, axes in enumerate(at):
        own, step = values.shape[axis], block[axis]
        if not axes or not step or scale.shape[axis] == 1:
            continue
        count = own // step
        if own % step:
            if axis == 1:
                raise NotImplementedError(
                    f"{step} inputs of a weight as stored share a scale, but the mesh axes {axes} "
                    f"split its {whole[1]} inputs into parts of {own}. Load the model with "
                    "weights=None, or do not split this letter."
                )
            scale = jnp.repeat(scale, step, axis=0)[: whole[0]]
            count, block[0] = own, 1
        scale = lax.dynamic_slice_in_dim(scale, lax.axis_index(axes) * count, count, axis)
    return Weight(values, scale, (block[0], block[1]))
