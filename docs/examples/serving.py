# --8<-- [start:begin]
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import mla_jax
from mla_jax.models import Decoder, DecoderConfig

config = DecoderConfig.from_preset("tiny")
config = config.replace(attention=config.attention.replace(num_hidden_layers=1))
model = Decoder(config, rngs=nnx.Rngs(0))
# --8<-- [end:begin]


# --8<-- [start:ragged]
@jax.jit
def last(states, lengths):
    """Each row's own last state: [B T D] to [B 1 D]."""
    return jnp.take_along_axis(states, lengths[:, None, None] - 1, axis=1)


prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5]]
longest = max(map(len, prompts))
tokens = np.zeros((len(prompts), longest), np.int32)  # padded on the right, by any token
for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
lengths = jnp.array([len(prompt) for prompt in prompts])

step = mla_jax.bind(model)  # a snapshot of the parameters: bind again after a change
cache = step.init_cache(batch_size=3, max_length=64)
states, cache = step.extend(tokens, cache, lengths)  # [3 5 D]
token = step.logits(last(states, lengths))[:, 0].argmax(-1)
for _ in range(4):
    logits, cache = step.decode(token[:, None], cache)
    token = logits[:, 0].argmax(-1)
print("rows hold:", cache.length)
# --8<-- [end:ragged]

# --8<-- [start:loop]
ROWS, SLOTS, WIDTH, STOP = 2, 64, 8, 7
insert = jax.jit(lambda cache, row, index: cache.insert(row, index), donate_argnums=0)


def serve(prompts, most):
    """Continues every prompt by at most `most` tokens, ROWS of them at a time."""
    waiting = list(enumerate(prompts))
    answers = [[] for _ in prompts]
    request = [None] * ROWS  # which prompt each row is busy with
    token = np.zeros(ROWS, np.int32)  # each row's newest token, which the cache lacks
    cache = step.init_cache(ROWS, SLOTS)
    while waiting or any(one is not None for one in request):
        for row in range(ROWS):
            if request[row] is None and waiting:
                request[row], prompt = waiting.pop(0)
                padded = np.zeros((1, WIDTH), np.int32)  # few widths, so that few are compiled
                padded[0, : len(prompt)] = prompt
                count = jnp.array([len(prompt)])
                one = step.init_cache(1, SLOTS)
                states, one = step.extend(padded, one, count)
                token[row] = step.logits(last(states, count)).argmax()
                cache = insert(cache, one, row)  # into the free row, whatever it held
                answers[request[row]].append(int(token[row]))
        busy = jnp.array([one is not None for one in request], jnp.int32)
        logits, cache = step.prefill(token[:, None], cache, busy)  # idle rows append nothing
        drawn = np.asarray(logits[:, 0].argmax(-1), np.int32)
        for row in range(ROWS):
            if request[row] is None:
                continue
            if len(answers[request[row]]) == most or token[row] == STOP:
                request[row] = None  # its slots are free for the next prompt
            else:
                token[row] = drawn[row]
                answers[request[row]].append(int(token[row]))
    return answers


answers = serve(prompts, most=6)
alone = [serve([prompt], most=6)[0] for prompt in prompts]
print("three prompts in two rows:", answers == alone)
# --8<-- [end:loop]

# --8<-- [start:fork]
fork = jax.jit(lambda cache, source, rows: cache.fork(source, rows), donate_argnums=0)
shared = [3, 1, 4, 1, 5, 9, 2, 6] * 20  # a beginning of 160 tokens, for four continuations
cache = step.init_cache(batch_size=4, max_length=256, pages=6)
padded = np.zeros((4, 160), np.int32)
padded[0] = shared
_, cache = step.extend(padded, cache, jnp.array([160, 0, 0, 0]))
cache = fork(cache, 0, jnp.array([False, True, True, True]))
print("rows hold:", cache.length, "free pages:", int(cache.pages.available))
# --8<-- [end:fork]


# --8<-- [start:device]
@functools.partial(jax.jit, static_argnames="steps", donate_argnames="cache")
def decode_many(step, token, cache, steps):
    """Some steps in one program: the host is asked once for all of them."""

    def one(carry, _):
        token, cache = carry
        logits, cache = step.model.decode(token[:, None], cache)
        token = logits[:, 0].argmax(-1).astype(jnp.int32)
        return (token, cache), token

    (_, cache), drawn = jax.lax.scan(one, (token, cache), length=steps)
    return drawn.T, cache


drawn, cache = decode_many(step, jnp.array([9, 2, 6, 5], jnp.int32), cache, steps=3)
print("tokens:", drawn.shape, "rows hold:", cache.length, "overflowed:", cache.overflowed.any())
# --8<-- [end:device]
