import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import MICRO
from jax import export

from mla_jax import LatentCache

R, P = MICRO.kv_lora_rank, MICRO.qk_rope_head_dim


def tokens(batch, count, first=1.0):
    numbers = first + np.arange(batch * count, dtype=np.float32).reshape(batch, count, 1)
    return jnp.asarray(np.repeat(numbers, R, 2)), jnp.asarray(np.repeat(-numbers, P, 2))


def filled():
    cache = LatentCache.init(MICRO, 3, 6)
    return cache.append(*tokens(3, 4), lengths=jnp.array([4, 0, 2]))


def test_append_goes_behind_each_row():
    cache = filled().append(*tokens(3, 2, 100.0))
    assert cache.length.tolist() == [6, 2, 4]
    assert cache.latent[:, :, 0].tolist() == [
        [1, 2, 3, 4, 100, 101], [102, 103, 0, 0, 0, 0], [9, 10, 104, 105, 0, 0]
    ]  # fmt: skip
    np.testing.assert_array_equal(cache.k_rope[..., 0], -cache.latent[..., 0])
    assert not cache.overflowed.any()
    assert cache.nbytes == 3 * 6 * (R + P) * 4


def test_overflow():
    with pytest.raises(ValueError, match=r"rows \[0\] would hold \[7\] tokens"):
        filled().append(*tokens(3, 3))
    before = filled()
    after = jax.jit(LatentCache.append)(before, *tokens(3, 3, 50.0))
    assert after.length.tolist() == [6, 3, 5]
    assert after.overflowed.tolist() == [True, False, False]
    assert after.latent[0, :, 0].tolist() == [1, 2, 3, 4, 50, 51]
    assert after.truncate(6).overflowed.tolist() == [True, False, False]  # still lacks a token
    assert after.truncate(5).overflowed.tolist() == [False, False, False]


def test_truncate_insert_reset():
    cache = filled().truncate(jnp.array([1, 5, 2]))
    assert cache.length.tolist() == [1, 0, 2]
    row = LatentCache.init(MICRO, 1, 4).append(*tokens(1, 3, 70.0))
    for insert in (LatentCache.insert, jax.jit(LatentCache.insert)):
        new = insert(cache, row, 1)
        assert new.length.tolist() == [1, 3, 2]
        assert new.latent[1, :3, 0].tolist() == [70, 71, 72]
        np.testing.assert_array_equal(new.latent[0], cache.latent[0])
    for wrong in (-1, 3):
        np.testing.assert_array_equal(
            jax.jit(LatentCache.insert)(cache, row, wrong).length, cache.length
        )
        with pytest.raises(ValueError, match=f"index={wrong}: this cache has rows 0 to 2"):
            cache.insert(row, wrong)
    assert filled().reset().length.tolist() == [0, 0, 0]
    assert filled().reset(jnp.array([True, False, False])).length.tolist() == [0, 0, 2]


def test_trees_and_export():
    cache = filled()
    specs = jax.tree.map(lambda leaf: leaf.shape, cache)
    assert specs.latent == (3, 6, R)
    assert jax.tree.map(lambda leaf: None, cache).overflowed is None
    doubled = jax.vmap(lambda c: c.append(*tokens(3, 1)))(jax.tree.map(lambda x: x[None], cache))
    assert doubled.length.tolist() == [[5, 1, 3]]
    function = jax.jit(lambda c: c.truncate(1))
    data = export.export(function)(cache).serialize()
    assert export.deserialize(data).call(cache).length.tolist() == [1, 0, 1]


BAD = [
    (lambda c: c.append(*tokens(2, 1)), r"latent has shape \(2, 1, 16\)"),
    (
        lambda c: c.append(tokens(3, 1)[0].astype(jnp.bfloat16), tokens(3, 1)[1]),
        "latent is bfloat16",
    ),
    (lambda c: c.append(*tokens(3, 0)), "T >= 1"),
    (lambda c: c.append(*tokens(3, 1), lengths=jnp.array([2, 0, 0])), "between 0 and the 1 tokens"),
    (lambda c: c.append(*tokens(3, 1), lengths=jnp.ones(3)), "lengths is float32"),
    (lambda c: c.truncate(-1), "at least 0"),
    (lambda c: c.insert(c, 0), "row has 3 rows"),
    (lambda c: c.insert(LatentCache.init(MICRO, 1, 6, jnp.bfloat16), 0), "row.latent is bfloat16"),
    (lambda c: c.reset(jnp.array([0])), r"it must be bool \[3\]"),
    (lambda c: LatentCache.init(MICRO, 0, 6), "batch_size=0"),
    (lambda c: LatentCache.init(MICRO, 1, 6, jnp.float8_e4m3fn), "dtype=float8_e4m3fn"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(filled())
