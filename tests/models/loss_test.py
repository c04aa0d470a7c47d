"""What a decoder is trained on: each term against its definition, packed texts, and the biases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import PLAIN, drawn, relative
from flax import nnx
from jax.flatten_util import ravel_pytree
from numpy_decoder import NumpyDecoder

from mla_jax.layers.router import SelectionBias
from mla_jax.models import Decoder, DecoderConfig, training_loss
from mla_jax.ops.experts import xla

WORDS, E, K, B, T = 31, 4, 2, 2, 11
CONFIG = DecoderConfig(
    attention=PLAIN.replace(num_hidden_layers=1), vocab_size=WORDS, moe_intermediate_size=9,
    n_routed_experts=E, num_experts_per_tok=K, scoring_func="sigmoid", norm_topk_prob=True,
    num_nextn_predict_layers=1, logit_scale=0.8,
)  # fmt: skip
# A sixth of a second for a program that runs a few times costs more than it saves.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make(config=CONFIG, **options):
    model = drawn(lambda: Decoder(config, rngs=nnx.Rngs(0), **options))
    return nnx.split(model, nnx.Param, ...)


GRAPH, PARAMS, REST = make(mtp=True)
WHOLE = jnp.zeros((B, T), jnp.int32)  # one segment, no padding


@functools.partial(quick, static_argnames=("remat", "chunk", "way"))
def program(params, tokens, segment_ids, valid, *, way, **options):
    del way  # it makes a program of its own

    def loss(params):
        model = nnx.merge(GRAPH, params, REST)
        return training_loss(model, tokens, segment_ids=segment_ids, valid=valid, **options)

    return jax.value_and_grad(loss, has_aux=True)(params)


def step(params, tokens, segment_ids=WHOLE, valid=WHOLE == 0, **options):
    """Loss, terms and gradients."""
    options = {"remat": None, "chunk": 5, "way": "all_experts"} | options
    return program(params, tokens, segment_ids, valid, **options)


@pytest.fixture
def tokens(rng):
    return jnp.asarray(rng.integers(0, WORDS, (B, T)), jnp.int32)


def test_terms_are_what_they_say(tokens):
    """By the logits of the model and of the predictor, in float64."""
    (loss, terms), _ = step(PARAMS, tokens)
    exact = NumpyDecoder(nnx.merge(GRAPH, PARAMS, REST))

    def cross_entropy(logits, labels):
        of_labels = np.take_along_axis(logits, np.asarray(labels)[:, None], -1)[:, 0]
        return (np.log(np.exp(logits).sum(-1)) - of_labels).mean()

    next_tokens, drafts = [], []
    for row in np.asarray(tokens):
        hidden = exact.hidden(row[:-1])
        next_tokens.append(cross_entropy(exact.head(hidden, exact.weights), row[1:]))
        states = exact.draft(hidden[:-1], row[1:-1])
        drafts.append(cross_entropy(exact.draft_logits(states), row[2:]))
    next_token, draft = np.mean(next_tokens), np.mean(drafts)
    assert float(terms.next_token) == pytest.approx(next_token, rel=1e-5)
    assert float(terms.draft) == pytest.approx(draft, rel=1e-5)
    assert terms.load.sum(1).tolist() == [B * (T - 1) * K] * 2
    # An even load gives 1 a layer, and one expert with every token E / K.
    assert 1 < float(terms.balance) / 2 < E / K
    assert float(loss) == pytest.approx(next_token + 0.3 * draft + 1e-4 * float(terms.balance))


def test_packed_texts_are_as_they_are_alone(rng):
    """No loss is of a token that begins another text, and padding does not count."""
    lengths = (6, 5, 7)
    texts = [rng.integers(0, WORDS, length) for length in lengths]

    def rows(*packed):
        segments = np.full((B, T), -1)
        tokens = np.zeros((B, T), np.int32)
        for row, members in enumerate(packed):
            place = 0
            for member in members:
                here = slice(place, place := place + lengths[member])
                tokens[row, here], segments[row, here] = texts[member], member
        return jnp.asarray(tokens), jnp.asarray(segments, jnp.int32), jnp.asarray(segments >= 0)

    (_, packed), slopes = step(PARAMS, *rows([0, 1], [2]))
    alone = [step(PARAMS, *rows([member], []))[0][1] for member in range(3)]
    counts, drafts = np.array(lengths) - 1, np.array(lengths) - 2
    for name, weights in (("next_token", counts), ("draft", drafts)):
        own = np.array([getattr(terms, name) for terms in alone], np.float64)
        mean = (own * weights).sum() / weights.sum()
        assert float(getattr(packed, name)) == pytest.approx(mean, rel=1e-5)
    # A row's last token is not read: here it is the last text's but one, and padding's.
    assert packed.load.sum(1).tolist() == [(sum(lengths) - 1) * K] * 2
    assert bool(jnp.isfinite(ravel_pytree(slopes)[0]).all())


def test_micro_batches_add_up(tokens):
    """The mean of their losses, gradients and balance, and the sum of their loads."""
    (loss, terms), slopes = step(PARAMS, tokens)
    parts = [step(PARAMS, jnp.stack([row] * B)) for row in tokens]
    assert float(loss) == pytest.approx(np.mean([float(value) for (value, _), _ in parts]))
    mean = sum(ravel_pytree(own)[0] for _, own in parts) / B
    assert relative(mean, ravel_pytree(slopes)[0]) < 1e-5
    loads = sum(own.load for (_, own), _ in parts)
    np.testing.assert_array_equal(loads, B * terms.load)


@pytest.mark.slow
@pytest.mark.parametrize(
    "other", [{"way": "by_block", "remat": "latents", "chunk": 2048}, {"way": "by_pair"}], ids=str
)
def test_training_goes_alike_by_every_way(other, tokens, monkeypatch):
    """Ten steps of adam: experts each way, rematerialised or not, logits chunked or not."""
    optimizer = optax.adam(3e-3)

    @quick
    def update(params, state, slopes):
        updates, state = optimizer.update(slopes, state)
        return optax.apply_updates(params, updates), state

    begin = quick(optimizer.init)

    def curve(**options):
        monkeypatch.setattr(xla, "way", lambda call: options.get("way", "all_experts"))
        params, state, losses = PARAMS, begin(PARAMS), []
        for _ in range(10):
            (loss, _), slopes = step(params, tokens, **options)
            params, state = update(params, state, slopes)
            losses.append(float(loss))
        return losses

    expected = curve()
    assert expected[-1] < 0.95 * expected[0]
    np.testing.assert_allclose(curve(**other), expected, rtol=1e-5)


def test_biases_move_by_the_load_of_their_own_layer():
    model = nnx.merge(GRAPH, PARAMS, REST)
    load = jnp.array([[9, 0, 3, 4], [0, 8, 4, 4]])
    model.balance(load, rate=0.5)
    biases = [bias.tolist() for bias in jax.tree.leaves(nnx.state(model, SelectionBias))]
    assert biases == [[-0.5, 0.5, 0.5, 0.0], [0.5, -0.5, 0.0, 0.0]]
    with pytest.raises(ValueError, match="load has 1 rows: this model has 2 routers with a bias"):
        model.balance(load[:1])
    softmax = nnx.eval_shape(
        lambda: Decoder(CONFIG.replace(scoring_func="softmax"), rngs=nnx.Rngs(0))
    )
    with pytest.raises(ValueError, match="routers without a bias"):
        softmax.balance(load[:1])


def test_a_model_without_experts_and_predictor_has_its_one_term(tokens):
    graph, params, rest = make(CONFIG.replace(n_routed_experts=None))

    @quick
    def both(params):
        model = nnx.merge(graph, params, rest)
        loss, terms = training_loss(model, tokens)
        assert terms.draft is terms.balance is terms.load is None
        assert loss is terms.next_token
        logits = model(tokens[:, :-1])
        return loss, optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    assert relative(*both(params)) < 1e-5


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
