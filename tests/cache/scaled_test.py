"""Latents in a byte a number: what is held, that it never changes, and that layers attend to it."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from common import MICRO, relative
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


@ENCODED
def test_numbers_and_scales_are_the_oracle_s(held, rng):
    x = rng.standard_normal((9, RANK)).astype(np.float32)
    limit = np.float32(LIMIT[held])
    x[0, :128], x[1, 128:] = 0, 0
    x[2], x[3] = x[2] * 1e-30, x[3] * 1e30
    x[4, 5], x[5, 5], x[6, 129] = limit / 8, np.nextafter(limit / 8, np.float32(1e9)), -limit
    x[7, :3] = 100 * np.abs(x[7]).max()
    values, scales = jax.jit(quantise, static_argnums=1)(x, held)
    assert values.dtype == held
    expected = oracle(x, held)
    np.testing.assert_array_equal(scales, expected[1])
    np.testing.assert_array_equal(np.asarray(values).astype(np.float64), expected[0])
    exact = expected[0] * np.repeat(expected[1], 128, -1)[:, :RANK]
    for dtype in (jnp.bfloat16, jnp.float32):
        back = dequantise(values, scales, dtype)
        np.testing.assert_array_equal(np.asarray(back, np.float64), exact)
    # Half a unit of the last of fp8's 4 bits, or half a step of what the scale allows.
    step = np.repeat(expected[1], 128, -1)[:, :RANK] * (1 if held == "int8" else 2.0**-9)
    bound = np.maximum(step / 2, 0 if held == "int8" else np.abs(x) * 2.0**-4)
    assert (np.abs(exact - x) <= bound).all()


@ENCODED
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_group_nan(held, bad):
    x = jnp.ones((1, RANK)).at[0, 3].set(bad)
    back = dequantise(*quantise(x, held), jnp.bfloat16)
    assert jnp.isnan(back[0, :128]).all()
    np.testing.assert_array_equal(back[0, 128:], 1)


class Mixer:
    """What a cache asks of a layer."""

    def init_store(self, batch_size, slots, dtype=None):
        return Scaled.init(batch_size, slots, {"latent": RANK, "k_rope": 2}, dtype, jnp.bfloat16)


_LATENTS = np.random.default_rng(3).standard_normal((3, 2 * PAGE, RANK))
# 229/128 is 229 x 2^-7, rounded to 224 x 2^-7: which by itself would have the scale 2^-8.
_LATENTS[2, 3], _LATENTS[2, 3, 0] = 0.01, 229 / 128
LATENTS = jnp.asarray(_LATENTS.astype(jnp.bfloat16))


def append(cache, source, first, counts, tokens):
    """The tokens from `first` on of the texts `source`, `counts` of them for every row."""
    step = Step.begin(cache, tokens, counts)
    at = jnp.minimum(first[:, None] + jnp.arange(tokens)[None], LATENTS.shape[1] - 1)
    new = LATENTS[source[:, None], at]
    view = step.view(cache.stores[0]).write(step.place, latent=new, k_rope=new[..., :2])
    return cache.end([view.pool if isinstance(view, Paged) else view], step)


@pytest.mark.parametrize(
    ("held", "pages"), [("int8", None), ("float8_e4m3fn", 9)], ids=["dense int8", "paged fp8"]
)
def test_tokens_are_quantised_once_whatever_happens_to_them(held, pages):
    """Row 0 in chunks, row 1 forked from it and cut, row 2 inserted from another cache."""
    rows = lambda *numbers: jnp.array(numbers, jnp.int32)  # noqa: E731

    @jax.jit
    def history(cache, other):
        own, none = rows(0, 1, 2), rows(0, 0, 0)
        cache = append(cache, own, none, rows(PAGE - 1, 3, 0), PAGE - 1)
        cache = append(cache, own, cache.length, rows(3, 0, 0), 3)
        cache = cache.fork(0, jnp.array([False, True, False])).truncate(rows(999, 40, 999))
        cache = append(cache, own, cache.length, rows(1, 5, 0), 5)
        cache = cache.insert(append(other, rows(2), rows(0), rows(9), 9), 2)
        return append(cache, own, cache.length, rows(0, 0, 2), 2)

    other = Cache.init([Mixer()], 1, PAGE, held, None if pages else 2)
    cache = history(Cache.init([Mixer()], 3, 2 * PAGE, held, pages), other)
    assert cache.length.tolist() == [PAGE + 3, 45, 11]
    once = quantise(LATENTS, held)
    texts = [[(0, t) for t in range(PAGE + 3)], [(0, t) for t in range(40)], []]
    texts[1] += [(1, t) for t in range(40, 45)]
    texts[2] += [(2, t) for t in range(11)]
    found = cache.view(cache.stores[0]).cut(0, 2 * PAGE)
    assert found["latent"].dtype == held
    for row, text in enumerate(texts):
        of, at = np.array(text).T
        for name, expected in zip(("latent", "latent_scale"), once, strict=True):
            np.testing.assert_array_equal(found[name][row, : len(text)], expected[of, at])
        np.testing.assert_array_equal(found["k_rope"][row, : len(text)], LATENTS[of, at, :2])
    slots = jnp.array([[3, 0], [44, 1], [10, 10]])
    chosen = cache.view(cache.stores[0]).at(slots)["latent"]
    whole = cache.view(cache.stores[0]).block(0, 2 * PAGE)["latent"]
    np.testing.assert_array_equal(chosen, jnp.take_along_axis(whole, slots[..., None], 1))


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
    layer = MultiHeadLatentAttention(MICRO, precision="highest", rngs=nnx.Rngs(0))
    kernel = layer.kv_a_proj.kernel
    kernel[...] = jnp.round(kernel[...] * 64) / 64
    x = jnp.round(jax.random.normal(jax.random.key(1), (2, 7, 24)) * 8) / 8
    return layer, x


@functools.partial(jax.jit, static_argnames="form")
def prefill(layer, x, cache, lengths, form):
    return layer.prefill(x, cache, lengths, form=form)


@pytest.mark.parametrize(
    ("form", "pages"), [("absorbed", 2), ("expanded", None)], ids=["absorbed paged", "expanded"]
)
def test_any_split_attends_to_the_quantised_latents(form, pages):
    layer, x = exact_layer()
    plain = layer.init_cache(2, PAGE, pages=pages)
    rounded = plain.replace(stores=(Rounded(plain.stores[0].arrays),))
    expected, _ = prefill(layer, x, rounded, jnp.array([7, 7]), "absorbed")
    unrounded, _ = prefill(layer, x, plain, jnp.array([7, 7]), "absorbed")
    assert relative(unrounded, expected) > 1e-3
    empty = layer.init_cache(2, PAGE, "float8_e4m3fn", pages)
    poison = lambda held: held if held.dtype == "int32" else jnp.full_like(held, jnp.nan)  # noqa: E731
    empty = empty.replace(stores=jax.tree.map(poison, empty.stores))
    for split in (0, 1, 4, 7):
        counts = jnp.array([split, 7 - split])
        y, cache = prefill(layer, x, empty, counts, form)
        rest = jnp.stack([jnp.roll(x[0], -split, 0), jnp.roll(x[1], split - 7, 0)])
        z, cache = prefill(layer, rest, cache, 7 - counts, form)
        for b, count in enumerate(counts.tolist()):
            got = jnp.concatenate([y[b, :count], z[b, : 7 - count]])
            np.testing.assert_allclose(got, expected[b], atol=3e-6)


def test_it_has_no_derivative_and_says_so():
    loss = lambda x: dequantise(*quantise(x, "int8"), jnp.float32).sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="a cache of int8 latents has no derivative"):
        jax.grad(loss)(jnp.ones((1, 3)))


def test_it_goes_through_export():
    cache = Cache.init([Mixer()], 2, 8, "float8_e4m3fn")
    cut = jax.jit(lambda cache: cache.truncate(3))
    exported = export.deserialize(export.export(cut)(cache).serialize())
    chex.assert_trees_all_equal(exported.call(cache), cut(cache))


def test_bad_input():
    layer, x = exact_layer()
    cache, at = layer.init_cache(2, 8, "int8"), jnp.zeros((2, 1), jnp.int32)
    new = {"latent": jnp.ones((2, 1, 16), jnp.bfloat16), "k_rope": jnp.ones((2, 1, 4))}
    with pytest.raises(ValueError, match="latent is bfloat16, the cache holds float32"):
        cache.stores[0].write(at, **new)
    with pytest.raises(ValueError, match="was given latent: this store holds latent, k_rope"):
        cache.stores[0].write(at, latent=x)
    with pytest.raises(ValueError, match=r"row holds latent, k_rope; this cache .* latent_scale"):
        cache.insert(layer.init_cache(1, 8), 0)
    with pytest.raises(ValueError, match=r"cache_dtype=int4: a cache holds .* or int8"):
        generate(None, [[1]], cache_dtype="int4")
