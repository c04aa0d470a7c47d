"""Attention that is not causal, cross-attention to latents, dropout, and maps on demand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import MICRO, PLAIN, drawn, loop_attention, relative
from flax import nnx

import mla_jax
from mla_jax import MultiHeadLatentAttention

B, T, M = 3, 4, 6
FORMS = ("expanded", "absorbed")
LENGTHS = np.array([6, 0, 3])


def make(config=PLAIN, **options):
    return drawn(
        lambda: MultiHeadLatentAttention(config, precision="highest", rngs=nnx.Rngs(0), **options)
    )


@functools.partial(jax.jit, static_argnames=("causal", "form", "deterministic"))
def run(layer, x, **options):
    return layer(x, **options)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((B, T, PLAIN.hidden_size)), jnp.float32)


@pytest.fixture
def states(rng):
    return jnp.asarray(rng.standard_normal((B, M, PLAIN.hidden_size)), jnp.float32)


def exact(layer, x, states, lengths):
    """Cross-attention in float64 with no position anywhere, one query and slot at a time."""
    config = layer.config
    nope, rank = config.qk_nope_head_dim, config.kv_lora_rank
    kernel = lambda name: np.asarray(getattr(layer, name).kernel, np.float64)  # noqa: E731
    x, states = np.asarray(x, np.float64), np.asarray(states, np.float64)
    query = np.einsum("btd,dnk->btnk", x, kernel("q_proj"))
    raw = states @ kernel("kv_a_proj")
    square = (raw[..., :rank] ** 2).mean(-1, keepdims=True)
    latent = raw[..., :rank] / np.sqrt(square + config.latent_norm_eps)
    latent *= np.asarray(layer.kv_a_norm.scale, np.float64)
    both = np.einsum("bmr,rnk->bmnk", latent, kernel("kv_b_proj"))
    out, _ = loop_attention(
        (query[..., :nope], query[..., nope:]), (both[..., :nope], raw[..., rank:]),
        both[..., nope:], np.broadcast_to(lengths[:, None], x.shape[:2]), config.scale,
    )  # fmt: skip
    return np.einsum("btnv,nvd->btd", out, kernel("o_proj"))


def tolerance(depth):
    """A few sums of `depth` float32 products, as relative error."""
    return 4 * depth * 2.0**-24


@pytest.mark.parametrize("form", FORMS)
def test_cross_attention_is_float64s_at_once_and_token_by_token(x, states, form):
    """Ragged memories, an empty one included, whose padding holds NaN."""
    layer = make(PLAIN.replace(rope_interleave=True))
    expected = exact(layer, x, states, LENGTHS)
    assert (expected[1] == 0).all()
    padded = jnp.where((np.arange(M) < LENGTHS[:, None])[..., None], states, jnp.nan)
    remember = jax.jit(lambda layer, *a: layer.remember(*a, positions=jnp.zeros(M, jnp.int32)))
    memory = remember(layer, padded, jnp.asarray(LENGTHS))
    bound = tolerance(PLAIN.hidden_size + PLAIN.kv_lora_rank)
    assert relative(run(layer, x, memory=memory, form=form), expected) < bound
    steps = [run(layer, x[:, t : t + 1], memory=memory, form=form) for t in range(T)]
    assert relative(jnp.concatenate(steps, 1), expected) < bound


def test_a_sequence_that_remembers_itself_attends_to_all_of_itself(x):
    """With positions on both sides; the causal rule is Flax's mask."""
    layer = make(MICRO)
    bound = tolerance(MICRO.hidden_size + MICRO.kv_lora_rank)
    mask = nnx.make_causal_mask(jnp.ones((B, T)))
    both = run(layer, x, causal=False)
    for form in FORMS:
        itself = run(layer, x, memory=x, positions=jnp.arange(T), form=form)
        assert relative(itself, both) < bound
    masked = run(layer, x, causal=False, mask=mask, form="absorbed")
    causal = run(layer, x)
    assert relative(masked, causal) < bound
    assert relative(both, causal) > 1e-2
    assert relative(both[:, -1], causal[:, -1]) < bound


def test_gradients_reach_the_memory_alike_by_both_forms(x, states):
    layer = make(MICRO)
    graph, params = nnx.split(layer)

    @functools.partial(jax.jit, static_argnames="form")
    def slopes(params, states, form):
        def loss(params, states):
            layer = nnx.merge(graph, params)
            return (layer(x, memory=layer.remember(states, LENGTHS), form=form) ** 2).sum()

        return jax.grad(loss, argnums=(0, 1))(params, states)

    padded = jnp.where((np.arange(M) < LENGTHS[:, None])[..., None], states, jnp.nan)
    one, other = (slopes(params, padded, form) for form in FORMS)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(a).max()))
    assert bool((one[1][1] == 0).all())
    assert float(jnp.abs(one[1][2, :3]).min()) > 0


@pytest.mark.parametrize("form", FORMS)
def test_maps_are_captured_and_dropout_drops_from_them(x, form):
    """The weights give the output; what dropout keeps of them gives the output with dropout."""
    layer = make(dropout_rate=0.4)
    look = jax.jit(nnx.capture(
        lambda layer, x: layer(x, form=form, sow_weights=True), nnx.Intermediate
    ))  # fmt: skip
    y, found = look(layer, x)
    weights = np.asarray(found["attention_weights"][0], np.float64)
    assert weights.shape == (B, PLAIN.num_attention_heads, T, T)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert (np.triu(weights, 1) == 0).all()
    latent = jax.jit(lambda layer, x: layer.remember(x).latent)(layer, x)
    value = np.einsum("bsr,rnv->bsnv", np.asarray(latent, np.float64), np.asarray(layer.w_uv))
    kernel = np.asarray(layer.o_proj.kernel, np.float64)
    output = lambda weights: np.einsum("bnts,bsnv,nvd->btd", weights, value, kernel)  # noqa: E731
    assert relative(y, output(weights)) < 1e-5
    assert relative(run(layer, x, form=form), y) < 1e-6  # eval is the default

    key = jax.random.key(3)
    layer.train()
    dropped = run(layer, x, form=form, rngs=key)
    kept = np.asarray(jax.random.bernoulli(key, 0.6, weights.shape))
    assert 0.4 < kept.mean() < 0.8
    assert relative(dropped, output(weights * kept / 0.6)) < 1e-5
    assert relative(run(layer, x, form=form, rngs=nnx.Rngs(dropout=1)), dropped) > 1e-2
    assert relative(run(layer, x, form=form, deterministic=True), y) < 1e-6
    layer.eval()
    assert relative(run(layer, x, form=form), y) < 1e-6


def test_what_does_not_go_together_is_refused_by_name(x, states):
    layer = make()
    memory = mla_jax.Memory(jnp.zeros((B, M, 16)), jnp.zeros((B, M, 4)))
    windowed = make(PLAIN.replace(sliding_window=2))
    narrow = mla_jax.Memory(memory.latent[..., 1:], memory.k_rope)
    dropping = make(dropout_rate=0.5)
    cases = [
        (lambda: layer(x, memory=narrow), ValueError, r"memory has latents \(3, 6, 15\)"),
        (lambda: layer(x[:2], memory=memory), ValueError, r"must be \(2, M, 16\) and \(2, M, 4\)"),
        (lambda: layer(x, memory=memory, segment_ids=jnp.zeros((B, T), int)), ValueError,
         "memory goes with no segment_ids"),
        (lambda: windowed(x, memory=memory), ValueError, "memory goes with no sliding_window"),
        (lambda: windowed(x, causal=False), ValueError, "causal=False: sliding_window=2"),
        (lambda: layer(x, memory=memory, mask=jnp.ones((B, 1, T, T), bool)), ValueError,
         r"not broadcastable to \(3, 3, 4, 6\)"),
        (lambda: make(dropout_rate=1), ValueError, "dropout_rate=1: it must be at least 0"),
        (lambda: dropping(x, deterministic=False), ValueError, "rngs=None: dropout_rate=0.5"),
        (lambda: make(dropout_rate=0.5, implementation="xla")(x, deterministic=False,
         rngs=nnx.Rngs(0)), NotImplementedError, "implementation='xla' has no dropout"),
    ]  # fmt: skip
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            jax.eval_shape(call)
    with pytest.raises(ValueError, match=r"lengths=.*each must be between 0 and the 6"):
        layer.remember(states, np.array([7, 1, 1]))  # under jit nothing can be raised
