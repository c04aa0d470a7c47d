import jax.numpy as jnp
from flax import nnx

import mla_jax


# --8<-- [start:model]
class Model(nnx.Module):
    def __init__(self, config, layers, words, rngs):
        self.embed = nnx.Embed(words, config.hidden_size, rngs=rngs)
        self.layers = nnx.List(
            mla_jax.MultiHeadLatentAttention(config, rngs=rngs) for _ in range(layers)
        )

    def init_cache(self, batch, slots, dtype=None, pages=None):
        return mla_jax.Cache.init(self.layers, batch, slots, dtype, pages)

    def extend(self, tokens, cache, lengths=None):
        step = mla_jax.Step.begin(cache, tokens.shape[1], lengths)
        x, stores = self.embed(tokens), []
        for layer, store in zip(self.layers, cache.stores, strict=True):
            y, store, _ = layer.extend(x, store, step)
            x, stores = x + y, [*stores, store]
        return x, cache.end(stores, step)

    def logits(self, hidden):
        return self.embed.attend(hidden)


# --8<-- [end:model]


# --8<-- [start:use]
config = mla_jax.MLAConfig.from_preset("tiny")
model = Model(config, layers=2, words=50, rngs=nnx.Rngs(0))
result = mla_jax.generation.generate(model, [[3, 1, 4], [9]], max_new_tokens=5, speculate=2)
print("new tokens:", [len(row) for row in result.tokens], "rows hold:", result.cache.length)
# --8<-- [end:use]

# --8<-- [start:loop]
step = mla_jax.bind(model)
logits, cache = step.prefill(jnp.array([[3, 1, 4]]), step.init_cache(1, 128))
text = []
for _ in range(5):
    token = logits[:, -1:].argmax(-1)
    text.append(int(token[0, 0]))
    logits, cache = step.decode(token, cache)
print("the same by a loop of one's own:", text == result.tokens[0])
# --8<-- [end:loop]

tokens = jnp.array([[3, 1, 4, 1, 5, 9], [9, 2, 6, 0, 0, 0]])
whole, _ = step.extend(tokens, step.init_cache(2, 128))
cache = step.init_cache(2, 128, pages=2)
hidden, cache = step.extend(tokens[:, :3], cache, lengths=jnp.array([3, 3]))
hidden, cache = step.extend(tokens[:, 3:], cache, lengths=jnp.array([3, 0]))
print("rows hold:", cache.length)
print("the same as in one pass:", bool(jnp.allclose(hidden[0], whole[0, 3:], atol=1e-5)))

seen: list[list[int]] = [[], []]
result = mla_jax.generation.generate(
    model, [[3, 1, 4], [9]], max_new_tokens=5, speculate=2,
    on_tokens=lambda row, tokens: seen[row].extend(tokens),
)  # fmt: skip
print("all tokens are seen:", seen == result.tokens)
