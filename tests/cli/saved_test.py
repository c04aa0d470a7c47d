"""What `mla-jax demo --save` writes is all of a model's state."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mla_jax.cli import saved
from mla_jax.models import Decoder, DecoderConfig


def test_the_routers_bias_is_saved_though_it_is_no_parameter(tmp_path):
    model = Decoder(DecoderConfig.from_preset("tiny"), rngs=nnx.Rngs(0))
    bias = model.blocks[1].mlp.router.bias
    bias.set_value(jnp.arange(bias.shape[0], dtype=jnp.float32))
    saved.save(model, tmp_path / "model")
    read = nnx.to_flat_state(nnx.state(saved.load(tmp_path / "model")))
    written = nnx.to_flat_state(nnx.state(model))
    assert read.paths == written.paths
    for one, two in zip(read.leaves, written.leaves, strict=True):
        np.testing.assert_array_equal(one[...], two[...])
