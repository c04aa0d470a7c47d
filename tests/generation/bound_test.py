"""What `bind` keeps of a model beside its arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import drawn, put
from flax import nnx

import mla_jax
from mla_jax import target
from mla_jax.models import Decoder, DecoderConfig
from mla_jax.models.rounding import round_weights
from mla_jax.ops.hopper.order import in_order
from mla_jax.sharding import Rules


@pytest.fixture
def on_gpu(monkeypatch):
    """A function in a context that takes this device for a GPU."""

    def call(f, *args):
        with monkeypatch.context() as patched:
            gpu = target.Target("gpu", "NVIDIA H200", 9.0, 132)
            patched.setattr(target, "current", lambda: gpu)
            return f(*args)

    return call


def model():
    config = DecoderConfig.from_preset("tiny")
    config = config.replace(attention=config.attention.replace(num_hidden_layers=1))
    return drawn(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def layer_of(config, **types):
    return drawn(lambda: mla_jax.MultiHeadLatentAttention(config, **types, rngs=nnx.Rngs(0)))


def decoded(bound):
    """Logits of a token behind another."""
    _, cache = bound.decode([[3]], bound.init_cache(1, 8))
    return bound.decode([[1]], cache)[0]


def test_on_a_gpu_a_bound_model_has_its_absorbed_weights_apart(on_gpu):
    """They are copies: the model that was given stays as it is, and so does what comes out."""
    given = model()
    plain, made = mla_jax.bind(given), on_gpu(mla_jax.bind, given)
    assert len(made.leaves) == len(plain.leaves) + 2 * len(given.blocks)
    assert made.structure == on_gpu(mla_jax.bind, given).structure
    for own, kept in zip(given.blocks, made.model.blocks, strict=True):
        own, kept = own.attention, kept.attention
        assert not hasattr(own, "kept_uk")
        np.testing.assert_array_equal(kept.kept_uk[...], own.w_uk)
        np.testing.assert_array_equal(kept.kept_uv[...], own.w_uv)
        assert kept.w_uk is kept.kept_uk[...]
        assert kept.w_uv is kept.kept_uv[...]

    np.testing.assert_array_equal(decoded(made), decoded(plain))


def test_stored_weights_are_kept_apart_in_the_dtype_of_the_computation(on_gpu, rng):
    """Rounded once: what a step gives differs by that alone. Without a dtype none is known."""
    config = mla_jax.MLAConfig.from_preset("tiny")
    layer = layer_of(config, dtype=jnp.float32)
    round_weights(layer, "float8_e4m3fn")
    made = on_gpu(mla_jax.bind, layer).model
    q_nope, mixed = (put(rng.standard_normal((2, 1, 4, n)), np.float32) for n in (32, 64))
    through = jax.jit(lambda layer: (layer._pattern(q_nope), layer._heads(mixed)))
    for kept, own in zip(
        (made.kept_uk, made.kept_uv), jax.jit(lambda x: (x.w_uk, x.w_uv))(layer), strict=True
    ):
        np.testing.assert_array_equal(kept[...], own)
    assert made.kept_uv.dtype == jnp.float32
    for found, wanted in zip(through(made), through(layer), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    for kept in (made.kept_uk, made.kept_uv):  # they are what multiplies
        kept.set_value(put(np.zeros(kept.shape), kept.dtype))
    assert not any(np.asarray(found).any() for found in through(made))
    layer.kv_b_proj.dtype = None
    assert not hasattr(on_gpu(mla_jax.bind, layer).model, "kept_uk")


def test_heads_come_in_the_order_that_the_kernel_of_o_proj_asks_for(on_gpu, rng):
    """By the weights that make them. `w_uv`, and what comes out, is as without an order."""
    config = mla_jax.MLAConfig.from_preset("tiny").replace(v_head_dim=128)
    layer = layer_of(config, dtype=jnp.bfloat16)
    round_weights(layer, "float8_e4m3fn")
    made = on_gpu(mla_jax.bind, layer).model
    w_uv = layer.w_uv
    np.testing.assert_array_equal(made.kept_uv[...], in_order(w_uv, 128))
    np.testing.assert_array_equal(made.w_uv, w_uv)
    mixed = put(rng.standard_normal((2, 1, 4, 64)), jnp.bfloat16)
    plain = layer._fold("BTNR,RNV->BTNV", mixed, w_uv)
    np.testing.assert_array_equal(made._heads(mixed), plain)
    # XLA leaves nothing of going there and back.
    both = jax.jit(lambda x: in_order(made._restored(x), 128)).lower(plain).compile().as_text()
    assert "transpose" not in both
    layer.o_proj = layer_of(config).o_proj
    assert on_gpu(mla_jax.bind, layer).model.kept_order is None


def test_shapes_of_a_model_are_bound_as_its_arrays_are(on_gpu):
    """So a program can be compiled before there are weights."""
    made = on_gpu(mla_jax.bind, model())
    shapes = on_gpu(mla_jax.bind, nnx.eval_shape(model))
    assert shapes.structure == made.structure
    assert [(x.shape, x.dtype) for x in shapes.leaves] == [(x.shape, x.dtype) for x in made.leaves]


def test_a_mesh_and_other_models_have_nothing_apart(on_gpu):
    layer = layer_of(mla_jax.MLAConfig.from_preset("tiny"))
    assert hasattr(on_gpu(mla_jax.bind, layer).model, "kept_uk")
    with jax.set_mesh(jax.make_mesh((2,), ("n",))):
        split = jax.device_put(layer, Rules(N="n").of(layer))
        assert not hasattr(on_gpu(mla_jax.bind, split).model, "kept_uk")
    assert on_gpu(mla_jax.bind, {"x": jnp.ones(3)}).model.keys() == {"x"}
