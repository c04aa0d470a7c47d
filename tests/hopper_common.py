"""What the tests of the Hopper kernels share: operands, a float64 loop, fixtures, a small model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import put, relative
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

import mla_jax
from mla_jax import target
from mla_jax.cache import PAGE
from mla_jax.models.decoder import Decoder, DecoderConfig
from mla_jax.ops import dispatch, hopper

MARKS = [
    # Infinity in slots that nobody sees meets zero, before the mask.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
SCALE = 192**-0.5
INTERPRET = plgpu.InterpretGPUParams()
# One program, where each of its operations would be one.
make_schedule = jax.jit(hopper.make_schedule, static_argnames=("rows", "slots", "num_sms", "slack"))
HOPPER = target.Target("gpu", "NVIDIA H200", 9.0, 132)
SPEC = dispatch.Call("latent_attention", 2, 1, 4096, 128, (512, 64), 512, "bfloat16", ("lengths",))


def make(seed, batch, tokens, slots, heads, rank, rope, lengths, dtype):
    """Standard normal operands; NaN and infinity in every slot past a row's length."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    dead = (np.arange(slots)[None] >= np.asarray(lengths)[:, None])[..., None]
    bad = np.where(np.arange(slots) % 3 == 0, np.inf, np.nan)[None, :, None]
    arrays = [draw(batch, tokens, heads, rank), draw(batch, tokens, heads, rope)]
    arrays += [np.where(dead, bad, draw(batch, slots, width)) for width in (rank, rope)]
    return [put(a, dtype) for a in arrays], put(lengths, np.int32)


def loop(arrays, lengths, scale=SCALE):
    """float64, one query token at a time."""
    pattern, q_rope, latent, k_rope = (np.asarray(a, np.float64) for a in arrays)
    out, lengths = np.zeros(pattern.shape), np.asarray(lengths)
    lse = np.full(pattern.shape[:-1], -np.inf)
    for b, t in np.ndindex(pattern.shape[:2]):
        n = int(lengths[b]) - (pattern.shape[1] - 1 - t)
        if n <= 0:
            continue
        scores = pattern[b, t] @ latent[b, :n].T + q_rope[b, t] @ k_rope[b, :n].T
        top = scale * scores.max(1, keepdims=True)
        weights = np.exp(scale * scores - top)
        out[b, t] = weights @ latent[b, :n] / weights.sum(1, keepdims=True)
        lse[b, t] = top[:, 0] + np.log(weights.sum(1))
    return out, lse


def check(got, want, dtype, tolerance=None):
    """Rounding of the weights, relative to the row's maximum, and of the result: half a unit each.

    The joint error of both, each uniform within half a unit of the last place, is at most 0.8 eps
    of the elements' root mean square; rows with nothing to see are exact.
    """
    out, lse = (np.asarray(x, np.float64) for x in got)
    dead = np.isneginf(want[1])
    assert np.isfinite(out).all()
    assert (np.isneginf(lse) == dead).all()
    assert (out[dead] == 0).all()
    assert relative(out, want[0]) < (tolerance or 0.8 * float(jnp.finfo(dtype).eps))
    # float32 sums of exponentials by approximate instructions
    np.testing.assert_allclose(lse[~dead], want[1][~dead], atol=2e-5)


def attend(arrays, lengths, sms, interpret=INTERPRET, table=None, latent_scale=None):
    """The decode kernel on a batch that is cut for so many multiprocessors."""
    tokens, heads = arrays[0].shape[1:3]
    slots = arrays[2].shape[1] if table is None else table.shape[1] * PAGE
    schedule = make_schedule(lengths, rows=tokens * heads, slots=slots, num_sms=sms, slack=0)
    got = hopper.decode(
        *arrays, schedule, latent_scale=latent_scale, table=table, scale=SCALE, interpret=interpret
    )
    return jax.block_until_ready(got) if interpret else got


def shuffled_pages(arrays, lengths, seed=0):
    """Rows on pages in random order: (arrays, those of the cache as pools; table)."""
    rng = np.random.default_rng(seed)
    batch, slots = arrays[2].shape[:2]
    count = batch * slots // PAGE
    order = rng.permutation(count).astype(np.int32)
    place = np.argsort(order)
    pool = lambda x: x.reshape(count, PAGE, x.shape[2])[place]  # noqa: E731
    held = np.arange(slots // PAGE)[None] * PAGE < np.asarray(lengths)[:, None]
    table = np.where(held, order.reshape(batch, -1), count)
    return [*arrays[:2], *map(pool, arrays[2:])], jnp.asarray(table)


def two_layers():
    """A decoder of DeepSeek-V2-Lite's attention, prompts for it and their lengths."""
    config = mla_jax.MLAConfig.from_preset("deepseek_v2_lite").replace(
        hidden_size=256, num_hidden_layers=2
    )
    model = Decoder(DecoderConfig(attention=config), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    prompt = jax.random.randint(jax.random.key(0), (3, 40), 0, 256)
    return model, prompt, jnp.array([40, 1, 17])
