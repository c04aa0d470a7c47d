import jax
import jax.numpy as jnp
from flax import nnx

import mla_jax

config = mla_jax.MLAConfig.from_preset("tiny")
layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))

x = jax.random.normal(jax.random.key(1), (2, 5, config.hidden_size))
y = layer(x)  # causal; training and scoring
print("output:", y.shape)

lengths = jnp.array([5, 3])  # tokens of each row; the rest of it is padding
cache = layer.init_cache(batch_size=2, max_length=64)
y, cache = mla_jax.prefill_step(layer, x, cache, lengths)  # prompts, right-padded
y = jnp.take_along_axis(y, lengths[:, None, None] - 1, axis=1)  # each row's last token: [2 1 128]
for _ in range(10):
    y, cache = mla_jax.decode_step(layer, y, cache)  # one new token per row
print("rows hold:", cache.length)
print("cache:", cache.nbytes, "bytes for", 2 * cache.max_length, "slots")

# A row gives the same beside any other: neither that row nor padding is seen.
other = jnp.full_like(x, 7.0).at[1, :3].set(x[1, :3])
z, cache = mla_jax.prefill_step(layer, other, layer.init_cache(2, 64), lengths)
z = jnp.take_along_axis(z, lengths[:, None, None] - 1, axis=1)
for _ in range(10):
    z, cache = mla_jax.decode_step(layer, z, cache)
print("the shorter row beside another one is as it was:", bool(jnp.array_equal(y[1], z[1])))
