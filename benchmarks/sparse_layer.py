"""What `sparse.py --whole` and `--prefill` time: sparse attention beside attention to all slots."""

import dataclasses
import functools
import statistics
import time

import decode  # beside this file
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from loops import compare, looped

import mla_jax
from mla_jax.cache import Dense
from mla_jax.ops import attend_latents, choose_slots, dispatch, latent_call
from mla_jax.ops.seen import Seen

J, I = 64, 128  # noqa: E741  DeepSeek-V3.2's indexer
N, R, P = 128, 512, 64  # its attention


def measure_step(shape, count, last, rounds, others):
    """Seconds of a step's choice, attention to it, both, and dense attention; and errors.

    The errors are of attention to what was chosen and to all slots, relative to XLA's.
    """
    batch, slots, tokens = shape
    draw = lambda i, *s: jax.random.normal(jax.random.key(i), s).astype(jnp.bfloat16)  # noqa: E731
    query, weights = draw(0, batch, tokens, J, I), draw(1, batch, tokens, J).astype(jnp.float32)
    pattern, q_rope = draw(2, batch, tokens, N, R), draw(3, batch, tokens, N, P)
    caches = [
        {"index_key": draw(4 + 3 * i, batch, slots, I), "latent": draw(5 + 3 * i, batch, slots, R),
         "k_rope": draw(6 + 3 * i, batch, slots, P)}
        for i in range(decode.copies_of(batch * slots * I * 2))
    ]  # fmt: skip
    ends = jnp.full((batch,), slots, jnp.int32)
    seen = Seen.of(ends, batch=batch, queries=tokens, slots=slots)
    scale = 192**-0.5
    attend = functools.partial(attend_latents, scale=scale)
    call = latent_call((pattern, q_rope), Dense(caches[0]), seen, scale)
    planned = jax.jit(lambda seen: dispatch.plan(seen, call))(seen)

    def chosen(query, weights, seen, cache, implementation=None):
        store = Dense({"index_key": cache["index_key"]})
        return choose_slots(query, weights, store, seen, count=count, implementation=implementation)

    def attended(queries, seen, chosen, cache, implementation=None):
        store = Dense({name: cache[name] for name in ("latent", "k_rope")})
        now = seen if chosen is None else seen.replace(chosen=chosen)
        return attend(queries, store, now, implementation=implementation)

    def sparse(query, weights, queries, seen, cache, choose=None, implementation=None):
        found = chosen(query, weights, seen, cache, choose)
        return attended(queries, seen, found, cache, implementation)

    queries, copies = (pattern, q_rope), len(caches)
    found = [jax.jit(chosen)(query, weights, seen, cache) for cache in caches]
    both = list(zip(found, caches, strict=True))
    xla = (("index_scores", "xla"), ("best_slots", "xla"))
    loops = {
        "choice": looped(chosen, ((query, weights, seen), caches), copies),
        "attention to the chosen": looped(
            lambda queries, seen, pair: attended(queries, seen, *pair),
            ((queries, seen), both), copies,
        ),
        "sparse": looped(sparse, ((query, weights, queries, seen), caches), copies),
        "dense": looped(
            lambda queries, seen, cache: attended(queries, seen, None, cache),
            ((queries, planned), caches), copies,
        ),
    }  # fmt: skip
    if others:
        run = functools.partial(sparse, choose=xla, implementation="xla")
        loops["sparse xla"] = looped(run, ((query, weights, queries, seen), caches), copies, 2)
    errors = []
    for given in (found[0], None):
        got, want = (
            np.asarray(jax.jit(attended, static_argnames="implementation")(
                queries, seen, given, caches[0], implementation=name
            )[0], np.float64) for name in (None, "xla")
        )  # fmt: skip
        errors.append(float(np.linalg.norm(got - want) / np.linalg.norm(want)))
    return compare(loops, last, rounds), errors


def measure_prefill(tokens, held, rounds):
    """Seconds of `layer.prefill` of one row of DeepSeek-V3.2: {"sparse": ..., "dense": ...}."""
    config, slots = mla_jax.MLAConfig.from_preset("deepseek_v32"), tokens + held
    layer = mla_jax.MultiHeadLatentAttention(
        config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    graph, state = nnx.split(layer)
    x = jax.random.normal(jax.random.key(1), (1, tokens, config.hidden_size), jnp.bfloat16)
    cache = layer.init_cache(1, slots)
    fill = lambda a: jax.random.normal(jax.random.key(a.shape[2]), a.shape, a.dtype)  # noqa: E731
    cache = jax.tree.map(lambda a: fill(a) if a.ndim == 3 else a, cache)
    cache = dataclasses.replace(cache, length=jnp.full((1,), held, jnp.int32))

    def program(topk):
        def run(state, x, cache):
            layer = nnx.merge(graph, state)
            layer.config = layer.config.replace(index_topk=topk)
            layer.indexer.config = layer.config
            start = cache.length
            y, cache = layer.prefill(x, cache)
            return y, dataclasses.replace(cache, length=start)

        return jax.jit(run, donate_argnums=2).lower(state, x, cache).compile()

    programs = {"sparse": program(config.index_topk), "dense": program(slots)}
    taken = {name: [] for name in programs}
    with decode.alone():
        for turn in range(rounds + 1):
            for name, run in programs.items():
                started = time.perf_counter()
                for _ in range(3):
                    y, cache = run(state, x, cache)
                jax.block_until_ready(y)
                if turn:
                    taken[name].append((time.perf_counter() - started) / 3)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}
