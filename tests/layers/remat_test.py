"""Rematerialisation by name: what a layer's backward finds, in numbers, and equal gradients."""

import functools

import jax
import jax.numpy as jnp
import pytest
from common import MICRO, PLAIN, drawn, relative
from flax import nnx
from jax.flatten_util import ravel_pytree

from mla_jax import MultiHeadLatentAttention, remat_policy
from mla_jax.layers.remat import rematerialised, saved_names

SAVES = ("nothing", "latents", "queries", "all")
B, T = 2, 5


def numbers_a_token(config):
    """What each policy keeps of a token beyond the layer's input."""
    heads, nope, rope = (
        config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim,
    )  # fmt: skip
    latents = (config.q_lora_rank or 0) + config.kv_lora_rank + rope
    queries = heads * (nope + rope)
    rest = heads * (nope + config.v_head_dim) + heads * config.v_head_dim
    return {"nothing": 0, "latents": latents, "queries": latents + queries,
            "all": latents + queries + rest}  # fmt: skip


@pytest.mark.parametrize("transform", [jax.checkpoint, nnx.remat], ids=["jax", "flax"])
@pytest.mark.parametrize("config", [MICRO, PLAIN], ids=["query latent", "no query latent"])
def test_the_backward_finds_what_is_named_and_nothing_else(config, transform):
    graph, state = nnx.split(drawn(lambda: MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))))
    x = jnp.zeros((B, T, config.hidden_size))
    given = sum(leaf.size for leaf in jax.tree.leaves((state, x)))

    def found(save):
        layer = lambda layer, x: layer(x)  # noqa: E731
        if save is not None:
            layer = transform(layer, policy=remat_policy(save))
        forward = lambda state, x: layer(nnx.merge(graph, state), x)  # noqa: E731
        back = jax.eval_shape(lambda state, x: jax.vjp(forward, state, x)[1], state, x)
        return sum(leaf.size for leaf in jax.tree.leaves(back)) - given

    expected = numbers_a_token(config)
    # Biases are not needed, a few positions and angles may be: less than the latents of one row.
    slack = T * config.kv_lora_rank
    for save in SAVES:
        assert abs(found(save) - B * T * expected[save]) < slack, save
    assert found(None) > B * T * expected["all"] + slack


def test_gradients_are_the_same_and_the_program_needs_less():
    make = lambda: MultiHeadLatentAttention(PLAIN, rngs=nnx.Rngs(0))  # noqa: E731
    layers = [drawn(make, i) for i in range(3)]
    graphs, states = zip(*map(nnx.split, layers), strict=True)
    x = jax.random.normal(jax.random.key(1), (4, 64, PLAIN.hidden_size))

    @functools.partial(jax.jit, static_argnames="save")
    def step(states, save):
        def loss(states):
            y = x
            for graph, state in zip(graphs, states, strict=True):
                y = y + rematerialised(nnx.merge(graph, state), save)(y, positions=jnp.arange(64))
            return (y**2).mean()

        return ravel_pytree(jax.grad(loss)(states))[0]

    compiled = {save: step.lower(states, save).compile() for save in (None, "latents")}
    need = [one.memory_analysis().temp_size_in_bytes for one in compiled.values()]
    # At least the scores of all layers but one: 4 bytes each.
    assert need[0] - need[1] > 2 * 4 * 4 * PLAIN.num_attention_heads * 64**2
    plain, again = (one(states) for one in compiled.values())
    assert relative(again, plain) < 1e-5


def test_another_policy_is_refused_by_name():
    with pytest.raises(ValueError, match="save='latent': it must be one of 'nothing', 'latents'"):
        remat_policy("latent")
    assert saved_names("nothing") == ()
    assert set(saved_names("latents")) < set(saved_names("queries")) < set(saved_names("all"))
