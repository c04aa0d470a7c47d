"""The kernels of a router's choice, interpreted on the CPU, against `lax.top_k` and `tiles`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import drawn, slow
from flax import nnx
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.layers.experts import MixtureOfExperts
from mla_jax.layers.router import Router
from mla_jax.models import DecoderConfig
from mla_jax.ops.experts import choice, choose, hopper, route, tiles

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)


def check_table(made, experts, groups):
    """All that `chosen_experts` says, and as much behind it as the kernels say."""
    right = tiles.chosen_experts(experts, groups)
    used = int(right.rank[-1])
    np.testing.assert_array_equal(made.rank[:groups], right.rank[:-1])
    np.testing.assert_array_equal(made.rank[groups:], used)
    assert made.rank.size > groups
    np.testing.assert_array_equal(made.owner[:used], right.owner[:used])
    assert made.owner.size >= right.owner.size
    assert not np.asarray(made.arrivals).any()
    assert not np.asarray(right.arrivals).any()
    assert (np.asarray(made.owner) < groups).all()


@pytest.mark.parametrize(
    ("tokens", "count", "groups"), [(5, 5, 160), slow(1, 3, 20), slow(8, 6, 64), slow(64, 8, 512)]
)
def test_the_table_of_a_choice(tokens, count, groups, rng):
    """The last pair, and some others, name no expert: their number is E."""
    experts = jnp.asarray(rng.integers(0, groups + 1, (tokens, count)), jnp.int32)
    experts = experts.at[-1, -1].set(groups)
    made = choice.chosen_experts(experts, groups, interpret=INTERPRET)
    check_table(jax.block_until_ready(made), experts, groups)


def awkward(tokens, groups, rng):
    """Scores with ties, infinities and NaN of both signs, in rows of their own and together."""
    scores = rng.integers(-3, 4, (tokens, groups)).astype(np.float32)
    scores[0] = 0.5
    if tokens > 1:
        scores[1, :5], scores[1, 5:] = [-np.inf, np.inf, np.nan, -np.nan, 0.0], -np.inf
        scores[-1, ::2] = np.copysign(np.nan, -1)
        scores[-1, 1::2] = np.copysign(0, scores[-1, 1::2])  # -0 is less than 0 there
    return jnp.asarray(scores)


@pytest.mark.parametrize(
    ("tokens", "count", "groups"), [(1, 8, 8), (3, 4, 160), slow(8, 6, 64), slow(64, 8, 256)]
)
def test_the_choice_is_top_ks(tokens, count, groups, rng):
    scores = awkward(tokens, groups, rng)
    experts, chosen = choice.choose(scores, count, interpret=INTERPRET)
    right = lax.top_k(scores, count)[1]
    np.testing.assert_array_equal(experts, right)
    check_table(chosen, right, groups)


@pytest.mark.parametrize(
    ("parts", "tokens", "count", "groups"), [(3, 4, 3, 96), slow(4, 8, 6, 64), slow(16, 16, 8, 128)]
)
def test_the_choice_of_a_softmax_that_comes_in_parts(parts, tokens, count, groups, rng):
    """Tokens with equal logits, with infinity, and with NaN, which comes first."""
    logits = rng.standard_normal((parts, tokens, groups)).astype(np.float32)
    logits[:, 0] = 0.25
    logits[0, 1, ::2], logits[-1, 2, 5], logits[0, 3, 7] = -np.inf, np.nan, 3e38
    made = choice.choose_by_parts(jnp.asarray(logits), count, interpret=INTERPRET)
    experts, weights, chosen = jax.block_until_ready(made)
    values, right = lax.top_k(jax.nn.softmax(logits.sum(0)), count)
    np.testing.assert_array_equal(experts, right)
    np.testing.assert_allclose(weights, values, rtol=2e-6)
    check_table(chosen, right, groups)


def test_a_route_and_its_gradients_are_xlas(rng):
    x, kernel = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((8, 32), (32, 64))
    )
    towards = jnp.asarray(rng.standard_normal((8, 6)), jnp.float32)

    def by_kernel(x, kernel):
        experts, weights, _ = route(x, kernel, 6)
        return (weights * towards).sum(), experts

    def by_xla(x, kernel):
        weights, experts = lax.top_k(jax.nn.softmax(jnp.dot(x, kernel, precision="highest")), 6)
        return (weights * towards).sum(), experts

    found = []
    for way in (by_kernel, by_xla):
        with plgpu.force_gpu_interpret_mode():
            found.append(jax.value_and_grad(way, (0, 1), has_aux=True)(x, kernel))
        jax.block_until_ready(found[-1])
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # noqa: E731
    jax.tree.map(compare, *found)


def test_which_routes_have_a_kernel():
    def served(tokens, width, groups, implementation=None):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, width), (width, groups))]
        with plgpu.force_gpu_interpret_mode():
            found = []
            jax.eval_shape(lambda *x: found.append(route(*x, 2, implementation)), *shapes)
        return found[0] is not None

    assert served(8, 64, 64)
    assert not served(8, 64, 64, "xla")
    assert served(16, 64, 128)
    assert not served(17, 64, 128)  # all of it is one thread block's
    assert not served(16, 64, 136)
    assert not served(1, 64, 64)  # which are fewer than threads
    assert not served(8, 72, 64)
    assert route(jnp.zeros((8, 64)), jnp.zeros((64, 64)), 2) is None  # on a CPU


def test_which_choices_have_a_kernel():
    def served(tokens, groups, dtype=jnp.float32, implementation=None):
        with plgpu.force_gpu_interpret_mode():
            made = jax.eval_shape(
                lambda x: choose(x, 2, implementation),
                jax.ShapeDtypeStruct((tokens, groups), dtype),
            )
        assert made[0].shape == (tokens, 2)
        return made[1] is not None

    assert served(8, 64)
    assert not served(8, 64, implementation="xla")
    assert served(64, 256)
    assert not served(65, 64)
    assert not served(8, 264)
    assert not served(8, 68)
    assert not served(8, 64, jnp.bfloat16)
    assert not served(0, 64)


def test_more_experts_than_there_are_cannot_be_chosen():
    with (
        plgpu.force_gpu_interpret_mode(),
        pytest.raises(ValueError, match="no larger than size along axis"),
    ):
        choose(jnp.zeros((3, 8)), 9)


ROUTERS = {
    "softmax": {"scoring_func": "softmax", "n_group": 1, "topk_group": 1},
    "bias and groups": {
        "scoring_func": "sigmoid", "n_group": 4, "topk_group": 2,
        "norm_topk_prob": True,
    },
    "experts that return their input": {"zero_expert_num": 8, "n_group": 1, "topk_group": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_layer_and_its_gradients_are_those_of_xlas_choice(kind, monkeypatch, rng):
    """Only the choice differs: both go through the experts' interpreted kernels."""
    config = DecoderConfig.from_preset("tiny")
    config = config.replace(n_routed_experts=16, num_experts_per_tok=3, **ROUTERS[kind])
    layer = drawn(lambda: MixtureOfExperts(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    if config.has_selection_bias:
        count = layer.router.bias.shape
        layer.router.bias.set_value(jnp.asarray(rng.standard_normal(count), jnp.float32))
    x = jnp.asarray(rng.standard_normal((2, 2, 128)), jnp.bfloat16)

    def found():
        def loss(layer):
            y = layer(x)
            return (y.astype(jnp.float32) ** 2).sum(), y

        with plgpu.force_gpu_interpret_mode():
            return jax.block_until_ready(nnx.grad(loss, has_aux=True)(layer))

    asked = []
    monkeypatch.setattr(
        choice, "choose", lambda *a, own=choice.choose, **k: asked.append(1) or own(*a, **k)
    )
    made = found()
    assert asked
    monkeypatch.setattr(hopper, "choose", lambda *_: None)
    jax.tree.map(np.testing.assert_array_equal, made, found())


def test_a_router_of_a_softmax_asks_for_all_at_once(monkeypatch, rng):
    """Where nothing comes between the scores and the choice; its factors come behind."""
    config = DecoderConfig.from_preset("tiny").replace(
        n_routed_experts=16, num_experts_per_tok=3, norm_topk_prob=True, routed_scaling_factor=2.5,
        **ROUTERS["softmax"],
    )  # fmt: skip
    grouped = config.replace(n_group=4, topk_group=2)
    x = jnp.asarray(rng.standard_normal((8, 128)), jnp.bfloat16)
    asked, own = [], hopper.route
    monkeypatch.setattr(hopper, "route", lambda *a: asked.append(1) or own(*a))
    for each, times in ((config, 1), (grouped, 0)):
        asked.clear()
        router = drawn(lambda: Router(each, rngs=nnx.Rngs(0)))  # noqa: B023
        with plgpu.force_gpu_interpret_mode():
            experts, weights, _ = jax.block_until_ready(router.route(x))
        assert len(asked) == times
        right = router.route(x, "xla")
        np.testing.assert_array_equal(experts, right[0])
        np.testing.assert_allclose(weights, right[1], rtol=1e-5)


@pytest.mark.accelerator
@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("tokens", "count", "groups"), [(8, 6, 64), (16, 8, 128), (1, 8, 128)])
def test_a_choice_by_parts_on_a_gpu(tokens, count, groups, rng):
    logits = jnp.asarray(rng.standard_normal((16, tokens, groups)), jnp.float32)
    experts, weights, chosen = choice.choose_by_parts(logits, count)
    values, right = lax.top_k(jax.nn.softmax(logits.sum(0)), count)
    np.testing.assert_array_equal(experts, right)
    np.testing.assert_allclose(weights, values, rtol=1e-5)
    check_table(chosen, right, groups)


@pytest.mark.accelerator
@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("tokens", "count", "groups"),
    [(1, 6, 64), (8, 8, 256), (64, 8, 256), (33, 6, 160), (64, 6, 64)],
)
def test_the_choice_and_its_table_on_a_gpu(tokens, count, groups, rng):
    scores = awkward(tokens, groups, rng)
    with jax.default_device(jax.devices("cpu")[0]):
        right = np.asarray(lax.top_k(jax.device_put(scores, jax.devices("cpu")[0]), count)[1])
    experts, chosen = choice.choose(scores, count)
    np.testing.assert_array_equal(experts, right)
    check_table(chosen, jnp.asarray(right), groups)
    named = jnp.asarray(rng.integers(0, groups + 1, (tokens, count)), jnp.int32)
    check_table(choice.chosen_experts(named, groups), named, groups)
