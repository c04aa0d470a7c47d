"""What `mla-jax demo --save` writes is all of a model's state."""

import numpy as np
from common import drawn, put
from flax import nnx

from mla_jax.cli import saved
from mla_jax.models import Decoder, DecoderConfig


def test_the_routers_bias_is_saved_though_it_is_no_parameter(tmp_path):
    model = drawn(lambda: Decoder(DecoderConfig.from_preset("tiny"), rngs=nnx.Rngs(0)))
    bias = model.blocks[1].mlp.router.bias
    bias.set_value(put(np.arange(bias.shape[0]), np.float32))
    saved.save(model, tmp_path / "model")
    read = nnx.to_flat_state(nnx.state(saved.load(tmp_path / "model")))
    written = nnx.to_flat_state(nnx.state(model))
    assert read.paths == written.paths
    for one, two in zip(read.leaves, written.leaves, strict=True):
        np.testing.assert_array_equal(one[...], two[...])
