"""The decode kernel of few query rows against float64: interpreted here, native on a Hopper GPU.

What it shares with the kernel of more rows is in `hopper_test.py`, fp8 in `hopper_fp8_test.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_common import MARKS, attend, check, loop, make, shuffled_pages

from mla_jax.ops import hopper
from mla_jax.ops.hopper import few, interpreted, merge

pytestmark = MARKS


def test_rows_of_several_tokens():
    """Two parts share a row, one has an empty row, and rows end within either block."""
    arrays, lengths = make(4, 3, 2, 264, 3, 512, 64, (70, 0, 257), jnp.float16)
    check(attend(arrays, lengths, 2), loop(arrays, lengths), jnp.float16)


def test_more_pieces_than_are_merged_at_once(monkeypatch):
    """A row on pages that three parts share, and 16 heads."""
    monkeypatch.setattr(merge, "_OF_FEW_ROWS", ((1, 2), ((1, 4, 2), (4, 1, 2), (4, 1, 2))))
    arrays, lengths = make(6, 1, 1, 384, 16, 512, 64, (327,), jnp.bfloat16)
    pages, table = shuffled_pages(arrays, lengths)
    check(attend(pages, lengths, 3, table=table), loop(arrays, lengths), jnp.bfloat16)


TRACED = (hopper._call,)
REAL = {name: getattr(few.FewPart, name) for name in ("mask_rows", "fetch_block", "fetch_q")}
PLANTED = {
    "dead_values_left": ("clear_slots", lambda self, ref, live: None),
    "a_slot_too_many": (
        "mask_rows",
        lambda self, s, here, me: REAL["mask_rows"](
            self, s, here._replace(length=here.length + 1), me
        ),
    ),
    "first_block_twice": (
        "fetch_block",
        lambda self, me, buffer, place: REAL["fetch_block"](
            self, me, buffer, place._replace(number=place.number * 0)
        ),
    ),
    "heads_of_the_row_before": (
        "fetch_q",
        lambda self, row: REAL["fetch_q"](self, row * 0),
    ),
    "second_warpgroup_forgotten": ("take", lambda self, ref: jnp.zeros(ref.shape).T),
    "weights_of_other_heads": (
        "put_weights", lambda self, ref, p: ref.__setitem__(..., jnp.roll(p, 1, axis=1).T)
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
@pytest.mark.usefixtures("traced_anew")
def test_planted_bugs_are_noticed(bug, monkeypatch):
    monkeypatch.setattr(interpreted.InterpretedFewPart, *PLANTED[bug])
    arrays, lengths = make(1, 2, 2, 296, 3, 512, 64, (70, 290), jnp.bfloat16)
    with pytest.raises(AssertionError):
        check(attend(arrays, lengths, 2), loop(arrays, lengths), jnp.bfloat16)


# ---- on a Hopper GPU

NATIVE = [  # B, T, S, N, lengths, dtype
    (5, 1, 1408, 16, (1399, 0, 65, 700, 1400), "bfloat16"),
    (3, 3, 1024, 5, (1023, 1, 130), "float16"),
    (1, 1, 32768, 16, (32700,), "bfloat16"),  # more pieces than are merged at once
    (
        140,
        2,
        128,
        8,
        tuple(min(i, 128) for i in range(140)),
        "bfloat16",
    ),  # more rows than multiprocessors
    (2, 7, 512, 2, (511, 6), "bfloat16"),
    (4, 16, 256, 1, (255, 16, 15, 129), "float16"),
]


@pytest.mark.accelerator
@pytest.mark.parametrize("case", NATIVE, ids=lambda c: "B{0}-T{1}-N{3}-{5}".format(*c))
def test_native(case, card):
    """Against the loop, bit for bit again, and bit for bit on pages; few parts and many."""
    batch, tokens, slots, heads, lengths, dtype = case
    shape = (batch, tokens, slots, heads, 512, 64)
    arrays, lengths = make(NATIVE.index(case), *shape, lengths, dtype)
    want = loop(arrays, lengths)
    run = jax.jit(functools.partial(attend, sms=card.cores, interpret=None))
    got = run(arrays, lengths)
    tolerance = 4e-3 if dtype == "bfloat16" else 5e-4
    check(got, want, jnp.dtype(dtype), tolerance=tolerance)
    pages, table = shuffled_pages(arrays, lengths)
    for again in (run(arrays, lengths), run(pages, lengths, table=table)):
        for one, two in zip(got, again, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    got = jax.jit(functools.partial(attend, sms=4, interpret=None))(arrays, lengths)
    check(got, want, jnp.dtype(dtype), tolerance=tolerance)
