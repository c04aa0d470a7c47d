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
from mla_jax.models import DecoderConfig
from mla_jax.ops.experts import choice, choose, hopper, tiles

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
    assert (np.asarray(made.owner) < groups).all()


@pytest.mark.parametrize(
    ("tokens", "count", "groups"), [(8, 6, 64), (1, 3, 20), (5, 5, 160), slow(64, 8, 512)]
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
    ("tokens", "count", "groups"), [(8, 6, 64), (1, 8, 8), (3, 4, 160), slow(64, 8, 256)]
)
def test_the_choice_is_top_ks(tokens, count, groups, rng):
    scores = awkward(tokens, groups, rng)
    experts, chosen = choice.choose(scores, count, interpret=INTERPRET)
    right = lax.top_k(scores, count)[1]
    np.testing.assert_array_equal(experts, right)
    check_table(chosen, right, groups)


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
