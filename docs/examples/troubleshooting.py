import jax
import jax.numpy as jnp
from flax import nnx

import mla_jax

config = mla_jax.MLAConfig.from_preset("tiny")
layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
x = jnp.ones((2, 3, config.hidden_size))


def told(action):
    """Prints the error that an action ends with."""
    try:
        action()
    except Exception as error:
        print(f"{type(error).__name__}: {str(error).split(' with shape')[0]}")


def overflow():
    layer.prefill(x, layer.init_cache(batch_size=2, max_length=2))


def donated():
    cache = layer.init_cache(batch_size=2, max_length=8)
    mla_jax.decode_step(layer, x[:, :1], cache)
    mla_jax.decode_step(layer, x[:, :1], cache)  # the old cache: the new one was not kept


def mixed():
    queries = jnp.ones((1, 1, 4, 64)), jnp.ones((1, 1, 4, 16))
    held = jnp.ones((1, 8, 64), jnp.bfloat16), jnp.ones((1, 8, 16), jnp.bfloat16)
    mla_jax.latent_attention(*queries, *held, lengths=None, scale=1.0)


def refused():
    mla_jax.MLAConfig.from_hf({"model_type": "deepseek_v4"})


for action in (overflow, donated, mixed, refused):
    told(action)

# --8<-- [start:explain]
v3 = mla_jax.MLAConfig.from_preset("deepseek_v3")
mla_jax.explain(v3, dtype="float32", device=jax.devices("cpu")[0])
# --8<-- [end:explain]
