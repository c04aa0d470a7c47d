"""The router and its bias, the balance of the load, and the mixture as a layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import PLAIN, drawn, relative
from flax import nnx

import mla_jax
from mla_jax import target
from mla_jax.layers.experts import (
    MixtureOfExperts,
    balance_bias,
    expert_load,
    sequence_balance_loss,
)
from mla_jax.layers.router import Router, SelectionBias
from mla_jax.models import DecoderConfig
from mla_jax.models.rounding import round_weights
from mla_jax.ops.experts import xla
from mla_jax.ops.hopper.order import in_order

CONFIG = DecoderConfig(
    attention=PLAIN, moe_intermediate_size=9, n_routed_experts=8, num_experts_per_tok=2,
    n_shared_experts=1, scoring_func="sigmoid", norm_topk_prob=True,
)  # fmt: skip


def test_the_bias_shifts_the_choice_but_not_the_weights(rng):
    router = drawn(lambda: Router(CONFIG.replace(norm_topk_prob=False), rngs=nnx.Rngs(0)))
    x = jnp.asarray(rng.standard_normal((5, 24)), jnp.float32)
    router.bias.set_value(router.bias[...].at[6].set(2.0))
    (experts, weights), scores = jax.jit(lambda router, x: (router(x), router.scores(x)))(router, x)
    assert (np.asarray(experts) == 6).any(1).all()
    expected = 1 / (1 + np.exp(-np.asarray(x, np.float64) @ np.asarray(router.kernel, np.float64)))
    assert relative(weights, np.take_along_axis(expected, np.asarray(experts), 1)) < 1e-6
    first = np.asarray(scores)[np.arange(5), experts[:, 0]]
    np.testing.assert_array_equal(first, weights[:, 0])


def test_a_bound_router_takes_tokens_in_the_order_that_the_experts_ask_for(rng, monkeypatch):
    """That of kernels for few tokens. For more, and unbound, they come as they are."""
    widths = PLAIN.replace(hidden_size=256)
    config = CONFIG.replace(attention=widths, moe_intermediate_size=128)
    layer = drawn(lambda: MixtureOfExperts(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    round_weights(layer, "float8_e4m3fn")
    monkeypatch.setattr(target, "current", lambda: target.Target("gpu", "NVIDIA H200", 9.0, 132))
    bound = mla_jax.bind(layer).model
    np.testing.assert_array_equal(
        bound.router.kept_kernel[...], in_order(layer.router.kernel[...].T, 128).T
    )
    x = jnp.asarray(rng.standard_normal((3, 256)), jnp.bfloat16)
    made = bound.router.scores(x, 128)
    np.testing.assert_allclose(made, layer.router.scores(x), rtol=1e-5)
    rows, scores = [], Router.scores

    def spy(self, x, row=None):
        rows.append(row)
        return scores(self, x, row)

    monkeypatch.setattr(Router, "scores", spy)
    for each, tokens in ((bound, 64), (bound, 65), (layer, 64)):
        jax.eval_shape(each, jax.ShapeDtypeStruct((tokens, 1, 256), jnp.bfloat16))
    assert rows == [128, None, None]


def test_an_optimizer_of_parameters_leaves_the_bias_alone(rng):
    """Weight decay moves every `nnx.Param`, whatever its gradient."""
    layer = drawn(lambda: MixtureOfExperts(CONFIG, rngs=nnx.Rngs(0)))
    start = jnp.asarray(rng.standard_normal(8), jnp.float32)
    layer.router.bias.set_value(start)
    kernel = layer.router.kernel[...]
    optimizer = nnx.Optimizer(layer, optax.adamw(1e-2, weight_decay=0.1), wrt=nnx.Param)
    x = jnp.asarray(rng.standard_normal((1, 6, 24)), jnp.float32)

    @nnx.jit
    def step(layer, optimizer):
        optimizer.update(layer, nnx.grad(lambda layer: (layer(x) ** 2).sum())(layer))

    for _ in range(3):
        step(layer, optimizer)
    np.testing.assert_array_equal(layer.router.bias[...], start)
    assert relative(layer.router.kernel[...], kernel) > 1e-3
    assert isinstance(layer.router.bias, SelectionBias)
    assert not isinstance(layer.router.bias, nnx.Param)
    assert set(nnx.to_flat_state(nnx.state(layer, SelectionBias)).paths) == {("router", "bias")}


def test_the_bias_balances_a_router_that_prefers_some_experts(rng):
    """Scores as captured in training, the load of each step, and the published rule."""
    layer = drawn(lambda: MixtureOfExperts(CONFIG, rngs=nnx.Rngs(0)))
    lean = jnp.zeros((24, 8)).at[:, :2].set(0.15)  # experts 0 and 1 win on inputs of mean 1
    layer.router.kernel.set_value(0.05 * layer.router.kernel[...] + lean)
    x = jnp.asarray(1 + rng.standard_normal((4, 64, 24)), jnp.float32)

    @jax.jit
    def step(layer):
        forward = nnx.capture(lambda layer: layer(x), nnx.Intermediate,
                              method_outputs=nnx.Intermediate)  # fmt: skip
        router = forward(layer)[1]["router"]
        experts, *_ = router["route"][0]
        return expert_load(experts, 8), router["scores"][0]

    loads = []
    for rate in [5e-3] * 150 + [5e-4] * 100:  # the last steps are too small to swing the choice
        load, scores = step(layer)
        loads.append(np.asarray(load))
        layer.router.bias.set_value(balance_bias(layer.router.bias[...], load, rate=rate))
    assert scores.shape == (256, 8)
    assert loads[0].sum() == loads[-1].sum() == 4 * 64 * 2
    assert loads[0].max() > 3 * 64  # the mean is 64
    assert max(load.max() for load in loads[-10:]) < 1.4 * 64


def test_load_counts_tokens_that_count():
    experts = jnp.array([[[0, 1], [1, 2]], [[1, 3], [0, 3]]])
    assert expert_load(experts, 5).tolist() == [2, 3, 1, 2, 0]
    valid = jnp.array([[True, False], [True, True]])
    assert expert_load(experts, 5, valid=valid).tolist() == [2, 2, 0, 2, 0]


def test_balance_bias_refuses_what_cannot_be():
    with pytest.raises(ValueError, match=r"load has shape \(4,\): it must be \[E\] = \(3,\)"):
        balance_bias(jnp.zeros(3), jnp.zeros(4))
    with pytest.raises(ValueError, match="rate=-1: it must not be negative"):
        balance_bias(jnp.zeros(3), jnp.zeros(3), rate=-1)
    assert balance_bias(jnp.zeros(4), jnp.array([0, 4, 0, 4])).tolist() == pytest.approx(
        [1e-3, -1e-3, 1e-3, -1e-3]
    )


def test_sequence_balance_loss_is_the_papers(rng):
    """Equations 17 to 20 as loops; padding counts for nothing; gradients through P only."""
    batch, tokens, count, chosen = 3, 7, 6, 2
    scores = rng.uniform(0.05, 1, (batch, tokens, count))
    experts = np.argsort(-scores, -1)[..., :chosen]
    lengths = [7, 4, 0]
    losses = []
    for b, length in enumerate(lengths[:2]):
        total = 0.0
        for i in range(count):
            f = count / (chosen * length) * sum(i in experts[b, t] for t in range(length))
            p = sum(scores[b, t, i] / scores[b, t].sum() for t in range(length)) / length
            total += f * p
        losses.append(total)
    valid = jnp.arange(tokens)[None] < jnp.array(lengths)[:, None]
    padded = jnp.asarray(np.where(valid[..., None], scores, np.nan), jnp.float32)
    loss = jax.jit(sequence_balance_loss)
    found = loss(padded, jnp.asarray(experts), valid=valid)
    assert float(found) == pytest.approx(np.mean(losses), rel=1e-6)
    own = jnp.asarray(scores, jnp.float32)
    one = loss(own[:1], jnp.asarray(experts[:1]))
    assert float(one) == pytest.approx(losses[0], rel=1e-6)
    slope = np.asarray(jax.jit(jax.grad(sequence_balance_loss))(own, experts, valid=valid))
    assert np.isfinite(slope).all()
    assert (slope[2] == 0).all()
    assert np.abs((slope * np.asarray(own)).sum(-1)).max() < 1e-6  # P does not see a token's scale
    assert np.abs(slope).max() > 1e-2
    with pytest.raises(ValueError, match=r"must be \[B T E\] and \[B T K\]"):
        sequence_balance_loss(own[0], jnp.asarray(experts[0]))


def test_a_mixture_names_what_it_lacks_and_what_cannot_serve():
    with pytest.raises(ValueError, match="n_routed_experts=None: a mixture of experts needs both"):
        MixtureOfExperts(CONFIG.replace(n_routed_experts=None), rngs=nnx.Rngs(0))
    layer = drawn(lambda: MixtureOfExperts(CONFIG, implementation="pallas_gpu", rngs=nnx.Rngs(0)))
    with pytest.raises(NotImplementedError, match="'pallas_gpu' cannot serve these experts: needs"):
        layer(jnp.ones((1, 3, 24)))


def test_the_computations_dtype_is_the_layers():
    def run(**types):
        layer = MixtureOfExperts(CONFIG, rngs=nnx.Rngs(0), **types)
        return layer, layer(jnp.zeros((2, 5, 24), jnp.bfloat16))

    shapes = lambda **types: nnx.eval_shape(lambda: run(**types))  # noqa: E731
    assert shapes()[1].dtype == jnp.float32
    layer, y = shapes(dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    assert layer.gate_proj.dtype == jnp.float32
    half, _ = shapes(param_dtype=jnp.bfloat16)
    assert half.gate_proj.dtype == jnp.bfloat16
    assert half.router.kernel.dtype == half.router.bias.dtype == jnp.float32


def test_training_goes_alike_by_every_way(rng, monkeypatch):
    """The losses of twenty steps of a tiny mixture, its router included."""
    x = jnp.asarray(rng.standard_normal((2, 20, 24)), jnp.float32)
    goal = jnp.asarray(rng.standard_normal((2, 20, 24)), jnp.float32)

    def curve(way):
        monkeypatch.setattr(xla, "way", lambda call: way)
        layer = drawn(lambda: MixtureOfExperts(CONFIG, precision="highest", rngs=nnx.Rngs(0)))
        optimizer = nnx.Optimizer(layer, optax.adam(3e-3), wrt=nnx.Param)

        @nnx.jit
        def step(layer, optimizer):
            value, slopes = nnx.value_and_grad(lambda layer: ((layer(x) - goal) ** 2).mean())(layer)
            optimizer.update(layer, slopes)
            return value

        return [float(step(layer, optimizer)) for _ in range(20)]

    first, *others = (curve(way) for way in ("by_pair", "all_experts", "by_block"))
    assert first[-1] < 0.95 * first[0]
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-5)
