import jax.numpy as jnp
from flax import nnx

import mla_jax

config = mla_jax.MLAConfig.from_preset("tiny")
layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))

x = jnp.ones((2, 5, config.hidden_size))
y = layer(x)  # causal; training and scoring
print("output:", y.shape)

cache = layer.init_cache(batch_size=2, max_length=64)
y, cache = layer.prefill(x, cache, lengths=jnp.array([5, 3]))  # prompts, right-padded
for _ in range(10):
    y, cache = mla_jax.decode_step(layer, y[:, -1:], cache)  # one new token per row
print("rows hold:", cache.length)
print("cache:", cache.nbytes, "bytes for", 2 * cache.max_length, "slots")
