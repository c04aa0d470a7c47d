"""What a decoder is trained on: each term against its definition, packed texts, and the biases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import PLAIN, relative
from flax import nnx
from jax.flatten_util import ravel_pytree

from mla_jax.layers.experts import SelectionBias
from mla_jax.models import Decoder, DecoderConfig, training_loss
from mla_jax.ops.experts import xla

WORDS, E, K = 31, 4, 2
CONFIG = DecoderConfig(
    attention=PLAIN.replace(num_hidden_layers=2), vocab_size=WORDS, intermediate_size=20,
    moe_intermediate_size=9, n_routed_experts=E, num_experts_per_tok=K, first_k_dense_replace=1,
    scoring_func="sigmoid", norm_topk_prob=True, num_nextn_predict_layers=1, logit_scale=0.8,
)  # fmt: skip
GRAPH, PARAMS, REST = nnx.split(Decoder(CONFIG, mtp=True, rngs=nnx.Rngs(0)), nnx.Param, ...)


@functools.partial(jax.jit, static_argnames=("remat", "chunk", "way"))
def step(params, tokens, remat=None, chunk=2048, way=None, **options):
    """Loss, terms and gradients; `way` only makes a program of its own."""

    def loss(params):
        model = nnx.merge(GRAPH, params, REST)
        return training_loss(model, tokens, remat=remat, chunk=chunk, **options)

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.fixture
def tokens(rng):
    return jnp.asarray(rng.integers(0, WORDS, (2, 9)), jnp.int32)


def test_terms_are_what_they_say(tokens):
    """By the model's logits, the cached predictor, and the router's outputs as captured."""
    (loss, terms), _ = step(PARAMS, tokens, chunk=5)
    model = nnx.merge(GRAPH, PARAMS, REST)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    hidden, _ = model.extend(tokens[:, :-1], model.init_cache(2, 9))
    next_token = cross_entropy(model.logits(hidden), tokens[:, 1:]).mean()
    assert float(terms.next_token) == pytest.approx(float(next_token), rel=1e-5)
    states, _ = model.draft(hidden[:, :-1], tokens[:, 1:-1], model.init_draft_cache(2, 9))
    draft = cross_entropy(model.draft_logits(states), tokens[:, 2:]).mean()
    assert float(terms.draft) == pytest.approx(float(draft), rel=1e-5)
    assert terms.load.shape == (2, E)
    assert terms.load.sum(1).tolist() == [2 * 8 * K] * 2
    assert K / E <= float(terms.balance) / 2 < E / K
    expected = next_token + 0.3 * draft + 1e-4 * terms.balance
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_packed_texts_are_as_they_are_alone(rng):
    """Two texts and padding in one row; no loss is of a token that begins another text."""
    lengths, padding = (5, 4), 2
    texts = [rng.integers(0, WORDS, length) for length in lengths]
    row = jnp.asarray(np.concatenate([*texts, np.zeros(padding, int)])[None], jnp.int32)
    segments = jnp.asarray(np.repeat([1, 2, 3], (*lengths, padding))[None], jnp.int32)
    (_, terms), slopes = step(PARAMS, row, segment_ids=segments, valid=segments < 3)
    counts, drafts, totals = [4, 3], [3, 2], np.zeros(2)
    load = np.zeros((2, E), int)
    model = nnx.merge(GRAPH, PARAMS, REST)
    for text, *weights in zip(texts, counts, drafts, strict=True):
        alone = jnp.asarray(text[None], jnp.int32)
        _, own = training_loss(model, alone)
        totals += np.array([own.next_token, own.draft], np.float64) * weights
    assert float(terms.next_token) == pytest.approx(totals[0] / sum(counts), rel=1e-5)
    assert float(terms.draft) == pytest.approx(totals[1] / sum(drafts), rel=1e-5)
    assert terms.load.sum(1).tolist() == [sum(lengths) * K] * 2
    assert bool(jnp.isfinite(ravel_pytree(slopes)[0]).all())


@pytest.mark.parametrize("way", ["by_pair", "by_block"])
def test_training_goes_alike_by_every_way(tokens, way, monkeypatch):
    """Ten steps of adam: experts by pair or by block, rematerialised or not, chunked or not."""

    def curve(way, **options):
        monkeypatch.setattr(xla, "way", lambda call: way)
        optimizer = optax.adam(3e-3)
        update = jax.jit(optimizer.update)
        params, state, losses = PARAMS, optimizer.init(PARAMS), []
        for _ in range(10):
            (loss, _), slopes = step(params, tokens, way=way, **options)
            updates, state = update(slopes, state)
            params = optax.apply_updates(params, updates)
            losses.append(float(loss))
        return losses

    expected = curve("all_experts")
    assert expected[-1] < 0.9 * expected[0]
    np.testing.assert_allclose(curve(way, remat="latents", chunk=3), expected, rtol=1e-5)


def test_biases_move_by_the_load_of_their_own_layer():
    model = nnx.merge(GRAPH, PARAMS, REST)
    load = jnp.array([[9, 0, 3, 4], [0, 8, 4, 4]])
    model.balance(load, rate=0.5)
    biases = [router[...].tolist() for router in jax.tree.leaves(
        nnx.state(model, SelectionBias), is_leaf=lambda x: isinstance(x, nnx.Variable))]  # fmt: skip
    assert biases == [[-0.5, 0.5, 0.5, 0.0], [0.5, -0.5, 0.0, 0.0]]
    with pytest.raises(ValueError, match="load has 1 rows, scoring_func='sigmoid': the model has"):
        model.balance(load[:1])
    softmax = Decoder(CONFIG.replace(scoring_func="softmax"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="scoring_func='softmax'"):
        softmax.balance(load[:1])


def test_a_model_without_experts_and_predictor_has_its_one_term(tokens):
    model = Decoder(CONFIG.replace(n_routed_experts=None), rngs=nnx.Rngs(0))
    loss, terms = training_loss(model, tokens)
    assert terms.draft is terms.balance is terms.load is None
    assert loss is terms.next_token
    logits = model(tokens[:, :-1])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    assert relative(loss, expected) < 1e-5


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 2), {}, r"tokens has shape \(2, 2\): it must be \[B T\] with T >= 3"),
        ((2, 5), {"valid": jnp.ones((2, 4), bool)}, r"valid has shape \(2, 4\)"),
        ((2, 5), {"segment_ids": jnp.ones((5,), int)}, r"segment_ids has shape \(5,\)"),
        ((2, 5), {"remat": "some"}, "save='some'"),
    ],
    ids=["tokens", "valid", "segments", "remat"],
)
def test_bad_arguments_are_named(shape, options, message):
    model = nnx.merge(GRAPH, PARAMS, REST)
    with pytest.raises(ValueError, match=message):
        training_loss(model, jnp.zeros(shape, jnp.int32), **options)
