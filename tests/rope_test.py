import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from common import MICRO, PLAIN

from mla_jax import MLAConfig, rope

TESTDATA = pathlib.Path(__file__).parent / "testdata"


@pytest.mark.parametrize("preset", ["deepseek_v3", "deepseek_v2_lite", "kimi_k2_0711", "minicpm3"])
def test_angles_are_right_at_any_position(preset):
    inv_freq = rope.inverse_frequencies(MLAConfig.from_preset(preset))
    positions = np.array([0, 1, 7, 4095, 4096, 65537, 131072, 163839])
    exact = positions[:, None] * inv_freq[None]
    got = np.asarray(rope.angles(jnp.asarray(positions, jnp.int32), inv_freq))
    # 2^-24 of pi for the float32 angle, position x 2^-41 turns for the frequency
    bound = np.pi * 2**-24 * 2 + 163839 * 2.0**-41 * 2 * np.pi
    assert np.abs(np.cos(got.astype(np.float64)) - np.cos(exact)).max() < bound
    assert np.abs(np.sin(got.astype(np.float64)) - np.sin(exact)).max() < bound


@pytest.mark.parametrize(
    "path",
    sorted(p for p in TESTDATA.glob("*.npz") if not p.stem.startswith("ckpt")),
    ids=lambda path: path.stem,
)
def test_frequencies_are_the_families_own(path):
    z = np.load(path)
    if "rope/cos" not in z.files:  # Kimi-Linear does not rotate
        return
    config = MLAConfig.from_hf(json.loads(str(z["config"])))
    theta = np.asarray(
        rope.angles(jnp.asarray(z["in/position_ids"]), rope.inverse_frequencies(config))
    )
    cos, sin = np.cos(theta), np.sin(theta)
    expected = z["rope/cos"], z["rope/sin"]
    if expected[0].ndim == 2:
        cos, sin = cos[0], sin[0]
    factor = rope.attention_factor(config)
    np.testing.assert_allclose(cos * factor, expected[0], atol=4e-6)
    np.testing.assert_allclose(sin * factor, expected[1], atol=4e-6)


@pytest.mark.parametrize("config", [MICRO, PLAIN])
@pytest.mark.parametrize("per_row", [False, True])
def test_rotation(config, per_row, rng):
    x = rng.standard_normal((2, 5, 3, 4)).astype(np.float32)
    positions = np.array([3, 1, 4, 1, 131071])
    if per_row:
        positions = np.stack([positions, positions + 17])
    got = rope.apply_rope(jnp.asarray(x), jnp.asarray(positions), config)
    rows = positions if per_row else np.stack([positions] * 2)
    theta = (rows[..., None] * rope.inverse_frequencies(config))[:, :, None]
    pairs = (
        x[..., 0::2] + 1j * x[..., 1::2] if config.rope_interleave else x[..., :2] + 1j * x[..., 2:]
    )
    turned = pairs * np.exp(1j * theta) * rope.attention_factor(config)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(got, expected, atol=4e-6)
    shared = rope.apply_rope(jnp.asarray(x[:, :, 0]), jnp.asarray(positions), config)
    np.testing.assert_array_equal(shared, got[:, :, 0])


def test_no_rope_leaves_channels_alone():
    config = MICRO.replace(mla_use_nope=True)
    x = jnp.ones((1, 2, 4))
    assert rope.apply_rope(x, jnp.arange(2), config) is x


def test_yarn_without_truncation_and_linear():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    smooth = MICRO.replace(qk_rope_head_dim=64, rope_scaling=scaling | {"truncate": False})
    rounded = MICRO.replace(qk_rope_head_dim=64, rope_scaling=scaling)
    assert not np.allclose(*map(rope.inverse_frequencies, (smooth, rounded)))
    linear = MICRO.replace(rope_scaling={"type": "linear", "factor": 4.0})
    plain = MICRO.replace(rope_scaling=None)
    np.testing.assert_allclose(
        rope.inverse_frequencies(linear) * 4, rope.inverse_frequencies(plain)
    )
    given = MICRO.replace(rope_scaling=scaling | {"attention_factor": 1.5})
    assert rope.attention_factor(given) == 1.5


def test_longrope_goes_by_how_long_the_context_may_become():
    config = MICRO.replace(rope_scaling={
        "type": "longrope", "original_max_position_embeddings": 8, "short_factor": [1.0, 2.0],
        "long_factor": [3.0, 4.0]}, max_position_embeddings=32)  # fmt: skip
    plain = rope.inverse_frequencies(MICRO.replace(rope_scaling=None))
    for length, factors in ((None, [3, 4]), (8, [1, 2]), (9, [3, 4])):
        np.testing.assert_allclose(rope.inverse_frequencies(config, length), plain / factors)
    x = jnp.ones((1, 3, 4))
    short, long = (rope.apply_rope(x, jnp.arange(3), config, n) for n in (8, 9))
    assert np.abs(np.asarray(short - long)).max() > 0.1


def test_given_frequencies():
    config = MICRO.replace(rope_inv_freq=[0.5, 0.25])
    np.testing.assert_array_equal(rope.inverse_frequencies(config), [0.5, 0.25])
