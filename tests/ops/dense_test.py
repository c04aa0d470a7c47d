"""The product of a single row, which is repeated on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import slow
from flax import nnx

from mla_jax import sharding, target
from mla_jax.ops import dense


@pytest.mark.parametrize(
    ("rows", "platform"),
    [
        *(((1,), each) for each in ("cpu", "gpu")),
        *(((), "gpu"), ((1, 1), "gpu"), ((2, 1), "gpu"), ((1, 3), "gpu")),
        *(slow(rows, "cpu") for rows in ((), (1, 1), (2, 1), (1, 3))),
    ],
)
def test_it_is_the_product(rows, platform, monkeypatch):
    monkeypatch.setattr(target, "current", lambda: target.Target(platform, "any"))
    layers = [
        nnx.LinearGeneral((4, 6), (3, 5), axis=(-2, -1), dot_general=f, rngs=nnx.Rngs(0))
        for f in (dense.dot_general, None)
    ]
    x = jax.random.normal(jax.random.key(1), (*rows, 4, 6))
    loss = lambda layer, x: jnp.sin(layer(x)).sum()  # noqa: E731
    got, want = (jax.jit(nnx.value_and_grad(loss, argnums=(0, 1)))(layer, x) for layer in layers)
    assert layers[0](x).shape == (*rows, 3, 5)
    # float32 sums of 24 in two orders
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "platform", "repeated"), [
    ((1, 1), "gpu", True), ((1,), "gpu", True), ((1, 1), "cpu", False), ((2, 1), "gpu", False),
    ((), "gpu", False),
])  # fmt: skip
def test_only_a_lone_row_on_a_gpu_is_repeated(rows, platform, repeated, monkeypatch):
    monkeypatch.setattr(target, "current", lambda: target.Target(platform, "any"))
    layer = nnx.Linear(6, 5, dot_general=dense.dot_general, rngs=nnx.Rngs(0))
    made = str(jax.make_jaxpr(layer)(jnp.ones((*rows, 6))))
    assert ("broadcast_in_dim[" in made) == repeated


def test_a_row_of_each_device_is_repeated_under_jit(monkeypatch):
    monkeypatch.setattr(target, "current", lambda: target.Target("gpu", "any"))
    layer = nnx.Linear(6, 5, rngs=nnx.Rngs(0), use_bias=False, **dense.linear("D", "F"))
    x = jax.random.normal(jax.random.key(1), (2, 1, 6))
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        rules = sharding.Rules(B="x")
        there = jax.device_put(layer, rules.of(layer))
        rows = jax.device_put(x, rules.sharding("BTD", x.shape, mesh))
        run = jax.jit(lambda layer, x: layer(x))
        got = run(there, rows)
        made = str(jax.make_jaxpr(run)(there, rows))
    assert "broadcast_in_dim[" in made
    # float32 sums of 6 in two orders
    np.testing.assert_allclose(got, x @ layer.kernel[...], rtol=1e-5, atol=1e-5)
