"""Faults that a mesh invites, planted one by one: tests that pass without them see each of them.

Letters: B rows, T tokens, N heads.
"""

import jax
import jax.numpy as jnp
import mesh_test
import pytest
import sharding_test
from jax import lax

from mla_jax import sharding
from mla_jax.cache.dense import Dense
from mla_jax.cache.stripes import Stripes
from mla_jax.ops import dense
from mla_jax.ops import mesh as cores

FIRST = []  # the layout of the first call


def layers(*layouts):
    for layout in layouts:
        sharding_test.test_a_layer_on_a_mesh_is_the_layer(layout, "all_parts", "float32")


def large_scores():
    mesh_test.test_parts_of_large_scores_are_merged(4)


def experts():
    mesh_test.test_experts_on_a_mesh_are_the_experts("gathered", 1)


def moves():
    mesh_test.test_a_step_moves_what_its_layout_says_and_nothing_else("tensor")


def first_slot_off_by_one_block(first, stripes):
    return (first(stripes) + 1) % stripes.count


def merged_without_the_maximum(_, *parts):
    weights = jnp.exp(jnp.stack([lse for _, lse in parts]))
    outs, total = jnp.stack([out for out, _ in parts]), weights.sum(0)
    return (weights[..., None] * outs).sum(0) / total[..., None], jnp.log(total)


def heads_traded_in_another_order(exchange, axes, out, lse):
    return exchange(axes, out[:, :, ::-1], lse[:, :, ::-1])


def positions_of_other_rows(write, store, at, **new):
    return write(store, jnp.roll(at, 1, axis=0), **new)


def sums_of_experts_not_scattered(_, sums, axes, **options):
    rows = len(sums) // lax.axis_size(axes)
    return lax.dynamic_slice_in_dim(sums, lax.axis_index(axes) * rows, rows)


def layout_of_the_first_call(of, *operands):
    FIRST.append(of(*operands))
    return FIRST[0]


def kernel_gathered(placed, product, x, kernel, *axes):
    return placed(product, x, sharding.move(kernel) if product.letters[0] == "N" else kernel, *axes)


PLANTED = [
    (first_slot_off_by_one_block, Stripes, "_first", lambda: layers("helix"), AssertionError),
    (merged_without_the_maximum, cores, "merge_attention", large_scores, AssertionError),
    (heads_traded_in_another_order, cores, "_exchange", lambda: layers("helix"), AssertionError),
    (positions_of_other_rows, Dense, "write", lambda: layers("data"), AssertionError),
    (sums_of_experts_not_scattered, lax, "psum_scatter", experts, AssertionError),
    (layout_of_the_first_call, cores.Layout, "of", lambda: layers("data", "helix"), Exception),
    (kernel_gathered, dense.Product, "_placed", moves, AssertionError),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "owner", "name", "check", "error"), PLANTED, ids=[one[0].__name__ for one in PLANTED]
)
def test_a_planted_fault_is_seen(fault, owner, name, check, error, monkeypatch):
    sharding_test.on_one_device("all_parts", "float32")  # is kept, and so is the next
    mesh_test.mixture(1)
    plain = getattr(owner, name)

    def planted(*args, **options):
        return fault(plain, *args, **options)

    kept = staticmethod(planted) if fault is layout_of_the_first_call else planted
    jax.clear_caches()
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, kept)
        with pytest.raises(error):
            check()
    jax.clear_caches()
