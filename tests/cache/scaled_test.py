"""Latents in a byte a number: what is held, that it never changes, and that layers attend to it."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from common import MICRO, drawn, emptied, relative
from flax import nnx
from jax import export

from mla_jax import Cache, MultiHeadLatentAttention, Step
from mla_jax.cache import ENCODINGS, PAGE, Dense, Paged, Scaled
from mla_jax.cache.scaled import dequantise, quantise
from mla_jax.generation import generate

LIMIT = {"float8_e4m3fn": 448, "int8": 127}
ENCODED = pytest.mark.parametrize("held", ENCODINGS)
RANK = 130  # two groups of channels, the second of two


def oracle(x, held):
    """Values and scales in float64, number by number."""
    x = np.asarray(x, np.float64)
    values, scales = np.zeros(x.shape), np.zeros((*x.shape[:-1], -(-x.shape[-1] // 128)))
    for place in np.ndindex(scales.shape):
        part = x[place[:-1]][128 * place[-1] : 128 * place[-1] + 128]
        power = -100
        while LIMIT[held] * 2.0**power < np.abs(part).max():
            power += 1
        scaled = part / 2.0**power
        rounded = np.round(scaled) if held == "int8" else scaled.astype(ml_dtypes.float8_e4m3fn)
        values[place[:-1]][128 * place[-1] : 128 * place[-1] + 128] = rounded
        scales[place] = 2.0**power
    return values, scales


_quantise = jax.jit(quantise, static_argnums=1)
_dequantise = jax.jit(dequantise, static_argnums=2)


@ENCODED
def test_numbers_and_scales_are_the_oracle_s(held, rng):
    x = rng.standard_normal((9, RANK)).astype(np.float32)
    limit = np.float32(LIMIT[held])
    x[0, :128], x[1, 128:] = 0, 0
    x[2], x[3] = x[2] * 1e-30, x[3] * 1e30
    x[4, 5], x[5, 5], x[6, 129] = limit / 8, np.nextafter(limit / 8, np.float32(1e9)), -limit
    x[7, :3] = 100 * np.abs(x[7]).max()
    values, scales = _quantise(x, held)
    assert values.dtype == held
    expected = oracle(x, held)
    np.testing.assert_array_equal(scales, expected[1])
    np.testing.assert_array_equal(np.asarray(values).astype(np.float64), expected[0])
    exact = expected[0] * np.repeat(expected[1], 128, -1)[:, :RANK]
    for dtype in (jnp.bfloat16, jnp.float32):
        back = _dequantise(values, scales, dtype)
        np.testing.assert_array_equal(np.asarray(back, np.float64), exact)
    # Half a unit of the last of fp8's 4 bits, or half a step of what the scale allows.
    step = np.repeat(expected[1], 128, -1)[:, :RANK] * (1 if held == "int8" else 2.0**-9)
    bound = np.maximum(step / 2, 0 if held == "int8" else np.abs(x) * 2.0**-4)
    assert (np.abs(exact - x) <= bound).all()


@ENCODED
def test_what_is_not_finite_makes_its_group_nan(held):
    x = np.ones((3, RANK), np.float32)
    x[:, 3] = np.nan, np.inf, -np.inf
    back = _dequantise(*_quantise(x, held), jnp.float32)
    assert np.isnan(np.asarray(back)[:, :128]).all()
    np.testing.assert_array_equal(np.asarray(back)[:, 128:], 1)


class Mixer:
    """What a cache asks of a layer."""

    def init_store(self, batch_size, slots, dtype=None):
        return Scaled.init(batch_size, slots, {"latent": RANK, "k_rope": 2}, dtype, jnp.bfloat16)


_LATENTS = np.random.default_rng(3).standard_normal((3, 2 * PAGE, RANK))
# 229/128 is 229 x 2^-7, rounded to 224 x 2^-7: which by itself would have the scale 2^-8.
_LATENTS[2, 3], _LATENTS[2, 3, 0] = 0.01, 229 / 128
LATENTS = _LATENTS.astype(jnp.bfloat16)


@jax.jit
def _appended(cache, counts, new):
    step = Step.begin(cache, new.shape[1], counts)
    view = step.view(cache.stores[0]).write(step.place, latent=new, k_rope=new[..., :2])
    return cache.end([view.pool if isinstance(view, Paged) else view], step)


def append(cache, source, first, counts):
    """The tokens from `first` on of the texts `source`, `counts` of them for every row."""
    at = np.minimum(np.array(first)[:, None] + np.arange(PAGE - 1), LATENTS.shape[1] - 1)
    return _appended(cache, np.int32(counts), LATENTS[np.array(source)[:, None], at])


@jax.jit
def _found(cache, slots):
    view = cache.view(cache.stores[0])
    return view.cut(0, 2 * PAGE), view.at(slots)["latent"], view.block(0, 2 * PAGE)["latent"]


@pytest.mark.parametrize(
    ("held", "pages"), [("int8", None), ("float8_e4m3fn", 9)], ids=["dense int8", "paged fp8"]
)
def test_tokens_are_quantised_once_whatever_happens_to_them(held, pages):
    """Row 0 in chunks, row 1 forked from it and cut, row 2 inserted from another cache."""
    other = emptied(lambda: Cache.init([Mixer()], 1, PAGE, held, None if pages else 2), 0)
    cache = emptied(lambda: Cache.init([Mixer()], 3, 2 * PAGE, held, pages), 0)
    own = (0, 1, 2)
    cache = append(cache, own, (0, 0, 0), (PAGE - 1, 3, 0))
    cache = append(cache, own, cache.length, (3, 0, 0))
    second, kept = np.array([False, True, False]), np.int32([999, 40, 999])
    cache = jax.jit(lambda cache: cache.fork(0, second).truncate(kept))(cache)
    cache = append(cache, own, cache.length, (1, 5, 0))
    cache = jax.jit(Cache.insert)(cache, append(other, (2,), (0,), (9,)), 2)
    cache = append(cache, own, cache.length, (0, 0, 2))
    assert cache.length.tolist() == [PAGE + 3, 45, 11]
    once = jax.device_get(_quantise(LATENTS, held))
    texts = [[(0, t) for t in range(PAGE + 3)], [(0, t) for t in range(40)], []]
    texts[1] += [(1, t) for t in range(40, 45)]
    texts[2] += [(2, t) for t in range(11)]
    slots = np.array([[3, 0], [44, 1], [10, 10]], np.int32)
    found, chosen, whole = jax.device_get(_found(cache, slots))
    assert found["latent"].dtype == held
    for row, text in enumerate(texts):
        of, at = np.array(text).T
        for name, expected in zip(("latent", "latent_scale"), once, strict=True):
            np.testing.assert_array_equal(found[name][row, : len(text)], expected[of, at])
        np.testing.assert_array_equal(found["k_rope"][row, : len(text)], LATENTS[of, at, :2])
    np.testing.assert_array_equal(chosen, np.take_along_axis(whole, slots[..., None], 1))


def test_bytes_of_a_token():
    """656 in place of 1152 for the widths of DeepSeek-V3."""
    store = Scaled.init(1, 1, {"latent": 512, "k_rope": 64}, "float8_e4m3fn", jnp.bfloat16)
    assert store.nbytes == 512 + 4 * 4 + 64 * 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded(Dense):
    """What `Scaled` means, without bytes and scales: it rounds what is written to it."""

    def encode(self, new):
        return new | {"latent": dequantise(*quantise(new["latent"], "float8_e4m3fn"), jnp.float32)}


def exact_layer():
    """A layer and inputs whose products for latents are exact, so that all splits round alike."""
    layer = drawn(lambda: MultiHeadLatentAttention(MICRO, precision="highest", rngs=nnx.Rngs(0)))
    kernel = layer.kv_a_proj.kernel
    kernel.set_value(jax.device_put(np.round(np.asarray(kernel[...]) * 64) / 64))
    x = np.random.default_rng(1).standard_normal((2, 7, 24))
    return layer, np.float32(np.round(x * 8) / 8)


@functools.partial(jax.jit, static_argnames="form")
def prefill(layer, x, cache, lengths, form):
    return layer.prefill(x, cache, lengths, form=form)


@functools.cache
def rounded_and_not():
    """What a layer makes of latents that are rounded, and of those that are not."""
    layer, x = exact_layer()
    plain = emptied(lambda: layer.init_cache(2, PAGE))
    rounded = plain.replace(stores=(Rounded(plain.stores[0].arrays),))
    counts = np.full(2, 7, np.int32)
    return [np.asarray(prefill(layer, x, held, counts, "absorbed")[0]) for held in (rounded, plain)]


@pytest.mark.parametrize(
    ("form", "pages"), [("absorbed", 2), ("expanded", None)], ids=["absorbed paged", "expanded"]
)
def test_any_split_attends_to_the_quantised_latents(form, pages):
    layer, x = exact_layer()
    expected, unrounded = rounded_and_not()
    assert relative(unrounded, expected) > 1e-3
    empty = emptied(lambda: layer.init_cache(2, PAGE, "float8_e4m3fn", pages))
    for split in (0, 1, 4, 7):
        counts = np.array([split, 7 - split], np.int32)
        y, cache = prefill(layer, x, empty, counts, form)
        rest = np.stack([np.roll(x[0], -split, 0), np.roll(x[1], split - 7, 0)])
        z, cache = prefill(layer, rest, cache, 7 - counts, form)
        y, z = np.asarray(y), np.asarray(z)
        for b, count in enumerate(counts.tolist()):
            got = np.concatenate([y[b, :count], z[b, : 7 - count]])
            np.testing.assert_allclose(got, expected[b], atol=3e-6)


def test_it_has_no_derivative_and_says_so():
    loss = lambda x: dequantise(*quantise(x, "int8"), jnp.float32).sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="a cache of int8 latents has no derivative"):
        jax.grad(loss)(np.ones((1, 3), np.float32))


def test_it_goes_through_export():
    cache = emptied(lambda: Cache.init([Mixer()], 2, 8, "float8_e4m3fn"), 0)
    cut = jax.jit(lambda cache: cache.truncate(3))
    exported = export.deserialize(export.export(cut)(cache).serialize())
    chex.assert_trees_all_equal(exported.call(cache), cut(cache))


def test_bad_input():
    layer, x = exact_layer()
    cache, at = emptied(lambda: layer.init_cache(2, 8, "int8"), 0), np.zeros((2, 1), np.int32)
    new = {"latent": np.ones((2, 1, 16), jnp.bfloat16), "k_rope": np.ones((2, 1, 4), np.float32)}
    with pytest.raises(ValueError, match="latent is bfloat16, the cache holds float32"):
        cache.stores[0].write(at, **new)
    with pytest.raises(ValueError, match="was given latent: this store holds k_rope, latent"):
        cache.stores[0].write(at, latent=x)
    with pytest.raises(ValueError, match=r"row holds k_rope, latent; this cache .* latent_scale"):
        cache.insert(emptied(lambda: layer.init_cache(1, 8)), 0)
    with pytest.raises(ValueError, match=r"cache_dtype=int4: a cache holds .* or int8"):
        generate(None, [[1]], cache_dtype="int4")
