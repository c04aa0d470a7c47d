# --8<-- [start:recipe]
import jax
import jax.numpy as jnp
from flax import nnx
from jax import export

import mla_jax

config = mla_jax.MLAConfig.from_preset("tiny")
layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))

graph, state = nnx.split(layer)
leaves, tree = jax.tree.flatten(state)


def step(leaves, x, cache):
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves)).decode(x, cache)


batch, slots = export.symbolic_shape("B, S")


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


like = jax.eval_shape(lambda: layer.init_cache(2, 16))
cache = like.replace(
    stores=jax.tree.map(lambda held: shape(batch, slots, held.shape[2]), like.stores),
    length=jax.ShapeDtypeStruct((batch,), jnp.int32),
    overflowed=jax.ShapeDtypeStruct((batch,), bool),
)
parameters = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
program = export.export(jax.jit(step))(parameters, shape(batch, 1, config.hidden_size), cache)
data = program.serialize()  # bytes: no parameters in them
# --8<-- [end:recipe]

run = export.deserialize(data).call
want, _ = jax.jit(step)(leaves, jnp.ones((1, 1, config.hidden_size)), layer.init_cache(1, 32))
for rows, length in ((1, 32), (3, 128)):
    x = jnp.ones((rows, 1, config.hidden_size))
    y, held = run(leaves, x, layer.init_cache(rows, length))
    print(rows, "rows of", length, "slots:", bool(jnp.allclose(y, want, atol=1e-6)))
