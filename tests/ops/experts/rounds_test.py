"""A device's own experts for the pairs of many, in rounds, against a float64 loop."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import relative
from experts_oracle import gradients, loop, problem

from mla_jax.ops.experts import mesh, xla
from mla_jax.target import Target

OWN = 4  # of 12 experts


def run(x, experts, weights, *kernels):
    return xla.all_experts(x, experts, weights, kernels, precision="highest", partial=True)


@pytest.mark.parametrize(("every", "following"), [(False, 3), (True, 3), (False, 2), (True, 2)])
def test_rounds_and_their_gradients_are_float64s(every, following):
    """Rounds of 8, 24, 24 and 16 pairs, or of 8 and then some in a loop.

    All are needed where the device has the experts of `every` pair.
    """
    arrays, experts = problem(24, count=12, chosen=3, widths=(24, 9))
    x, weights, *kernels = arrays
    experts = np.asarray(experts) % (OWN if every else 12)
    mine = jnp.asarray(np.where(experts < OWN, experts, OWN))
    cotangent = np.cos(np.arange(x.size)).reshape(x.shape)

    def local(x, weights, *kernels):
        own = tuple(kernel[:OWN] for kernel in kernels)
        return mesh._local(run, own, x, mine, weights, parts=24)

    def both(*arrays):
        y, back = jax.vjp(local, *arrays)
        return y, back(jnp.asarray(cotangent, jnp.float32))

    platform = mock.patch.object(mesh.target, "current", return_value=Target("gpu", "a GPU", 9.0))
    sizes = mock.patch.multiple(mesh, _LEAST=8, _MORE=24, _FOLLOWING=following)
    with sizes, platform:
        # Without it XLA for GPUs makes the zeros of all layers, to which they add, at the start.
        assert "optimization_barrier" in str(jax.make_jaxpr(local)(*arrays))
        y, found = jax.jit(both)(*arrays)
    others = experts >= OWN
    right = (x, np.where(others, 0, weights), *kernels)
    assert relative(y, loop(experts, *right)) < 2e-6
    wanted = list(gradients(experts, cotangent, *right))
    wanted[1] = np.where(others, 0, wanted[1])
    for name, own, known in zip(("x", "weights", "gate", "up", "down"), found, wanted, strict=True):
        assert relative(own, known) < 3e-6, name
