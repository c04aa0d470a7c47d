"""Products with small numbers and scales, against float64; and what the compiler makes of them."""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experts_oracle import loop

from mla_jax import target
from mla_jax.ops import weights as ops_weights
from mla_jax.ops.experts import routed_experts
from mla_jax.ops.weights import Weight, fold_keys, matmul, unfold_values

BLOCKS = {
    "blocks": (128, 128), "rows": (1, None), "one": (None, None), "odd": (80, 65), "groups": (1, 32)
}  # fmt: skip
KINDS = {"fp8": jnp.float8_e4m3fn, "int8": jnp.int8, "int4": jnp.int4}
OUT, IN = 288, 320  # a part of a block each


def make(rng, block, kind="int8", shape=(OUT, IN)):
    values = jnp.asarray(rng.integers(-7, 8, shape), jnp.int8).astype(KINDS[kind])
    grid = [-(-size // (step or size)) for size, step in zip(shape[-2:], block, strict=True)]
    scale = jnp.asarray(rng.uniform(0.1, 0.2, (*shape[:-2], *grid)), jnp.float32)
    return Weight(values, scale, block)


def exact(weight):
    """Float64, block by block."""
    values, scale = np.asarray(weight.values, np.float64), np.asarray(weight.scale, np.float64)
    rows, columns = (b or s for b, s in zip(weight.block, values.shape[-2:], strict=True))
    out = np.zeros(values.shape)
    for i, j in np.ndindex(scale.shape[-2:]):
        part = (..., slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
        out[part] = values[part] * scale[..., i : i + 1, j : j + 1]
    return out


def as_gpu():
    """What XLA is given on a GPU, run here."""
    device = target.Target("gpu", "NVIDIA H200", 9.0)
    return mock.patch.object(target, "current", return_value=device)


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("block", BLOCKS)
def test_products_are_those_of_the_dequantised_numbers(block, tokens, rng):
    weight = make(rng, BLOCKS[block], {1: "int8", 3: "fp8", 17: "int4"}[tokens])
    x = rng.standard_normal((tokens, IN)).astype(np.float32)
    expected = x.astype(np.float64) @ exact(weight).T

    @jax.jit
    def run(x, weight):
        with mock.patch.object(ops_weights, "_TILE", 2**14):  # several tiles and a rest
            here = matmul(x, weight, precision="highest")
        with as_gpu():
            return weight.dense(jnp.float32), here, matmul(x, weight, precision="highest")

    dense, *products = run(x, weight)
    np.testing.assert_array_equal(dense, exact(weight).astype(np.float32))
    # Sums of IN products in float32, each of at most 7 x 0.2 x the largest input.
    atol = IN * 2.0**-24 * 1.4 * np.abs(x).max()
    for found in products:
        np.testing.assert_allclose(found, expected, atol=atol, rtol=0)


def test_leading_axes_dtypes_and_derivatives(rng):
    weight = make(rng, BLOCKS["blocks"])
    x = jnp.asarray(rng.standard_normal((2, 3, IN)), jnp.bfloat16)
    y = matmul(x, weight)
    assert (y.shape, y.dtype) == ((2, 3, OUT), jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ exact(weight).T
    assert np.linalg.norm(y - expected) < 2.0**-8 * np.linalg.norm(expected)
    x = x[0].astype(jnp.float32)
    gradient = jax.grad(lambda x: matmul(x, weight, precision="highest").sum())(x)
    expected = np.broadcast_to(exact(weight).sum(0), (3, IN))
    np.testing.assert_allclose(gradient, expected, atol=OUT * 2.0**-24 * 1.4)


@pytest.mark.parametrize("block", [(16, 16), (1, None), (20, 12), (None, 8), (4, 8)], ids=str)
@pytest.mark.parametrize("nope", [20, 16])
def test_folds_of_the_heads(nope, block, rng):
    """Blocks over the borders of heads; with 16, blocks of 16 that a head's keys share."""
    heads, value, rank = 3, 32 - nope, 32
    weight = make(rng, block, shape=(heads * 32, rank))
    kernel = exact(weight).reshape(heads, 32, rank)
    query = rng.standard_normal((2, 3, heads, nope)).astype(np.float32)
    keys = np.einsum("BTNH,NHR->BTNR", query, kernel[:, :nope])
    mixed = rng.standard_normal((2, 3, heads, rank)).astype(np.float32)
    values = np.einsum("BTNR,NVR->BTNV", mixed, kernel[:, nope:])

    @jax.jit
    def run(query, mixed, weight):
        found = []
        for place in (contextlib.nullcontext, as_gpu):
            with place():
                found.append(fold_keys(query, weight, precision="highest"))
                found.append(unfold_values(mixed, weight, value, precision="highest"))
        return found

    for found, wanted in zip(run(query, mixed, weight), [keys, values] * 2, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("tokens", [3, 40])
def test_experts(tokens, rng):
    count, width, inner, chosen = 4, 32, 24, 2
    shapes = [(count, inner, width), (count, inner, width), (count, width, inner)]
    kernels = [make(rng, (16, 16), "fp8", shape) for shape in shapes]
    x = rng.standard_normal((tokens, width)).astype(np.float32) * 0.1
    experts = np.stack([rng.permutation(count)[:chosen] for _ in range(tokens)])
    experts[experts == 1] = 3  # one has no token
    experts[:, 1] = np.where(experts[:, 1] == experts[:, 0], 0, experts[:, 1])
    shares = rng.uniform(0.1, 1, (tokens, chosen)).astype(np.float32)
    found = jax.jit(lambda *a: routed_experts(*a, precision="highest"))(
        jnp.asarray(x), jnp.asarray(experts), jnp.asarray(shares), *kernels
    )
    dense = [exact(kernel).swapaxes(-1, -2) for kernel in kernels]
    expected = loop(experts, x, shares, *dense)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        routed_experts(jnp.asarray(x), jnp.asarray(experts), jnp.asarray(shares), *kernels,
                       implementation="pallas_gpu")  # fmt: skip
    with pytest.raises(ValueError, match="all three must be a Weight"):
        routed_experts(jnp.asarray(x), jnp.asarray(experts), jnp.asarray(shares), kernels[0],
                       *(jnp.asarray(kernel, jnp.float32) for kernel in dense[1:]))  # fmt: skip


@pytest.mark.parametrize("block", ["blocks", "rows"])
def test_the_program_holds_no_copy_of_the_weights(block):
    outputs, width = 4096, 4096
    grid = [-(-size // (step or size)) for size, step in
            zip((outputs, width), BLOCKS[block], strict=True)]  # fmt: skip
    of = jax.ShapeDtypeStruct
    weight = Weight(of((outputs, width), jnp.float8_e4m3fn), of(grid, jnp.float32), BLOCKS[block])
    x = of((8, width), jnp.bfloat16)
    compiled = jax.jit(matmul).lower(x, weight).compile()
    text = compiled.as_text()
    for kind in ("bf16", "f32", "f16"):
        assert f"{kind}[{outputs},{width}]" not in text
    # The bits of all values, and a tile of 2^22 numbers in bfloat16 or, on a CPU, in float32.
    assert compiled.memory_analysis().temp_size_in_bytes < outputs * width + 2**22 * 8
