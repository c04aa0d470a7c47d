# --8<-- [start:begin]
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

import mla_jax

config = mla_jax.MLAConfig.from_preset("tiny")
x = jax.random.normal(jax.random.key(1), (2, 6, config.hidden_size))
# --8<-- [end:begin]


# --8<-- [start:linen]
class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        attention = nnx.bridge.to_linen(mla_jax.MultiHeadLatentAttention, config)
        return x + attention(nn.RMSNorm()(x))


block = Block()
variables = jax.jit(block.init)(jax.random.key(0), x)
print("Linen:", jax.jit(block.apply)(variables, x).shape, *variables["params"])
# --8<-- [end:linen]

# --8<-- [start:functions]
layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
graph, state = nnx.split(layer)  # what it is, and a pytree of its arrays


def attention(state, x):
    return nnx.merge(graph, state)(x)


def decode(state, x, cache):
    return nnx.merge(graph, state).decode(x, cache)


print("a function:", bool(jnp.array_equal(jax.jit(attention)(state, x), nnx.jit(layer)(x))))
cache = nnx.merge(graph, state).init_cache(batch_size=2, max_length=16)
y, cache = jax.jit(decode, donate_argnums=2)(state, x[:, :1], cache)
print("rows hold:", cache.length)
# --8<-- [end:functions]

# --8<-- [start:optax]
optimizer = optax.adamw(1e-3)
moments = jax.jit(optimizer.init)(state)


@jax.jit
def train(state, moments, x, target):
    loss, gradients = jax.value_and_grad(
        lambda state: jnp.square(attention(state, x) - target).mean()
    )(state)
    updates, moments = optimizer.update(gradients, moments, state)
    return optax.apply_updates(state, updates), moments, loss


losses = []
for _ in range(3):
    state, moments, loss = train(state, moments, x, jnp.zeros_like(x))
    losses.append(float(loss))
print("the loss falls:", losses[2] < losses[1] < losses[0])
# --8<-- [end:optax]

# --8<-- [start:core]
# The core alone, for a layer of one's own: 4 heads, latents of 64 and rotary keys of 16 numbers.
pattern, q_rope = jnp.ones((2, 1, 4, 64)), jnp.ones((2, 1, 4, 16))  # of one new token
latent, k_rope = jnp.ones((2, 32, 64)), jnp.ones((2, 32, 16))
out_latent, lse = mla_jax.latent_attention(
    pattern, q_rope, latent, k_rope, lengths=jnp.array([32, 7]), scale=48**-0.5
)
print("the core:", out_latent.shape, lse.shape)
# --8<-- [end:core]
