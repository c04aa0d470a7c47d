"""The grouped matmul of experts on Hopper, interpreted, and the layer on top of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import relative
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.layers.experts import MixtureOfExperts
from mla_jax.models import Decoder, DecoderConfig, random_decoder
from mla_jax.ops.hopper import grouped

INTERPRET = plgpu.InterpretGPUParams()


@pytest.mark.parametrize("rows", [grouped.FEW, grouped.MANY])
def test_tiles_times_their_experts(rows, rng):
    x = jnp.asarray(rng.standard_normal((3 * rows, 128)), jnp.bfloat16)
    kernels = jnp.asarray(rng.standard_normal((4, 128, 256)), jnp.bfloat16)
    owner, used = jnp.array([2, 0, 3], jnp.int32), jnp.array([2], jnp.int32)
    y = grouped.grouped_matmul(x, kernels, owner, used, rows=rows, sms=2, interpret=INTERPRET)
    tiles = np.asarray(x, np.float64).reshape(3, rows, -1)
    expected = [tiles[j] @ np.asarray(kernels[owner[j]], np.float64) for j in range(2)]
    assert relative(y[: 2 * rows], np.concatenate(expected)) < 2.5e-3  # bfloat16's rounding


@pytest.mark.parametrize("tokens", [1, 70, 400])
def test_experts_through_it(tokens):
    config = DecoderConfig.from_preset("tiny").replace(
        moe_intermediate_size=128, n_routed_experts=8, num_experts_per_tok=3
    )
    types = {"precision": None, "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    mlp = MixtureOfExperts(config, **types, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (tokens, 128), jnp.bfloat16)
    experts, weights = mlp.router(x)
    ours = lambda x: mlp._grouped(x, experts, weights, sms=2, interpret=INTERPRET)  # noqa: E731
    plain = lambda x: mlp._by_pair(x, experts, weights)  # noqa: E731
    # The interpreter's callbacks run operations of their own: nothing else may be dispatched then.
    assert relative(jax.block_until_ready(ours(x)), plain(x)) < 1e-2
    total = lambda f: jax.grad(lambda x: f(x).astype(jnp.float32).sum())(x)  # noqa: E731
    assert relative(jax.block_until_ready(total(ours)), total(plain)) < 2e-2


def test_why_not():
    class Hopper:
        platform, device_kind, compute_capability = "gpu", "NVIDIA H200", "9.0"

    assert grouped.why_not((64, 2048, 1408), jnp.bfloat16, Hopper) is None
    assert "bfloat16" in grouped.why_not((64, 2048, 1408), jnp.float32, Hopper)
    assert "multiples of 128" in grouped.why_not((64, 2048, 1400), jnp.bfloat16, Hopper)
    assert "NVIDIA GPU" in grouped.why_not((64, 2048, 1408), jnp.bfloat16, jax.devices("cpu")[0])


def test_random_weights_are_like_the_constructors():
    config = DecoderConfig.from_preset("tiny")
    made = random_decoder(config, param_dtype=jnp.bfloat16)
    model = Decoder(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    flat = [nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (made, model)]
    assert flat[0].paths == flat[1].paths
    for ours, theirs in zip(flat[0].leaves, flat[1].leaves, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        a, b = (float(jnp.std(leaf[...].astype(jnp.float32))) for leaf in (ours, theirs))
        assert a == pytest.approx(b, rel=0.15)
