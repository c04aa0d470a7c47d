"""An indexer's scores, the choice of slots, and attention to what was chosen."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mla_jax
from mla_jax.cache import Dense, Paged
from mla_jax.ops import choose_slots, index_scores, indexing, xla, xla_choice
from mla_jax.ops.seen import Seen, members

B, T, S, J, I, K = 2, 5, 384, 3, 6, 7  # noqa: E741
LIMITS = np.array([[380, 381, 382, 383, 384], [0, 3, 100, 2, 131]])  # fewer than K, and none


@pytest.fixture
def case(rng):
    """Small whole numbers, so that many scores are equal; NaN behind what anybody sees."""
    query, key = rng.integers(-2, 3, (B, T, J, I)), rng.integers(-2, 3, (B, S, I)).astype(float)
    weights = rng.integers(-1, 3, (B, T, J))
    key[1, 131:] = np.nan
    return query, weights, key


def stores(key, rng):
    """The same keys in slots of their own, and on pages in random order."""
    arrays = {"index_key": key} if isinstance(key, np.ndarray) else key
    pages = rng.permutation(B * S // 128).reshape(B, -1)
    pools = {}
    for name, array in arrays.items():
        pool = np.zeros((B * S // 128, 128, array.shape[-1]), np.float32)
        pool[pages.reshape(-1)] = array.reshape(-1, 128, array.shape[-1])
        pools[name] = jnp.asarray(pool)
    dense = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    return {"dense": Dense(dense), "paged": Paged(Dense(pools), jnp.asarray(pages, jnp.int32))}


def exact_choice(query, weights, key, count=K):
    """By the definition, in whole numbers: the best first, of equal ones the lower slot."""
    chosen = np.full((B, T, count), S)
    for b, t in np.ndindex(B, T):
        seen = key[b, : LIMITS[b, t]]
        scores = (np.maximum(query[b, t] @ seen.T, 0) * weights[b, t][:, None]).sum(0)
        best = np.argsort(-scores, kind="stable")[:count]
        chosen[b, t, : len(best)] = best
    return chosen


@pytest.mark.parametrize("blocks", [False, True])
def test_the_choice_is_exact_and_of_equal_scores_the_lower_slot_wins(case, blocks, monkeypatch):
    query, weights, key = case
    count = K - blocks  # another count is another program
    want = exact_choice(*case, count)
    if blocks:  # of 128 slots, for two queries at a time: neither divides what there is
        monkeypatch.setattr(xla_choice, "BLOCK_PRODUCTS", 1)
        monkeypatch.setattr(indexing, "_CHUNK_SCORES", 2 * B * S)
    seen = Seen(limits=jnp.asarray(LIMITS))
    of_query = jnp.asarray(query, jnp.float32), jnp.asarray(weights, jnp.float32)
    for store in stores(key, np.random.default_rng(1)).values():
        got = choose_slots(*of_query, store, seen, count=count)
        np.testing.assert_array_equal(got, want)


def test_scores_are_not_rounded(rng):
    """A device may multiply float32 in fewer bits by default; the choice must not."""
    query, key = (rng.standard_normal(shape) for shape in ((1, 2, 4, 16), (1, 200, 16)))
    weights = rng.standard_normal((1, 2, 4))
    of_query = jnp.asarray(query, jnp.float32), jnp.asarray(weights, jnp.float32)
    with jax.default_matmul_precision("bfloat16"):
        got = index_scores(*of_query, Dense({"index_key": jnp.asarray(key, jnp.float32)}))
    products = np.maximum(np.einsum("btji,bsi->btjs", query, key), 0)
    want = (products * weights[..., None]).sum(2)
    np.testing.assert_allclose(got, want, atol=4 * 16 * 2.0**-23 * np.abs(products).max())
    memory = jax.jit(index_scores).lower(
        *(jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((16, 1, 64, 128), (16, 1, 64))),
        Dense({"index_key": jax.ShapeDtypeStruct((16, 65536, 128), "bfloat16")}),
    ).compile().memory_analysis()  # fmt: skip
    assert memory.temp_size_in_bytes < 16 * 64 * 65536 * 4  # what [B T J S] would take


@pytest.mark.parametrize("pieces", [False, True])
def test_attention_to_chosen_slots_is_the_masked_reference(rng, pieces, monkeypatch):
    scale = 0.3 + pieces  # another scale is another program
    if pieces:
        monkeypatch.setattr(xla, "_GATHERED", 1)  # one query at a time
    N, R, P = 3, 8, 4
    latent, k_rope = (rng.standard_normal((B, S, n)).astype(np.float32) for n in (R, P))
    chosen = np.stack([rng.permutation(S + 1)[:K] for _ in range(B * T)]).reshape(B, T, K)
    chosen[0, 0] = S  # nothing
    chosen[1, 2, :3] = 98, 99, 120  # on the border, and beyond what is seen
    unseen = ~(np.arange(S) < LIMITS.max(1)[:, None])
    latent[unseen], k_rope[unseen] = np.nan, np.nan
    q = [jnp.asarray(rng.standard_normal((B, T, N, n)), jnp.float32) for n in (R, P)]
    queries = q[0], q[1]
    seen = Seen(limits=jnp.asarray(LIMITS), chosen=jnp.asarray(chosen, jnp.int32))
    assert "chosen" in seen.options
    mask = members(seen.chosen, S)
    reference = functools.partial(
        mla_jax.latent_attention, lengths=jnp.asarray(LIMITS), scale=scale,
        implementation="reference",
    )  # fmt: skip
    want = jax.jit(lambda *arrays: reference(*arrays, mask=mask))(*queries, latent, k_rope)
    arrays = {"latent": latent, "k_rope": k_rope}
    attend = jax.jit(
        lambda store: [
            mla_jax.ops.attend_latents(queries, store, seen, scale=scale, implementation=name)
            for name in ("xla", "reference")
        ]
    )
    for store in stores(arrays, np.random.default_rng(1)).values():
        for got in attend(store):
            chex.assert_trees_all_close(got, want, atol=2e-6)
    assert np.isneginf(want[1][0, 0]).all()

    def loss(latent, queries, **options):
        out, lse = mla_jax.latent_attention(
            *queries, latent, jnp.zeros((B, S, P)), lengths=jnp.asarray(LIMITS), scale=scale,
            **options,
        )  # fmt: skip
        return jnp.sin(out).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

    clean = jnp.nan_to_num(jnp.asarray(latent))
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    got = gradient(clean, queries, chosen=jnp.asarray(chosen, jnp.int32))
    chex.assert_trees_all_close(got, gradient(clean, queries, mask=mask), atol=5e-6)


def test_what_is_chosen_must_fit():
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)  # noqa: E731
    operands = zeros(1, 2, 3, 4), zeros(1, 2, 3, 2), zeros(1, 5, 4), zeros(1, 5, 2)
    for wrong in (jnp.zeros((1, 1, 2), jnp.int32), jnp.zeros((1, 2, 2)), jnp.zeros((1, 2), int)):
        with pytest.raises(ValueError, match=r"chosen is .* \[B T K\] = \(1, 2, "):
            mla_jax.latent_attention(*operands, lengths=None, scale=1.0, chosen=wrong)
