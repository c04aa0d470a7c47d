"""Shapes and float64 loops that several test files share."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx

from mla_jax import MLAConfig

# Odd widths on purpose; every optional part is on in one and off in the other.
MICRO = MLAConfig(
    hidden_size=24, num_attention_heads=3, q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=7,
    qk_rope_head_dim=4, v_head_dim=10, attention_bias=True, mla_scale_q_lora=True,
    mla_scale_kv_lora=True, rope_scaling={
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0,
        "mscale_all_dim": 0.8,
    },
)  # fmt: skip
PLAIN = MICRO.replace(
    q_lora_rank=None, mla_scale_q_lora=False, mla_scale_kv_lora=False, attention_bias=False,
    rope_scaling=None, rope_interleave=False, mla_use_nope=False,
)  # fmt: skip


def slow(*case):
    """A case that the gate leaves to `pytest -m slow`: another one there is of its kind."""
    return pytest.param(*case, marks=pytest.mark.slow)


def gate(cases, *kept):
    """Cases of one argument, of which the gate keeps those of these numbers."""
    return [case if i in kept else slow(case) for i, case in enumerate(cases)]


def drawn(make, seed=0):
    """What `make()` is, other numbers: without its initialisers, which take seconds to compile.

    Kernels are normal, a column of about length 1; the rest is as constructors make it.
    """
    random, module = np.random.default_rng(seed), nnx.eval_shape(make)
    for path, leaf in nnx.to_flat_state(nnx.state(module)):
        name, shape = path[-1], leaf.shape
        if len(shape) > 1:
            inputs = shape[1] if "mlp" in path and len(shape) == 3 else shape[0]
            inputs = inputs * shape[1] if "o_proj" in path else inputs
            value = random.standard_normal(shape) * inputs**-0.5
        else:
            value = np.ones(shape) if name in ("scale", "ssmax_bias") else np.zeros(shape)
        leaf.set_value(put(value, leaf.dtype))
    return module


def put(value, dtype):
    """`jnp.asarray`, which compiles a program for every shape, without it."""
    return jax.device_put(np.asarray(value).astype(dtype))


def emptied(make, fill=np.nan):
    """The cache that `make()` would make, with `fill` in every slot: all are unused.

    Without the programs that make its arrays.
    """
    cache = jax.eval_shape(make)
    full = lambda value, like: jax.device_put(np.full(like.shape, value, like.dtype))  # noqa: E731
    if cache.pages is not None:
        count, pages = cache.pages.count, cache.pages
        free = put(np.arange(count)[::-1], np.int32)
        pages = dataclasses.replace(
            pages, table=full(count, pages.table), free=free,
            available=full(count, pages.available), uses=full(0, pages.uses),
        )  # fmt: skip
        cache = cache.replace(pages=pages)
    return cache.replace(
        stores=jax.tree.map(functools.partial(full, fill), cache.stores),
        length=full(0, cache.length),
        overflowed=full(False, cache.overflowed),
    )


def relative(actual, expected) -> float:
    """Relative Frobenius error."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def loop_attention(
    queries, keys, value, limits, scale, *, soft_cap=None, window=None, allowed=None
):
    """float64 attention, one query at a time; keys and value [B S K] or per head [B S N K]."""
    batch, tokens, heads = queries[0].shape[:3]
    limits = np.asarray(limits)
    out = np.zeros((batch, tokens, heads, value.shape[-1]))
    lse = np.full((batch, tokens, heads), -np.inf)
    pick = lambda array, b, s, n: array[b, s] if array.ndim == 3 else array[b, s, n]  # noqa: E731
    for b, t, n in np.ndindex(batch, tokens, heads):
        last = min(max(int(limits[b, t]), 0), value.shape[1])
        first = 0 if window is None else max(0, int(limits[b, t]) - window)
        slots = [s for s in range(first, last) if allowed is None or allowed[b, n, t, s]]
        if not slots:
            continue
        scores = []
        for s in slots:
            score = scale * sum(
                float(np.dot(q[b, t, n].astype(np.float64), pick(k, b, s, n).astype(np.float64)))
                for q, k in zip(queries, keys, strict=True)
            )
            scores.append(score if soft_cap is None else soft_cap * math.tanh(score / soft_cap))
        top = max(scores)
        weights = np.exp(np.array(scores) - top)
        lse[b, t, n] = top + math.log(weights.sum())
        mixed = sum(
            w * pick(value, b, s, n).astype(np.float64) for w, s in zip(weights, slots, strict=True)
        )
        out[b, t, n] = mixed / weights.sum()
    return out, lse
