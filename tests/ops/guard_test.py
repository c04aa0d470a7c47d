"""Gradients of kernels within `jax.shard_map`, typed for a Hopper GPU that need not be there."""

import functools

import jax
import jax.numpy as jnp
import pytest

import mla_jax
from mla_jax.ops.experts import routed_experts

ROWS, SLOTS, EXPERTS = 4, 256, 8
BF16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
INT = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)


def latent(heads, chosen=None):
    """Attention of a step, its arrays, all of them split by rows, and how many have gradients."""

    def call(q, q_rope, latent, k_rope, slots):
        of = {"lengths": slots} if chosen is None else {"lengths": None, "chosen": slots}
        out, _ = mla_jax.latent_attention(
            q, q_rope, latent, k_rope, **of, scale=0.1, implementation="pallas_gpu"
        )
        return out

    shapes = (ROWS, 1, heads, 512), (ROWS, 1, heads, 64), (ROWS, SLOTS, 512), (ROWS, SLOTS, 64)
    slots = INT((ROWS,) if chosen is None else (ROWS, 1, chosen))
    return call, [*map(BF16, shapes), slots], ["x"] * 5, 4


def experts(tokens):
    """Experts whose kernels every device has: their gradients are sums over devices."""

    def call(x, weights, gate, up, down, chosen):
        return routed_experts(x, chosen, weights, gate, up, down, implementation="pallas_gpu")

    kernels = [(EXPERTS, 128, 256)] * 2 + [(EXPERTS, 256, 128)]
    operands = [*map(BF16, [(tokens, 128), (tokens, 2), *kernels]), INT((tokens, 2))]
    return call, operands, ["x", "x", None, None, None, "x"], 5


CALLS = {
    "few_query_rows": latent(16), "many_query_rows": latent(128), "chosen": latent(128, 130),
    "few_tokens": experts(16), "many_tokens": experts(1024),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_gradients_within_shard_map_are_of_their_operands_types(name):
    """Custom partitioning drops from a result's type what it varies over."""
    call, operands, axes, differentiable = CALLS[name]
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((2,), ("x",), axis_types=kinds, abstract_device=device)
    specs = tuple(map(jax.P, axes))
    local = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=jax.P("x"))
    total = lambda *operands: local(*operands).astype(jnp.float32).sum()  # noqa: E731
    gradients = jax.grad(total, argnums=tuple(range(differentiable)))
    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.make_jaxpr(gradients)(*operands)
    assert [x.shape for x in program.out_avals] == [x.shape for x in operands[:differentiable]]
    assert str(program).count("psum") == axes.count(None)
