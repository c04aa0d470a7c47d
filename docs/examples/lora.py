import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import mla_jax

config = mla_jax.MLAConfig.from_preset("tiny")
layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
x = jax.random.normal(jax.random.key(1), (2, 6, config.hidden_size))
run = nnx.jit(lambda layer, x: layer(x))
before = run(layer, x)

# --8<-- [start:recipe]
rank, rngs = 4, nnx.Rngs(1)
for name in ("kv_a_proj", "kv_b_proj", "o_proj"):
    base = getattr(layer, name)
    inputs, outputs = math.prod(base.in_features), math.prod(base.out_features)
    setattr(layer, name, nnx.LoRA(inputs, rank, outputs, base_module=base, rngs=rngs))

optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.LoRAParam)  # the kernels stay


@nnx.jit
def step(layer, optimizer, x, goal):
    loss = lambda layer: ((layer(x) - goal) ** 2).mean()  # noqa: E731
    value, slopes = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(layer)
    optimizer.update(layer, slopes)
    return value


# --8<-- [end:recipe]

frozen = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
kernels = jax.tree.map(jnp.copy, nnx.state(layer, frozen))
print("as before the first step:", bool((run(layer, x) == before).all()))
losses = [float(step(layer, optimizer, x, 0.5 * before)) for _ in range(20)]
print("the loss falls:", losses[-1] < 0.9 * losses[0])
trained = jax.tree.leaves(nnx.state(layer, nnx.LoRAParam))
print("trained:", sum(leaf.size for leaf in trained), "numbers")
same = jax.tree.map(lambda a, b: bool((a == b).all()), kernels, nnx.state(layer, frozen))
print("kernels stay:", all(jax.tree.leaves(same)))


@nnx.jit
def absorbed(layer, x):
    _, cache = layer.prefill(x[:, :5], layer.init_cache(2, 8))
    return layer.decode(x[:, 5:], cache, form="absorbed")[0]


y = absorbed(layer, x)
print("the absorbed form has it:", bool(jnp.allclose(y, run(layer, x)[:, 5:], atol=1e-5)))
