"""What `bind` keeps of a model beside its arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mla_jax
from mla_jax import target
from mla_jax.models import Decoder, DecoderConfig
from mla_jax.models.rounding import round_weights
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


def test_on_a_gpu_a_bound_model_has_its_absorbed_weights_apart(on_gpu):
    """They are copies: the model that was given stays as it is, and so does what comes out."""
    model = Decoder(DecoderConfig.from_preset("tiny"), rngs=nnx.Rngs(0))
    plain, made = mla_jax.bind(model), on_gpu(mla_jax.bind, model)
    assert len(made.leaves) == len(plain.leaves) + 2 * len(model.blocks)
    assert made.structure == on_gpu(mla_jax.bind, model).structure
    for own, kept in zip(model.blocks, made.model.blocks, strict=True):
        own, kept = own.attention, kept.attention
        assert not hasattr(own, "kept_uk")
        np.testing.assert_array_equal(kept.kept_uk[...], own.w_uk)
        np.testing.assert_array_equal(kept.kept_uv[...], own.w_uv)
        assert kept.w_uk is kept.kept_uk[...]
        assert kept.w_uv is kept.kept_uv[...]

    def decoded(bound):
        _, cache = bound.prefill(jnp.array([[3, 1, 4]]), bound.init_cache(1, 8))
        return bound.decode(jnp.array([[1]]), cache)[0]

    np.testing.assert_array_equal(decoded(made), decoded(plain))


def test_stored_weights_are_kept_apart_in_the_dtype_of_the_computation(on_gpu):
    """Rounded once: what a step gives differs by that alone. Without a dtype none is known."""
    model = Decoder(DecoderConfig.from_preset("tiny"), dtype=jnp.float32, rngs=nnx.Rngs(0))
    round_weights(model.blocks, "float8_e4m3fn")
    plain, made = mla_jax.bind(model), on_gpu(mla_jax.bind, model)
    own, kept = model.blocks[0].attention, made.model.blocks[0].attention
    np.testing.assert_array_equal(kept.kept_uk[...], own.w_uk)
    np.testing.assert_array_equal(kept.kept_uv[...], own.w_uv)
    assert kept.kept_uv.dtype == jnp.float32

    def decoded(bound):
        _, cache = bound.prefill(jnp.array([[3, 1, 4]]), bound.init_cache(1, 8))
        return bound.decode(jnp.array([[1]]), cache)[0]

    np.testing.assert_allclose(decoded(made), decoded(plain), atol=1e-5)
    other = kept.kept_uv[...]
    kept.kept_uv.set_value(0 * other)
    assert not kept._heads(jnp.ones((1, 1, own.config.num_attention_heads, len(other)))).any()
    own.kv_b_proj.dtype = None
    assert not hasattr(on_gpu(mla_jax.bind, own).model, "kept_uk")


def test_shapes_of_a_model_are_bound_as_its_arrays_are(on_gpu):
    """So a program can be compiled before there are weights."""
    create = lambda: Decoder(DecoderConfig.from_preset("tiny"), rngs=nnx.Rngs(0))  # noqa: E731
    shapes = on_gpu(mla_jax.bind, nnx.eval_shape(create))
    made = on_gpu(mla_jax.bind, create())
    assert shapes.structure == made.structure
    assert [(x.shape, x.dtype) for x in shapes.leaves] == [(x.shape, x.dtype) for x in made.leaves]


def test_a_mesh_and_other_models_have_nothing_apart(on_gpu):
    layer = mla_jax.MultiHeadLatentAttention(
        mla_jax.MLAConfig.from_preset("tiny"), rngs=nnx.Rngs(0)
    )
    assert hasattr(on_gpu(mla_jax.bind, layer).model, "kept_uk")
    with jax.set_mesh(jax.make_mesh((2,), ("n",))):
        split = jax.device_put(layer, Rules(N="n").of(layer))
        assert not hasattr(on_gpu(mla_jax.bind, split).model, "kept_uk")
    assert on_gpu(mla_jax.bind, {"x": jnp.ones(3)}).model.keys() == {"x"}
