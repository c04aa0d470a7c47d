# --8<-- [start:begin]
import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

import mla_jax
from mla_jax import models, training

STEPS, MICRO_BATCHES, ROWS, LENGTH = 12, 2, 4, 48
# --8<-- [end:begin]

# --8<-- [start:model]
config = models.DecoderConfig(
    attention=mla_jax.MLAConfig.from_preset("tiny").replace(num_hidden_layers=1),
    moe_intermediate_size=64, n_routed_experts=8, num_experts_per_tok=2,
    scoring_func="sigmoid", norm_topk_prob=True, num_nextn_predict_layers=1,
)  # fmt: skip


@jax.jit
def init():  # one program, not one for each parameter
    model = models.Decoder(config, mtp=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    return nnx.split(model, nnx.Param, ...)[1:]


graph = nnx.graphdef(
    nnx.eval_shape(lambda: models.Decoder(config, mtp=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
)
params, rest = init()  # float32: what the optimizer moves, and the routers' biases
# --8<-- [end:model]

# --8<-- [start:optimizer]
decays = jax.tree.map(lambda leaf: leaf.ndim > 1, params)  # kernels, and not the norms' scales
schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 4, STEPS, 3e-4)
optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=decays),
)
# --8<-- [end:optimizer]


# --8<-- [start:step]
@functools.partial(jax.jit, donate_argnums=0)
def step(train, tokens):
    """One update by micro-batches [A B T]."""
    params, rest, moments = train

    def loss(params, tokens):
        model = nnx.merge(graph, params, rest)
        return models.training_loss(model, tokens, remat="latents", chunk=64)

    def micro_batch(total, tokens):
        (value, terms), slopes = jax.value_and_grad(loss, has_aux=True)(params, tokens)
        return jax.tree.map(jnp.add, total, slopes), (value, terms)

    empty = jax.tree.map(jnp.zeros_like, params)
    total, (values, terms) = jax.lax.scan(micro_batch, empty, tokens)
    slopes = jax.tree.map(lambda leaf: leaf / len(tokens), total)
    updates, moments = optimizer.update(slopes, moments, params)
    params = optax.apply_updates(params, updates)

    model = nnx.merge(graph, params, rest)
    model.balance(terms.load.sum(0), rate=1e-3)  # by the load of the whole step
    rest = nnx.split(model, nnx.Param, ...)[2]
    return (params, rest, moments), (values.mean(), terms)


# --8<-- [end:step]

# --8<-- [start:run]
text = training.standard_library_text(0.1)
starts = np.random.default_rng(0).integers(0, len(text) - LENGTH, (STEPS, MICRO_BATCHES, ROWS, 1))
batches = text[starts + np.arange(LENGTH)].astype(np.int32)


def run(train, first, last):
    losses = []
    for tokens in batches[first:last]:
        train, (value, terms) = step(train, tokens)
        losses.append(float(value))
    return train, losses, terms


# --8<-- [end:run]


def equal(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


# --8<-- [start:resume]
train = (params, rest, optimizer.init(params))
train = jax.device_put(train, jax.devices()[0])  # as a restored one: else `step` compiles twice
shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), train)
with tempfile.TemporaryDirectory() as folder, ocp.CheckpointManager(pathlib.Path(folder)) as kept:
    train, losses, _ = run(train, 0, 5)
    kept.save(5, args=ocp.args.StandardSave(train))
    kept.wait_until_finished()
    train, more, terms = run(train, 5, STEPS)  # an unbroken run

    begun = kept.latest_step()  # another process would begin here, with `shapes` and `graph`
    resumed = kept.restore(begun, args=ocp.args.StandardRestore(shapes))
    resumed, again, _ = run(resumed, begun, STEPS)
# --8<-- [end:resume]

model = nnx.merge(graph, *train[:2])
bias = model.blocks[0].mlp.router.bias[...]
print("parameters:", {leaf.dtype.name for leaf in jax.tree.leaves(train[0])})
print("decaying:", sum(jax.tree.leaves(decays)), "of", len(jax.tree.leaves(decays)), "arrays")
print("the loss falls:", np.mean((losses + more)[-3:]) < losses[0] - 0.5)
print("tokens of each step by layer:", terms.load.sum((0, 2)))
print("biases moved by up to", round(float(abs(bias).max()), 4))
print("a resumed run is the unbroken one, bit for bit:", again == more and equal(resumed, train))
