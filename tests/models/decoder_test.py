"""The decoder against a float64 one in numpy, its mixtures of experts, its presets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import MICRO, PLAIN, drawn, emptied, relative, slow
from flax import nnx
from numpy_decoder import NumpyDecoder

from mla_jax.generation.steps import decode_step, prefill_step
from mla_jax.layers.step import Step
from mla_jax.models import Decoder, DecoderConfig, decoder_presets, random_decoder
from mla_jax.ops import dense

SIGMOID = DecoderConfig(
    attention=PLAIN.replace(num_hidden_layers=2), vocab_size=31, intermediate_size=20,
    moe_intermediate_size=9, n_routed_experts=12, num_experts_per_tok=3, n_shared_experts=2,
    first_k_dense_replace=1, scoring_func="sigmoid", norm_topk_prob=True, n_group=4, topk_group=2,
    routed_scaling_factor=2.5, residual_scale=0.7, embed_scale=3.0, logit_scale=0.5,
    num_nextn_predict_layers=1,
)  # fmt: skip
SOFTMAX = SIGMOID.replace(
    attention=MICRO, first_k_dense_replace=0, scoring_func="softmax", norm_topk_prob=False,
    n_shared_experts=0, tie_word_embeddings=True,
)  # fmt: skip
CONFIGS = {
    "sigmoid": SIGMOID,
    "softmax": SOFTMAX,
    "one sparse layer": SIGMOID.replace(attention=PLAIN, first_k_dense_replace=0),
}


@functools.cache
def make(name, **options):
    model = drawn(lambda: Decoder(CONFIGS[name], precision="highest", rngs=nnx.Rngs(0), **options))
    random = np.random.default_rng(1)
    for path, parameter in nnx.iter_graph(model):
        if isinstance(parameter, nnx.Variable) and (path[-1] in ("scale", "bias")):
            shift = -2.0 if path[-2] == "router" else 1  # negative biases: a masked 0 would win
            noise = 0.2 * random.standard_normal(parameter.shape)
            parameter.set_value(jax.device_put(np.float32(shift + noise)))
    return model


_full = jax.jit(lambda module, given: module(given))
_draft_logits = jax.jit(lambda model, states: model.draft_logits(states))
_draft = jax.jit(lambda model, *arguments: model.draft(*arguments))


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_logits_and_greedy_tokens_are_float64s(name, rng):
    model = make(name)
    exact = NumpyDecoder(model)
    tokens = rng.integers(0, 31, (2, 9))
    expected = np.stack([exact.logits(row) for row in tokens])
    if name == "sigmoid":  # with experts and without: also without a cache
        assert relative(_full(model, np.int32(tokens)), expected) < 2e-6
    logits, cache = prefill_step(
        model, np.int32(tokens[:, :7]), emptied(lambda: model.init_cache(2, 16)), np.int32([7, 4])
    )
    logits = np.asarray(logits)
    assert relative(logits[0], expected[0, :7]) < 2e-6
    assert relative(logits[1, :4], expected[1, :4]) < 2e-6
    rows = [list(tokens[0, :7]), list(tokens[1, :4])]
    for b, t in enumerate((6, 3)):
        rows[b].append(int(logits[b, t].argmax()))
    for _ in range(4):
        logits, cache = decode_step(model, np.int32([[row[-1]] for row in rows]), cache)
        for row, own in zip(rows, np.asarray(logits), strict=True):
            wanted = exact.logits(np.array(row))[-1]
            assert relative(own[0], wanted) < 3e-6
            assert int(own[0].argmax()) == int(wanted.argmax())
            row.append(int(own[0].argmax()))


@pytest.mark.parametrize("name", [slow("sigmoid"), "softmax"])
def test_drafts_are_float64s(name, rng):
    """Ragged prompts in two chunks, then two positions at once, then one after its own state.

    A chunk has room for four: two positions are the program of the prompts.
    """
    model = make(name, mtp=True)
    exact = NumpyDecoder(model)
    tokens = rng.integers(0, 31, (2, 10))
    hidden = np.stack([exact.hidden(row) for row in tokens])
    expected = np.stack(
        [exact.draft(h[:-1], row[1:]) for h, row in zip(hidden, tokens, strict=True)]
    )
    cache = emptied(lambda: model.init_draft_cache(2, 16))
    held = np.zeros(2, int)
    for lengths in ([4, 3], [3, 0], [2, 2]):
        at = np.minimum(held[:, None] + np.arange(4), 8)  # what is behind the end is padding
        part, following = (
            np.take_along_axis(hidden, at[..., None], 1),
            np.take_along_axis(tokens, at + 1, 1),
        )
        states, cache = _draft(
            model, np.float32(part), np.int32(following), cache, np.int32(lengths)
        )
        states = np.asarray(states)
        for b, count in enumerate(lengths):
            own = expected[b, held[b] : held[b] + count]
            assert not count or relative(states[b, :count], own) < 3e-6
        held += lengths
    last, rows = held - 1, np.arange(2)
    logits = np.asarray(_draft_logits(model, states[:, 1:2]))
    assert relative(logits[:, 0], exact.draft_logits(expected[rows, last])) < 3e-6
    following = logits.argmax(-1)
    states, cache = _draft(model, states[:, 1:2], np.int32(following), cache, None)
    for b, at in enumerate(last):
        own = np.concatenate([hidden[b, : at + 1], expected[b, at : at + 1]])
        text = [*tokens[b, 1 : at + 2], int(following[b, 0])]
        assert relative(np.asarray(states)[b, 0], exact.draft(own, text)[-1]) < 3e-6
    assert exact.guesses(tokens[0, : last[0] + 2], 1) == [int(following[0, 0])]


@pytest.mark.parametrize(
    ("tokens", "name"),
    [(1, "sigmoid"), slow(1, "softmax"), slow(2, "sigmoid"), (2, "softmax"), (40, "sigmoid"),
     slow(40, "softmax"), slow(300, "sigmoid"), (300, "softmax")],
)  # fmt: skip
def test_a_mixture_is_float64s(tokens, name, rng):
    mlp, exact = make(name).blocks[-1].mlp, NumpyDecoder(make(name))
    x = rng.standard_normal((1, tokens, 24)).astype(np.float32)
    weights = exact.weights["blocks"][len(exact.weights["blocks"]) - 1]["mlp"]
    expected = np.stack([exact.experts(weights, row) for row in x[0].astype(np.float64)])
    assert relative(_full(mlp, x)[0], expected) < 2e-6


def test_many_tokens_do_not_multiply_memory():
    """What `lax.ragged_dot` costs where it is not native: activations once per expert."""
    config = SOFTMAX.replace(n_routed_experts=64, n_group=1, topk_group=1)
    mlp = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)).blocks[0].mlp)
    x = jax.ShapeDtypeStruct((1, 8192, 24), jnp.float32)
    memory = jax.jit(lambda mlp, x: mlp(x)).lower(mlp, x).compile().memory_analysis()
    pairs = 4 * 8192 * 3 * 24  # bytes of every token once per chosen expert
    assert memory.temp_size_in_bytes < 12 * pairs


def test_the_router_is_float32_in_a_bfloat16_model():
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model = nnx.eval_shape(lambda: Decoder(SIGMOID, **types, rngs=nnx.Rngs(0)))
    mlp = model.blocks[1].mlp
    assert mlp.router.kernel.dtype == jnp.float32
    assert mlp.gate_proj.dtype == jnp.bfloat16
    x = jax.ShapeDtypeStruct((1, 5, 24), jnp.bfloat16)
    routed, y = jax.eval_shape(lambda mlp, x: (mlp.router(x[0])[1], mlp(x)), mlp, x)
    assert (routed.dtype, y.dtype) == (jnp.float32, jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    assert jax.eval_shape(lambda model, x: model(x), model, tokens).dtype == jnp.float32


def shapes(config, **options):
    """The shapes of a model of one layer of each kind, and how many it has of the first and last.

    Those that lack an indexer come behind one that has it, as often.
    """
    sparse = [config.is_sparse(n) for n in range(config.attention.num_hidden_layers)]
    kinds = len(set(sparse))
    types = config.indexer_types and config.indexer_types[:kinds]
    few = config.replace(
        attention=config.attention.replace(num_hidden_layers=kinds), indexer_types=types,
        first_k_dense_replace=min(kinds - 1, config.first_k_dense_replace),
    )  # fmt: skip
    model = nnx.eval_shape(lambda: Decoder(few, rngs=nnx.Rngs(0), **options))
    return model, sparse.count(sparse[0]) - 1, sparse.count(sparse[-1]) - 1 if kinds > 1 else 0


def size(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def test_presets_have_the_parameters_that_their_names_say():
    billions = {"deepseek_v2": 235.7, "deepseek_v2_lite": 15.7, "deepseek_v3": 671.0,
                "kimi_k2_0711": 1026, "moonlight": 16.0, "glm_4_7_flash": 29.9,
                "minicpm3": 4.07, "youtu_2b": 1.96, "tiny": 0.0, "longcat_flash": 560,
                "deepseek_v32": 671.9, "glm_5": 744, "glm_5_2": 744}  # fmt: skip
    assert set(decoder_presets()) == set(billions)
    for name, expected in billions.items():
        model, first, last = shapes(DecoderConfig.from_preset(name), mtp=name == "deepseek_v3")
        count = size(model) + first * size(model.blocks[0]) + last * size(model.blocks[-1])
        if model.predictor is not None:
            assert size(model.predictor) / 1e9 == pytest.approx(11.5, rel=0.01)  # as published
            count -= size(model.predictor)
        assert count / 1e9 == pytest.approx(expected, rel=0.01, abs=0.002)
    with pytest.raises(ValueError, match="'axk1' describes the attention only; whole models: deep"):
        DecoderConfig.from_preset("axk1")


def test_bad_input():
    model = make("softmax")
    with pytest.raises(ValueError, match="tokens is float32"):
        model(jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"cache has 1 stores of 2 rows: .* the tokens 1 rows"):
        model.decode(jnp.zeros((1, 1), jnp.int32), model.init_cache(2, 4))
    with pytest.raises(ValueError, match="no block for multi-token prediction: make it with mtp"):
        model.init_draft_cache(1, 4)
    for count in (0, 2):
        config = SOFTMAX.replace(num_nextn_predict_layers=count)
        with pytest.raises(ValueError, match=f"num_nextn_predict_layers={count}: mtp needs"):
            Decoder(config, mtp=True, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("dense", [0, 1, 2, 3])
def test_random_weights_have_the_models_shapes(dense):
    config = DecoderConfig.from_preset("tiny").replace(first_k_dense_replace=dense)
    config = config.replace(attention=config.attention.replace(num_hidden_layers=2))
    # A leaf that no program makes would be no array, which a traced function cannot return.
    made = jax.eval_shape(lambda: random_decoder(config, mtp=True))
    model = nnx.eval_shape(lambda: Decoder(config, mtp=True, rngs=nnx.Rngs(0)))
    flat = [nnx.to_flat_state(nnx.state(m)) for m in (made, model)]  # the routers' biases too
    assert flat[0].paths == flat[1].paths
    for ours, theirs in zip(flat[0].leaves, flat[1].leaves, strict=True):
        assert ours.shape == theirs.shape


def test_random_weights_are_like_the_constructors():
    config = DecoderConfig.from_preset("tiny")
    attention = config.attention.replace(num_hidden_layers=1)
    config = config.replace(attention=attention, first_k_dense_replace=0)  # experts, and an MLP
    made = random_decoder(config, param_dtype=jnp.bfloat16)
    key = jax.random.key(1)
    model = jax.jit(lambda key: Decoder(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(key)))(key)
    flat = [nnx.to_flat_state(nnx.state(m)) for m in (made, model)]
    assert flat[0].paths == flat[1].paths
    for ours, theirs in zip(flat[0].leaves, flat[1].leaves, strict=True):
        assert isinstance(ours[...], jax.Array)
        assert (type(ours), ours.shape, ours.dtype) == (type(theirs), theirs.shape, theirs.dtype)
        a, b = (float(np.float32(np.asarray(leaf[...])).std()) for leaf in (ours, theirs))
        assert a == pytest.approx(b, rel=0.15)


@pytest.mark.parametrize("token", [-1, -100, 31, 2**31 - 1])
def test_a_token_that_does_not_exist_never_gives_numbers(token):
    model = make("sigmoid")
    words = np.arange(18, dtype=np.int32).reshape(2, 9)
    words[0, 1] = token
    tokens = jax.device_put(words)
    with pytest.raises(ValueError, match=f"tokens has {token}: the model has 31 words"):
        model(tokens)
    with pytest.raises(ValueError, match=f"tokens has {token}"):
        model.prefill(tokens, emptied(lambda: model.init_cache(2, 16)))
    logits = np.asarray(_full(model, tokens))
    assert np.isnan(logits[0, 1:]).all()
    assert np.isfinite(logits[1]).all()  # another row


@pytest.mark.parametrize(
    ("form", "counted"),
    [("absorbed", True), ("expanded", False), slow("absorbed", False), slow("expanded", True)],
)
def test_a_single_row_may_be_carried_as_equal_ones(form, counted, rng, monkeypatch):
    """As on a GPU: the cache and the states are those of one row, the drop of a token included."""
    model = make("one sparse layer")
    begin = Step.begin
    monkeypatch.setattr(Step, "begin", lambda *given: begin(*given, form=form))
    cache = emptied(lambda: model.init_cache(1, 8))
    draw = lambda held: rng.standard_normal(held.shape).astype(np.float32)  # noqa: E731
    cache = cache.replace(stores=jax.tree.map(draw, cache.stores), length=np.int32([5]))
    tokens, one = np.int32(rng.integers(0, 31, (1, 1))), np.ones(1, np.int32)

    def steps():
        extend = jax.jit(lambda *given: model.extend(*given))
        counts = (one, one * 0) if counted else (None,)  # None is another program
        return [extend(tokens, cache, count) for count in counts]

    alone = steps()
    monkeypatch.setattr(dense, "copies", lambda x: 8)
    carried = steps()
    for (x, after), (y, grown) in zip(alone[:1], carried[:1], strict=True):
        assert y.shape == (1, 1, 24)
        assert relative(y, x) < 2e-6
        for held, other in zip(
            jax.tree.leaves(grown.stores), jax.tree.leaves(after.stores), strict=True
        ):
            assert relative(held, other) < 2e-6
    assert carried[0][1].length.tolist() == [6]
    assert not counted or carried[1][1].length.tolist() == [5]


@pytest.mark.parametrize(("tokens", "sum_"), [(1, 0.0), (2, 2.0**-25)])
def test_a_decode_step_adds_what_attention_gives_last(tokens, sum_, monkeypatch):
    """Then the sum before the MLP has one reader. 1 + 2^-25 is 1 in float32, and 1 - 1 is 0."""
    model, full = make("sigmoid"), functools.partial(jnp.full, (1, tokens, 24))
    block, cache, given = model.blocks[1], model.init_cache(1, 4), []

    def mlp(self, h):
        given.append(h)
        return full(2.0**-25)

    attention = lambda self, x, store, step, relay: (full(-1.0), store, relay)  # noqa: E731
    monkeypatch.setattr(block, "scale", 1)
    monkeypatch.setattr(type(block.attention), "extend", attention)
    monkeypatch.setattr(type(block.mlp), "__call__", mlp)
    step = Step.begin(cache, tokens)
    assert (block.extend(full(1.0), cache.stores[1:2], step)[0] == sum_).all()
    np.testing.assert_array_equal(given[0], block.mlp_norm(full(0.0)))
